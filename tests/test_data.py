"""Pairs that a training step uses: batches, captions, views and replacements."""

import numpy as np
import pytest
from caption_tars import measured_of, training_of
from datasets import DatasetDict, load_from_disk

from capivara_common.cli import parse_arguments
from caption_data import pairs
from caption_data.pairs import check_bad_share
from caption_data.sources import open_split
from training.arguments import RunArguments
from training.batches import (
    BatchPlanner,
    apportion_batch_to_datasets,
    batch_indices,
    sample_captions,
    sample_view_numbers,
)

CAPTIONS = [[f"gato {i}", f"uma casa azul {i}"][: 1 + i % 2] for i in range(11)]


def arguments(*datasets, **values):
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return parse_arguments(RunArguments, None, ["--model", "m", "--dataset", *map(str, datasets), *flags], config=True)


def test_an_epoch_holds_every_image_at_most_once():
    rows = np.concatenate([batch_indices(step, 4, 11, seed=0) for step in range(2)])
    assert len(set(rows)) == 8
    assert not np.array_equal(batch_indices(0, 4, 11, 0), batch_indices(2, 4, 11, 0)), "a new epoch, a new order"
    assert not np.array_equal(batch_indices(0, 4, 11, 0), batch_indices(0, 4, 11, 1)), "a new seed, a new order"
    assert np.array_equal(batch_indices(5, 4, 11, 0), batch_indices(5, 4, 11, 0))


def test_each_caption_of_an_image_is_drawn_equally_often():
    captions = [["a", "b", "c"], ["d"]]
    drawn = [sample_captions(captions, np.array([0, 1]), step, seed=0) for step in range(300)]
    shares = [sum(d[0] == text for d in drawn) / 300 for text in "abc"]
    assert min(shares) > 0.25 and all(d[1] == "d" for d in drawn)


def test_each_step_draws_new_views():
    drawn = np.stack([sample_view_numbers(3, 5, step, seed=0) for step in range(60)])
    assert set(drawn.flatten()) == {0, 1, 2} and len({tuple(views) for views in drawn}) > 30
    assert (sample_view_numbers(1, 5, 7, seed=0) == 0).all()
    assert (sample_view_numbers(0, 5, 7, seed=0) == 7).all(), "a fresh view is named after its step"


def test_pairs_per_dataset_follow_the_sizes_of_the_datasets():
    assert apportion_batch_to_datasets(7, [10, 20, 40]) == [1, 2, 4]
    assert sum(apportion_batch_to_datasets(2816, [999_999, 31_000, 5_000])) == 2816
    for sizes in ([8], [5, 3], [1, 1, 6]):
        assert apportion_batch_to_datasets(8, sizes) == sizes
        with pytest.raises(ValueError, match=r"9.*--effective_batch_size 8\b"):
            apportion_batch_to_datasets(9, sizes)
    with pytest.raises(ValueError, match="pair"):
        apportion_batch_to_datasets(9, [0])
    with pytest.raises(ValueError, match=r"\b3\b"):
        apportion_batch_to_datasets(10, [1000, 3])


def test_a_plan_is_a_function_of_step_and_seed(tiny_processor):
    planner = BatchPlanner([CAPTIONS, CAPTIONS[:6]], [4, 2], tiny_processor, 4, 1, seed=3)
    plans = [planner(5), BatchPlanner([CAPTIONS, CAPTIONS[:6]], [4, 2], tiny_processor, 4, 1, seed=3)(5)]
    assert all(np.array_equal(plans[0].rows, plan.rows) for plan in plans)
    assert sorted(plans[0].dataset_indices) == [0, 0, 0, 0, 1, 1]
    assert not np.array_equal(planner(6).rows, plans[0].rows)
    assert [len(batch.input_ids) for batch in plans[0].batches] == [4, 2]


def test_datasets_are_sampled_independently(tiny_processor):
    """Two datasets of the same size give different rows; the first gives the same rows as if it were alone."""
    captions = [[f"gato {i}", f"casa {i}"] for i in range(40)]
    for step in range(3):
        plan = BatchPlanner([captions, captions], [8, 8], tiny_processor, 4, 1, seed=3)(step)
        first, second = ({*plan.rows[plan.dataset_indices == number]} for number in (0, 1))
        assert first == {*batch_indices(step, 8, 40, seed=3)} and len(second) == 8 and second != first


def test_texts_and_images_of_a_plan_belong_together(tiny_processor):
    """Texts are sorted by length, and each stays with its own image."""
    planner = BatchPlanner([CAPTIONS, [[f"the dog {i + 100}"] for i in range(6)]], [8, 4], tiny_processor, 3, 1, seed=0)
    for step in range(4):
        plan = planner(step)
        texts = [t for b in plan.batches for t in tiny_processor.batch_decode(b.input_ids, skip_special_tokens=True)]
        assert [int(text.split()[-1]) for text in texts] == (plan.rows + 100 * plan.dataset_indices).tolist()


