"""Retrieval records, their table, and sheets of queries."""

from functools import partial

import pytest
import torch
from PIL import Image

from capivara_common.files import read_json
from capivara_common.image_files import BadImage
from capivara_common.privacy import get_publishable_model_or_dataset_name
from eval import retrieval
from eval.capivara_metrics import metrics
from eval.records import plots
from eval.records.plots import plot_retrieval_sheet, select_sheet_queries
from eval.records.result_files import read_records, write_records_to_result_file
from eval.records.tables import render_retrieval_table
from eval.retrieval import RetrievalEmbeddings, compute_gain_records, compute_retrieval_records

RECORD_FIELDS = {"dataset": "d", "split": "test", "language": "pt", "model": "capivara", "model_folder": "."}


def make_embeddings(seed: int, noise: float) -> RetrievalEmbeddings:
    """Make 40 images with two captions each; a caption's embedding is that of its image plus noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    image_of_text = torch.arange(40).repeat_interleave(2)
    texts = images[image_of_text] + noise * torch.randn(80, 16, generator=generator)
    return RetrievalEmbeddings(torch.nn.functional.normalize(texts, dim=-1), images, image_of_text)


def test_records_of_a_perfect_and_a_random_model():
    perfect = {(r.direction, r.metric): r for r in compute_retrieval_records(make_embeddings(0, 0.0), **RECORD_FIELDS)}
    assert all(r.value == 1 for r in perfect.values())  # both the shares and the median rank
    assert perfect["text_to_image", "recall@5"].n == 80 and perfect["image_to_text", "recall@5"].n == 40
    assert perfect["text_to_image", "recall@5"].chance == pytest.approx(5 / 40)
    assert perfect["image_to_text", "recall@1"].chance == pytest.approx(2 / 80)
    few = RetrievalEmbeddings(torch.eye(8), torch.eye(8), torch.arange(8))
    assert {r.metric for r in compute_retrieval_records(few, **RECORD_FIELDS)} == {
        "recall@1",
        "recall@5",
        "median_rank",
    }, "recall@10 is 1 for any model if there are 8 images"


def test_figures_of_truncated_embeddings_have_their_own_protocol():
    """So no table mixes them with figures of full embeddings."""
    whole = make_embeddings(0, 1.5)
    cut = whole.truncate(4)
    for sides in ((whole.text_embeds, cut.text_embeds), (whole.image_embeds, cut.image_embeds)):
        torch.testing.assert_close(sides[1], torch.nn.functional.normalize(sides[0][:, :4], dim=-1))
    assert whole.truncate(None) is whole and whole.truncate(16) is whole and cut.truncate(2).full_width == 16
    records = [
        *compute_retrieval_records(whole, **RECORD_FIELDS),
        *compute_retrieval_records(cut, **RECORD_FIELDS),
        *compute_gain_records(cut, cut, **RECORD_FIELDS),
    ]
    protocols = {(r.dim, r.protocol.removeprefix(retrieval.RETRIEVAL_PROTOCOL)) for r in records}
    assert protocols == {(None, ""), (4, "; first 4 of 16 dimensions")}
    assert len({r.condition for r in records}) == len(records)
    rows = [line.split("|")[1:4] for line in render_retrieval_table(records).splitlines() if line.startswith("| pt")]
    assert [row[0].strip() for row in rows] == ["pt", "pt", *["pt, first 4 dimensions"] * 2]
    values = [r.value for r in records if (r.direction, r.metric) == ("text_to_image", "recall@1")]
    assert [float(row[2]) for row in rows[::2]] == [round(100 * value, 1) for value in values]
    with pytest.raises(ValueError, match=r"dim .*\b16\b.*\b17\b"):
        whole.truncate(17)


def test_the_gain_is_the_difference_of_mean_recalls():
    before, after = make_embeddings(0, 1.5), make_embeddings(0, 0.3)
    values = [
        {(r.direction, r.metric): r.value for r in compute_retrieval_records(e, **RECORD_FIELDS)}
        for e in (before, after)
    ]
    for record in compute_gain_records(before, after, **RECORD_FIELDS):
        recall_before, recall_after = (recalls[record.direction, "mean_recall"] for recalls in values)
        assert record.value == pytest.approx(recall_after - recall_before)
        low, high = record.interval_95
        assert 0 < low < record.value < high


def test_the_interval_of_a_gain_is_over_images(monkeypatch):
    """Five copies of a caption carry no new information, so the interval stays as wide as with one caption."""
    monkeypatch.setattr(metrics, "paired_bootstrap", partial(metrics.paired_bootstrap, resamples=500))
    widths = []
    for copies in (1, 5):
        before, after = (
            RetrievalEmbeddings(split.text_embeds[::2].repeat_interleave(copies, 0), split.image_embeds,
                                torch.arange(40).repeat_interleave(copies))
            for split in (make_embeddings(0, 1.5), make_embeddings(0, 0.3))
        )  # fmt: skip
        (record,) = (r for r in compute_gain_records(before, after, **RECORD_FIELDS) if r.direction == "text_to_image")
        assert record.n == 40 * copies
        widths.append(record.interval_95[1] - record.interval_95[0])
    assert widths[1] == pytest.approx(widths[0]) and widths[0] > 0.01


def test_a_result_file_keeps_its_records_and_shortens_the_name_of_the_dataset(tmp_path, monkeypatch):
    records = compute_retrieval_records(make_embeddings(0, 1.0), **RECORD_FIELDS)
    metadata = {"fingerprint": "f", "model": "m", "device": "cpu", "precision": "float32", "seconds": 1.0}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "openmoji" / "dataset").mkdir(parents=True)
    for name in ("data/openmoji/dataset", str(tmp_path / "data/openmoji/dataset"), "openmoji/dataset"):
        write_records_to_result_file(tmp_path / "r.json", records, dataset=name, **metadata)
        content = read_json(tmp_path / "r.json")
        assert content["dataset"] == get_publishable_model_or_dataset_name(name) == "openmoji/dataset"
        assert read_records(tmp_path / "r.json") == records
        assert content["schema_version"] == 2 and content["versions"]["torch"] and str(tmp_path) not in str(content)


def test_the_sheet_shows_three_gains_a_tie_and_a_loss_in_random_order():
    before = torch.tensor([5, 5, 0, 3, 9, 1, 4, 2, 8, 7])
    after = torch.tensor([1, 2, 0, 6, 3, 1, 4, 0, 9, 1])
    chosen = select_sheet_queries(before, after, seed=0)
    assert [kind for _, kind in chosen] == ["gain"] * 3 + ["tie", "loss"]
    change = {"gain": -1, "tie": 0, "loss": 1}
    assert all(torch.sign(after[query] - before[query]) == change[kind] for query, kind in chosen)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    gains = [query for query in order if after[query] < before[query]]
    assert [query for query, _ in chosen[:3]] == gains[:3], "the first gains of the random order, not the largest"


def test_a_sheet_shrinks_images_and_survives_a_deleted_file(tmp_path, monkeypatch):
    """The measurement is complete when the sheet is drawn, so it must not be lost."""

    def open_image(index: int) -> Image.Image:
        if index == 3:
            raise BadImage("unreadable image", "it was deleted")
        return Image.new("L", (1200, 900))

    rows = []
    monkeypatch.setattr(plots, "plot_ranked_image_grid", lambda sheet_rows, *_: rows.extend(sheet_rows))
    embeds = torch.eye(6)
    embeddings = {"capivara": RetrievalEmbeddings(embeds, embeds, torch.arange(6))}
    plot_retrieval_sheet(tmp_path / "sheet.png", open_image, list("abcdef"), embeddings)
    images = [image for ((_, ranked_images),) in rows for image, _ in ranked_images]
    assert {(image.mode, *image.size) for image in images if image != "d"} == {("RGB", 400, 300)}
    assert "d" in images, "its caption stands for the deleted image"
