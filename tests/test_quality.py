"""Quality flags find typical failures of translators, and accept what people write. Language codes are matched."""

import pytest
from langcodes import standardize_tag

from captions.languages import find_translator_language_code
from captions.quality import QUALITY_FLAGS, find_translation_quality_flags

GOOD = [
    ("a cat on a mat", "um gato em um tapete", "pt"),
    ("Rio de Janeiro", "Rio de Janeiro", "pt"),
    ("a photo of Taj Mahal", "uma foto do Taj Mahal", "pt"),
    ("no no no, the dog ran", "não não não, o cachorro correu", "pt"),
    ("hahahahaha", "kkkkkkkkkk", "pt"),
    ("a man in a hat, a man in a coat, a man in a car", "um homem de chapéu, um homem de casaco, um homem no", "pt"),
    ("a man riding a horse on the beach", "समुद्र तट पर घोड़े की सवारी करता एक आदमी", "hi"),
    ("an iPhone 12 and a MacBook", "एक iPhone 12 और एक MacBook मेज़ पर", "hi"),
    ("a dog runs in the park", "ajá kan ń sáré nínú ọgbà ìtura", "yo"),
    ("a man riding a brown horse on a sandy beach at sunset", "日落时分，一名男子骑着棕色的马在沙滩上", "zh"),
    ("a cat on a mat", "マットの上の猫", "ja"),
    ("a cat", "mačka", "sr"),
    ("a cat on a mat", "кошка", "sr"),
    ("a cat", "anything", "xx"),
    ("", "", "pt"),
]


@pytest.mark.parametrize(("source", "translation", "language"), GOOD)
def test_good_translations_get_no_flag(source, translation, language):
    assert find_translation_quality_flags(source, translation, language) == []


@pytest.mark.parametrize(
    ("source", "translation", "language", "expected"),
    [
        ("a cat on a mat", "", "pt", ["empty"]),
        ("a cat on a mat", "a cat on a mat", "pt", ["copy"]),
        ("a cat on a mat", "A cat, on a mat!", "xh", ["copy"]),
        ("a man riding a horse", "a man riding a horse", "hi", ["copy", "wrong script"]),
        ("a cat", "кошка на ковре", "pt", ["wrong script"]),
        ("a cat on a mat", "貓", "zh-Latn", ["wrong script"]),
        ("a cat", "um gato que se senta em cima de um tapete vermelho", "pt", ["length"]),
        ("a man riding a brown horse on a sandy beach at sunset", "马", "zh", ["length"]),
        ("a man on a beach", "um homem na praia" + " na praia" * 6, "pt", ["length"]),
        ("Tom & Jerry", "Tom &amp; Jerry", "pt", ["markup"]),
        ("a cat", "um <b>gato</b>", "pt", ["markup"]),
        ("a cat", ">>por<< um gato", "pt", ["markup"]),
        ("a cat", "um ⁇ gato", "pt", ["markup"]),
    ],
)
def test_failed_translations_are_flagged(source, translation, language, expected):
    assert find_translation_quality_flags(source, translation, language) == expected
    assert set(expected) <= set(QUALITY_FLAGS)


def test_a_long_caption_takes_no_time(benchmark_s=2.0):
    import time

    start = time.perf_counter()
    find_translation_quality_flags("a cat on a mat. " * 700, "um gato em um tapete e " * 700, "pt")
    find_translation_quality_flags("a" * 10_000, "ab" * 5_000, "pt")
    find_translation_quality_flags("<" * 10_000, "<a " * 3_000, "pt")
    assert time.perf_counter() - start < benchmark_s


@pytest.mark.parametrize(
    ("language", "codes", "expected"),
    [
        ("pt", ["por", "spa"], "por"),
        ("por", ["pt", "es"], "pt"),
        ("pt", ["pt_BR", "pt", "pob"], "pt"),
        ("pt-BR", ["pt_br", "pt_PT", "pt"], "pt_br"),
        ("PT", ["por_Latn"], "por_Latn"),
        ("pt", ["en_XX", "pt_XX"], "pt_XX"),
        ("zh-Hant", ["zho_Hans", "zho_Hant"], "zho_Hant"),
        ("zh", ["zho_Hant", "zho_Hans"], "zho_Hans"),
        ("sw", ["swh_Latn"], "swh_Latn"),
        ("fa", ["pes_Arab", "prs_Arab"], "pes_Arab"),
        ("por_Latn", ["por_Latn", "por"], "por_Latn"),
    ],
)
def test_the_code_of_a_language(language, codes, expected):
    assert find_translator_language_code(language, codes) == expected


def test_unknown_languages_and_those_of_a_real_model():
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    with pytest.raises(ValueError, match=r"'pr'.*\b3\b.*\bpt\b"):
        find_translator_language_code("pr", ["pt", "es", "hi"])
    with pytest.raises(ValueError, match=r"'zh-Hant'.*zho_Hans"):
        find_translator_language_code("zh-Hant", ["zho_Hans"])
    with pytest.raises(ValueError, match=r"'portuguese'.*por_Latn"):
        find_translator_language_code("portuguese", FAIRSEQ_LANGUAGE_CODES)
    for code in ("por_Latn", "hin_Deva", "xho_Latn", "spa_Latn", "arb_Arab", "swh_Latn", "npi_Deva", "als_Latn"):
        assert find_translator_language_code(standardize_tag(code, macro=True), FAIRSEQ_LANGUAGE_CODES) == code