def test_replacement_pairs_come_after_the_batch_in_the_permutation(tiny_processor):
    """Each replacement has its own caption, tokenized in its micro-batch; no row occurs twice, even around the end."""
    planner = BatchPlanner([CAPTIONS, CAPTIONS[:6]], [8, 4], tiny_processor, 3, 1, seed=0)
    plan, left = planner(1), [int(i) for i in range(11) if i not in batch_indices(1, 8, 11, 0)]
    place = [int(number) for number in np.flatnonzero(plan.dataset_indices == 0)]
    first = planner.replace_pairs(plan, place[1:3])
    second = planner.replace_pairs(first, place[2:3])
    assert sorted([*first.rows[place[1:3]], second.rows[place[2]]]) == left and second.replacement_counts == {0: 3}
    other = np.flatnonzero(plan.dataset_indices == 1)[:2].tolist()  # the second dataset has two replacement pairs
    assert len({*planner.replace_pairs(second, other).rows[plan.dataset_indices == 1]}) == 4
    same = np.setdiff1d(np.arange(12), place[1:3])
    assert np.array_equal(second.rows[same], plan.rows[same]) and np.array_equal(plan.rows, planner(1).rows)
    texts = [t for b in second.batches for t in tiny_processor.batch_decode(b.input_ids, skip_special_tokens=True)]
    assert texts == second.texts and all(text in CAPTIONS[row] for text, row in zip(texts, second.rows, strict=True))
    assert [batch.index for batch in second.batches] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"\b2\b.*8 of 11"):
        planner.replace_pairs(second, place[:1])


def with_captions(row: int, captions: list[str]):
    """Return a function that replaces the Portuguese captions of one row of a dataset."""
    return lambda d: d.map(lambda _, i: {"captions-pt": captions if i == row else ["ok"]}, with_indices=True)


BROKEN = {
    "no split": (lambda d: DatasetDict(train=d["train"]), "'validation'.*'train'"),
    "no column": (lambda d: d.remove_columns("captions-pt"), "'captions-pt'.*'captions-en'"),
    "empty caption": (with_captions(3, ["ok", " "]), "row 3 .*no caption"),
    "no caption": (with_captions(2, []), "row 2 .*no caption"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_evaluation_split_must_not_have_bad_rows(tiny_dataset_folder, tmp_path, fault):
    """In the training split, bad rows are left out and listed."""
    break_it, message = BROKEN[fault]
    break_it(load_from_disk(tiny_dataset_folder)).save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match=message):
        measured_of(arguments(tmp_path / "broken"), "validation", ["pt"])
    if fault == "no caption":
        skipped = []
        splits = training_of(arguments(tiny_dataset_folder, tmp_path / "broken"), skipped)
        assert [len(split) for split in splits] == [12, 11] and splits[0][4].size == (36, 40)
        assert [(line.row, line.reason) for line in skipped] == [(2, "no caption")]


def test_pair_filter_and_strategy_read_the_authors_columns(tiny_dataset_folder, tmp_path):
    """This includes datasets without generated captions, as in `captions.select`."""
    data = load_from_disk(tiny_dataset_folder)["train"].remove_columns("captions-pt").select(range(4))
    generated, texts = ("generated-captions-pt", [["um", "dois"]] * 4), [[f"original {i}"] for i in range(4)]
    scored = [[0.3, 0.1, 0.4], [0.1, 0.9, 0.9], [0.5, 0.2, 0.3], [0.2, 0.1, 0.1]]
    scored = data.add_column(*generated).add_column("captions-pt", texts).add_column("similarities-pt", scored)
    plain = data.add_column("captions-pt", generated[1])
    plain = plain.add_column("similarities-pt", [[0.3, 0.4], [0.1, 0.9], [0.5], [0.6, 0.5]])
    expected = {
        "scored": ([["dois", "original 0"], ["original 2", "dois"], ["original 3", "um"]], [(1, "not chosen")]),
        "plain": ([["dois", "um"], ["um", "dois"]], [(1, "not chosen"), (2, "no caption")]),
    }
    values = {"caption_strategy": "rank", "caption_count": 2, "min_pair_similarity": 0.2}
    for (name, result), dataset in zip(expected.items(), (scored, plain), strict=True):
        DatasetDict(train=dataset).save_to_disk(tmp_path / name)
        (split,) = training_of(arguments(tmp_path / name, **values), skipped := [])
        assert (split.captions(), [(line.row, line.reason) for line in skipped]) == result
    check_bad_share(skipped[:1], 4, max_bad_share=0)  # a row that is not chosen does not count as bad


def test_the_caption_column_can_have_another_name(tiny_dataset_folder, tmp_path):
    data = load_from_disk(tiny_dataset_folder)["train"].rename_column("captions-pt", "caption")
    DatasetDict(train=data, validation=data).save_to_disk(tmp_path / "hub")
    args = arguments(tmp_path / "hub", caption_column="caption")
    (split,) = training_of(args, [])
    assert split.captions() == data["caption"][:]
    assert measured_of(args, "validation", ["pt"])["pt"].captions() == split.captions()
    args = arguments(tiny_dataset_folder, evaluation_dataset=tmp_path / "hub", caption_column="captions-{language}")
    with pytest.raises(ValueError, match=r"'validation'.*'captions-pt'"):
        measured_of(args, "validation", ["pt"])


def test_the_fingerprint_of_a_large_table_is_computed_once(tiny_dataset_folder, tmp_path, monkeypatch):
    """It equals the fingerprint of a small table, and belongs to the content of the table."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "home"))
    split, calls = open_split(str(tiny_dataset_folder), "train", "image"), []

    def fingerprint(captions):
        table = pairs.load_or_build_pair_table(
            split, ["captions-pt"], lambda row: row["captions-pt"][:captions], [captions]
        )
        return pairs.load_or_compute_pair_content_digest(pairs.filter_usable_rows(table))

    expected = [fingerprint(1), fingerprint(2)]
    compute = pairs.compute_image_caption_rows_digest
    monkeypatch.setattr(pairs, "CACHED_FINGERPRINT_ROWS", 1)
    monkeypatch.setattr(pairs, "compute_image_caption_rows_digest", lambda rows: calls.append(1) or compute(rows))
    assert [fingerprint(1), fingerprint(2), fingerprint(1), fingerprint(2)] == expected * 2
    assert len(calls) == 2 and expected[0] != expected[1]
