"""The record of a figure checks itself, files are read strictly, and figures of several seeds belong together."""

import json
import math
from dataclasses import replace

import pytest

from eval.records.schema import Record, ResultFile, parse_result, read_json_object, read_records
from eval.records.tables import average_over_seeds, build_records_frame, format_points, pair_with_baselines

RECORD = Record(
    task="retrieval", dataset="d", split="test", language="pt", protocol="p", direction="text_to_image",
    metric="recall@5", value=0.5, n=20, model="capivara", model_folder=".", seed=0, chance=0.25,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 1.2}, "value must be a share from 0 to 1, got 1.2 for recall@5"),
        ({"value": math.nan}, "value must be a finite number"),
        ({"metric": "median_rank", "value": 0.5}, "value must be a rank from 1, got 0.5"),
        ({"metric": "mean_recall_gain", "value": -1.1}, "value must be a share from -1 to 1"),
        ({"metric": "accuracy"}, "metric must be one of retrieval, got 'accuracy'"),
        ({"metric": "recall@20"}, "n must be above 20 for recall@20, got 20"),
        ({"direction": ""}, "direction must be one of text_to_image, image_to_text for retrieval"),
        ({"seed": True}, "seed must be a whole number or null"),
        ({"chance": 2}, "chance must be a share from 0 to 1"),
        ({"interval_95": (0.2, 0.1)}, "interval_95 must be two numbers, the low end first"),
        ({"language": ["pt"]}, "language must be text, got \\['pt'\\]"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_a_figure_out_of_its_range_is_no_record(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **change)


def test_rounding_is_no_fault_a_list_is_an_interval_and_unknown_fields_are_left_out():
    assert replace(RECORD, value=1 + 1e-12, interval_95=[0.1, 0.2]).interval_95 == (0.1, 0.2)
    entry = json.loads(json.dumps(vars(RECORD))) | {"extra": 1}
    assert parse_result({"schema_version": 2, "records": [entry]}, "r.json").records == (RECORD,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 3, "records": [{}]}', r"r\.json#/schema_version must be 2, got 3: measure it again"),
        ('{"schema_version": 2, "records": []}', r"r\.json#/records must be a list of at least one figure, got \[\]"),
        ('{"schema_version": 2, "records": [{}]}', r"r\.json#/records/0 has no 'task'"),
        ('{"a": 1, "a": 2}', r"r\.json is no JSON: a key stands twice"),
        ('{"a": Infinity}', r"r\.json is no JSON: it holds Infinity"),
        ("[" * 100_000, r"r\.json is no JSON that can be read: it nests too deep"),
    ],
)
def test_a_wrong_file_is_named_with_the_place_in_it(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "r.json")
    with pytest.raises(ValueError, match="is no regular file"):
        read_json_object(tmp_path)


def file_of(*records: Record, name: str = "a.json", **header) -> ResultFile:
    return ResultFile(name, records, header)


def test_seeds_are_one_value_in_their_order():
    seeds = [replace(RECORD, seed=seed, value=value) for seed, value in ((2, 0.7), (0, 0.5))]
    frame = build_records_frame([file_of(*seeds, skipped_rows=3, dataset_fingerprint="f")])
    (value,) = average_over_seeds(frame, "precision")
    assert value.mean == pytest.approx(0.6) and round(value.deviation, 3) == 0.141 and value.seeds == 2
    expected = [("a.json#/records/1", 0.5), ("a.json#/records/0", 0.7)]
    assert [(one.source, one.value) for one in value.measured] == expected
    assert value.data == {"f"} and value.measured[1].record == seeds[0] and set(frame["skipped_rows"]) == {3}
    (single,) = average_over_seeds(build_records_frame([file_of(RECORD)]), "precision")
    assert single.deviation is None and single.chance == 0.25


def test_a_gain_is_model_minus_baseline():
    baseline = replace(RECORD, model="baseline", seed=None, value=0.4, model_folder="base")
    (pair,) = pair_with_baselines(average_over_seeds(build_records_frame([file_of(baseline, RECORD)]), "folder"))
    assert pair["gain"] == pytest.approx(0.1) and format_points(pair["gain"]) == "+10.0" and not pair["doubts"]
    assert format_points(-0.0312) == "−3.1" and format_points(0.0001) == "0.0" and format_points(None) == "–"
