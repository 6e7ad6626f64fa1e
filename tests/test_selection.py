"""Caption strategies and the pair filter, on rows whose correct result is obvious."""

import math

import pytest

from caption_data.rows import STRATEGIES, CaptionChoice

ROW = {
    "captions-pt": ["gato preto", "cão na praia"],
    "generated-captions-pt": ["ônibus azul", "flores amarelas", "pão com queijo"],
    "similarities-pt": [0.25, 0.1, 0.3, 0.19, 0.4],
}
# Near-copies share three of four words with the caption that they copy, and come right after it.
NEAR_COPIES = {
    "captions-pt": ["um gato preto dorme"],
    "generated-captions-pt": ["um gato preto come", "um gato preto corre", "mesa verde", "céu azul", "fora daqui"],
    "similarities-pt": [0.9, 0.8, 0.7, 0.6, 0.5, 0.1],
}


def row_of(captions: list[str], generated: list[str], similarities: list[float]) -> dict:
    return {"captions-pt": captions, "generated-captions-pt": generated, "similarities-pt": similarities}


def choice_of(strategy: str = "none", count: int = 5, min_similarity: float = 0.2, **constants) -> CaptionChoice:
    choice = CaptionChoice(caption_strategy=strategy, caption_count=count, min_similarity=min_similarity)
    for name, value in constants.items():
        setattr(choice, name, value)
    choice.check_choice()
    return choice


def pair_passes(row, least) -> bool:
    return bool(CaptionChoice(min_pair_similarity=least).choose_captions(row, "pt"))


def chosen(row: dict, strategy: str, **numbers) -> list[str]:
    return choice_of(strategy, **numbers).choose_captions(row, "pt")


PHOTO_TEXTS, BY_SIMILARITY = ["gato preto", "cão na praia"], ["pão com queijo", "ônibus azul", "gato preto"]


@pytest.mark.parametrize(
    "choice, expected",
    [
        (choice_of(), PHOTO_TEXTS),
        (choice_of("first", count=1), [*PHOTO_TEXTS, "ônibus azul"]),
        (choice_of("first", count=99), [*PHOTO_TEXTS, *ROW["generated-captions-pt"]]),
        (choice_of("all", count=1), [*PHOTO_TEXTS, *ROW["generated-captions-pt"]]),
        (choice_of("rank", count=2), BY_SIMILARITY[:2]),
        (choice_of("threshold"), BY_SIMILARITY),
        (choice_of("threshold", min_similarity=0.1), [*BY_SIMILARITY, "flores amarelas", "cão na praia"]),
        (choice_of("diverse"), BY_SIMILARITY),
        (choice_of("diverse", min_similarity=0.5), []),
    ],
)
def test_each_strategy_returns_its_captions_in_order(choice, expected):
    assert choice.choose_captions(ROW, "pt") == expected


def test_defaults_are_the_published_ones():
    choice = choice_of("rank")
    assert (choice.caption_count, choice.min_similarity, choice.max_overlap, choice.min_kept) == (5, 0.2, 0.3, 3)
    assert choice_of().caption_strategy == "none"


def test_the_threshold_itself_passes():
    row = row_of(["a"], ["b"], [0.2, math.nextafter(0.2, 0)])
    assert chosen(row, "threshold") == ["a"]
    assert pair_passes(row, 0.2) and not pair_passes(row, math.nextafter(0.2, 1))


@pytest.mark.parametrize("strategy", ["rank", "threshold", "diverse"])
def test_ties_keep_the_order_of_the_row(strategy):
    row = row_of(["z", "a"], ["m", "b"], [0.5, 0.5, 0.6, 0.5])
    assert chosen(row, strategy) == ["m", "z", "a", "b"]


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_nan_counts_as_lowest(unknown):
    row = row_of(["sem nota"], ["pior", "melhor"], [unknown, -0.9, 0.8])
    assert chosen(row, "rank") == ["melhor", "pior", "sem nota"]
    assert chosen(row, "threshold", min_similarity=-1) == ["melhor", "pior"] and not pair_passes(row, -1)


def test_a_repeated_caption_counts_once_at_its_first_position():
    row = row_of(["a", "b", "a"], ["b", "c", "c", "d"], [0.3, 0.5, 0.9, 0.4, 0.6, 0.2, 0.1])
    assert chosen(row, "none") == ["a", "b"]
    assert chosen(row, "first", count=1) == ["a", "b", "c"]
    assert chosen(row, "rank", count=3) == ["a", "c", "b"], "three distinct captions, each with its best similarity"
    assert chosen(row, "threshold") == ["a", "c", "b"]


