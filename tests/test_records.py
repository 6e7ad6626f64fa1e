"""Records validate themselves, result files are read strictly, and figures are averaged over seeds and paired."""

import json
import math
from dataclasses import replace

import pytest

from eval.records.result_files import (
    Record,
    ResultFile,
    parse_result,
    read_records,
    read_untrusted_json_object_and_bytes,
)
from eval.records.tables import average_over_seeds, build_records_frame, format_signed_difference, pair_with_baselines

RECORD = Record(
    task="retrieval", dataset="d", split="test", language="pt", protocol="p", direction="text_to_image",
    metric="recall@5", value=0.5, n=20, model="capivara", model_folder=".", seed=0, chance=0.25,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 1.2}, "value .*0 to 1.*1.2"),
        ({"value": math.nan}, "value .*nan"),
        ({"metric": "median_rank", "value": 0.5}, "value .*0.5"),
        ({"metric": "mean_recall_gain", "value": -1.1}, "value .*-1 to 1.*-1.1"),
        ({"metric": "accuracy"}, "metric .*retrieval.*'accuracy'"),
        ({"metric": "recall@20"}, "n .*recall@20.* 20$"),
        ({"direction": ""}, "direction .*text_to_image, image_to_text"),
        ({"seed": True}, "seed .*True"),
        ({"chance": 2}, "chance .*0 to 1.*2"),
        ({"interval_95": (0.2, 0.1)}, r"interval_95 .*\(0.2, 0.1\)"),
        ({"language": ["pt"]}, r"language .*\['pt'\]"),
        ({"dim": 0}, r"dim .*1.*\b0\b"),
    ],
)
def test_a_record_with_an_invalid_field_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RECORD, **change)


def test_rounding_errors_lists_as_intervals_and_unknown_fields_are_accepted():
    assert replace(RECORD, value=1 + 1e-12, interval_95=[0.1, 0.2]).interval_95 == (0.1, 0.2)
    entry = json.loads(json.dumps(vars(RECORD))) | {"extra": 1}
    assert parse_result({"schema_version": 2, "records": [entry]}, "r.json").records == (RECORD,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 3, "records": [{}]}', r"r\.json#/schema_version .*\b2\b.*\b3\b"),
        ('{"schema_version": 2, "records": []}', r"r\.json#/records .*\[\]"),
        ('{"schema_version": 2, "records": [{}]}', r"r\.json#/records/0 .*'task'"),
        ('{"a": 1, "a": 2}', r"r\.json .*JSON.*duplicate"),
        ('{"a": Infinity}', r"r\.json .*JSON.*Infinity"),
        ("[" * 100_000, r"r\.json .*JSON.*nested"),
    ],
)
def test_an_invalid_file_is_refused_with_the_place_of_the_fault(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "r.json")
    with pytest.raises(ValueError, match="regular file"):
        read_untrusted_json_object_and_bytes(tmp_path)  # a folder


def make_result_file(*records: Record, name: str = "a.json", **header) -> ResultFile:
    return ResultFile(name, records, header)


def test_seeds_are_averaged_and_listed_in_order():
    seeds = [replace(RECORD, seed=seed, value=value) for seed, value in ((2, 0.7), (0, 0.5))]
    frame = build_records_frame([make_result_file(*seeds, skipped_rows=3, dataset_fingerprint="f")])
    (value,) = average_over_seeds(frame, "precision")
    assert value.mean == pytest.approx(0.6) and round(value.deviation, 3) == 0.141 and value.seeds == 2
    expected = [("a.json#/records/1", 0.5), ("a.json#/records/0", 0.7)]
    assert [(row.source, row.value) for row in value.measured] == expected
    assert value.data == {"f"} and value.measured[1].record == seeds[0] and set(frame["skipped_rows"]) == {3}
    (single,) = average_over_seeds(build_records_frame([make_result_file(RECORD)]), "precision")
    assert single.deviation is None and single.chance == 0.25


def test_the_gain_is_model_minus_baseline():
    baseline = replace(RECORD, model="baseline", seed=None, value=0.4, model_folder="base")
    frame = build_records_frame([make_result_file(baseline, RECORD)])
    (pair,) = pair_with_baselines(average_over_seeds(frame, "folder"))
    assert (
        pair["gain"] == pytest.approx(0.1) and format_signed_difference(pair["gain"]) == "+10.0" and not pair["doubts"]
    )
    assert (
        format_signed_difference(-0.0312) == "−3.1"
        and format_signed_difference(0.0001) == "0.0"
        and format_signed_difference(None) == "–"
    )