NEAR = ["um gato preto dorme", "mesa verde", "céu azul"]
FIVE = ["gato preto dorme", "mesa azul redonda", "gato preto come", "mesa azul grande", "praia"]
COPIES = row_of(["um gato"], ["um gato só", "um gato sim", "um gato não"], [0.5, 0.9, 0.8, 0.7])
# "uma foto de" is in every caption of the row, including those below the threshold, so it has a low weight.
PHOTOS, MORE = ["uma foto de gato", "uma foto de rio"], [f"uma foto de {x}" for x in ("pão", "sol", "mar", "lua")]
DIVERSE = [  # row, numbers, what is kept
    (NEAR_COPIES, {}, NEAR),
    (NEAR_COPIES, {"min_kept": 4}, [NEAR[0], "um gato preto come", *NEAR[1:]]),  # filled up with the most similar
    (NEAR_COPIES, {"min_kept": 1, "max_overlap": 1.0}, chosen(NEAR_COPIES, "threshold")),
    (COPIES, {}, ["um gato só", "um gato sim", "um gato não"]),
    (COPIES, {"min_kept": 1}, ["um gato só"]),
    # The third overlaps the first alone, the fourth the second alone: both go.
    (row_of(FIVE, [], [0.9, 0.8, 0.7, 0.6, 0.5]), {"min_kept": 1}, [*FIVE[:2], "praia"]),
    # A cosine rounds to a little over 1.
    (row_of(["Gato preto.", "gato preto", "praia"], [], [0.9, 0.8, 0.7]), {"min_kept": 1, "max_overlap": 1.0},
     ["Gato preto.", "gato preto", "praia"]),
    (row_of(["Gato preto!", "gato, preto", "rio"], [], [0.9, 0.8, 0.7]), {"min_kept": 1}, ["Gato preto!", "rio"]),
    (row_of(PHOTOS, MORE, [0.9, 0.8, 0, 0, 0, 0]), {"min_kept": 1, "max_overlap": 0.5}, PHOTOS),
    (row_of(PHOTOS, [], [0.9, 0.8]), {"min_kept": 1, "max_overlap": 0.5}, PHOTOS[:1]),
    # Cut at their vowel signs, both would be the consonants ब and ल, and the second would go.
    (row_of(["बिल्ली", "बाल"], [], [0.9, 0.8]), {"min_kept": 1}, ["बिल्ली", "बाल"]),
    # Without any word they are unlike each other.
    (row_of(["!!!", "??", "", "a b", "b a"], [], [0.9, 0.8, 0.7, 0.6, 0.5]), {}, ["!!!", "??", "", "a b"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "numbers", "kept"), DIVERSE)
def test_diverse_keeps_captions_unlike_each_other(row, numbers, kept):
    assert chosen(row, "diverse", **numbers) == kept


def test_strategy_columns_are_the_columns_that_are_read():
    for strategy in STRATEGIES:
        choice = choice_of(strategy, min_similarity=-1)
        needed = choice.strategy_columns("pt")
        choice.choose_captions({name: ROW[name] for name in needed}, "pt")
        for name in needed:
            with pytest.raises(ValueError, match=name):
                choice.choose_captions({other: ROW[other] for other in needed if other != name}, "pt")
    assert choice_of().strategy_columns("hi") == ["captions-hi"]
    assert choice_of("rank").strategy_columns("hi") == ["captions-hi", "generated-captions-hi", "similarities-hi"]


@pytest.mark.parametrize("numbers", [[0.5], [0.5] * 4, [0.5] * 6])
@pytest.mark.parametrize("strategy", ["rank", "threshold", "diverse"])
def test_wrong_number_of_similarities(strategy, numbers):
    with pytest.raises(ValueError, match=rf"\b{len(numbers)} .*\b5 "):
        chosen({**ROW, "similarities-pt": numbers}, strategy)
    assert len(chosen({**ROW, "similarities-pt": numbers}, "all")) == 5, "the strategy does not read similarities"


@pytest.mark.parametrize("wrong", [{"strategy": "best"}, {"count": 0}, {"min_similarity": math.nan}])
def test_bad_values_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        choice_of(**wrong)


def test_the_pair_filter_reads_only_the_first_original_caption():
    assert pair_passes(ROW, 0.25)
    assert not pair_passes(ROW, 0.26), "another caption of the row has 0.4"
    assert not pair_passes(row_of([], ["gerada"], [0.9]), 0.2), "the only similarity is of a generated caption"


def test_the_pair_filter_needs_no_generated_captions():
    row = {"captions-pt": ROW["captions-pt"], "similarities-pt": ROW["similarities-pt"]}
    assert pair_passes(row, 0.25)
    for numbers, message in (([0.9], r"\b1 .*\b2 "), (None, "similarities-pt")):
        with pytest.raises(ValueError, match=message):
            pair_passes({**row, "similarities-pt": numbers}, 0.2)
    with pytest.raises(ValueError, match="list"):
        chosen({"captions-pt": "gato"}, "none")
