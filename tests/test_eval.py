"""Retrieval task, result records, table and pictures."""

from functools import partial

import pytest
import torch
from PIL import Image

from capivara_common.files import read_json
from capivara_common.image_files import BadImage
from capivara_common.privacy import short_name
from eval import retrieval
from eval.capivara_metrics import metrics
from eval.records import plots
from eval.records.plots import plot_retrieval_sheet, select_sheet_queries
from eval.records.schema import read_records, write_records
from eval.records.tables import render_retrieval_table
from eval.retrieval import RetrievalEmbeddings, compute_gain_records, compute_retrieval_records

FACTS = {"dataset": "d", "split": "test", "language": "pt", "model": "capivara", "model_folder": "."}


def embeddings(seed: int, noise: float) -> RetrievalEmbeddings:
    """40 images with two captions each; the captions are their image plus noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    image_of_text = torch.arange(40).repeat_interleave(2)
    texts = images[image_of_text] + noise * torch.randn(80, 16, generator=generator)
    return RetrievalEmbeddings(torch.nn.functional.normalize(texts, dim=-1), images, image_of_text)


def test_records_of_a_perfect_and_a_random_model():
    perfect = {(r.direction, r.metric): r for r in compute_retrieval_records(embeddings(0, 0.0), **FACTS)}
    assert all(r.value == 1 for r in perfect.values())  # shares, and the median rank
    assert perfect["text_to_image", "recall@5"].n == 80 and perfect["image_to_text", "recall@5"].n == 40
    assert perfect["text_to_image", "recall@5"].chance == pytest.approx(5 / 40)
    assert perfect["image_to_text", "recall@1"].chance == pytest.approx(2 / 80)
    few = RetrievalEmbeddings(torch.eye(8), torch.eye(8), torch.arange(8))
    assert {r.metric for r in compute_retrieval_records(few, **FACTS)} == {"recall@1", "recall@5", "median_rank"}, (
        "10 is sure"
    )


def test_figures_of_several_widths_are_not_one():
    """By protocol, so that no table or series takes them for the same."""
    whole = embeddings(0, 1.5)
    cut = whole.truncate(4)
    for sides in ((whole.text_embeds, cut.text_embeds), (whole.image_embeds, cut.image_embeds)):
        torch.testing.assert_close(sides[1], torch.nn.functional.normalize(sides[0][:, :4], dim=-1))
    assert whole.truncate(None) is whole and whole.truncate(16) is whole and cut.truncate(2).full_width == 16
    records = [
        *compute_retrieval_records(whole, **FACTS),
        *compute_retrieval_records(cut, **FACTS),
        *compute_gain_records(cut, cut, **FACTS),
    ]
    protocols = {(r.dim, r.protocol.removeprefix(retrieval.RETRIEVAL_PROTOCOL)) for r in records}
    assert protocols == {(None, ""), (4, "; first 4 of 16 dimensions")}
    assert len({r.condition for r in records}) == len(records)
    rows = [line.split("|")[1:4] for line in render_retrieval_table(records).splitlines() if line.startswith("| pt")]
    assert [row[0].strip() for row in rows] == ["pt", "pt", *["pt, first 4 dimensions"] * 2]
    values = [r.value for r in records if (r.direction, r.metric) == ("text_to_image", "recall@1")]
    assert [float(row[2]) for row in rows[::2]] == [round(100 * value, 1) for value in values]
    with pytest.raises(ValueError, match="dim must be from 1 to the embedding's width, 16, got 17"):
        whole.truncate(17)


def test_gain_is_the_difference_of_the_records():
    before, after = embeddings(0, 1.5), embeddings(0, 0.3)
    values = [
        {(r.direction, r.metric): r.value for r in compute_retrieval_records(e, **FACTS)} for e in (before, after)
    ]
    for record in compute_gain_records(before, after, **FACTS):
        was, now = (of[record.direction, "mean_recall"] for of in values)
        assert record.value == pytest.approx(now - was)
        low, high = record.interval_95
        assert 0 < low < record.value < high


def test_the_interval_of_a_gain_is_over_images(monkeypatch):
    """Five copies of every caption say nothing new: the interval stays as wide as with one caption per image."""
    monkeypatch.setattr(metrics, "paired_bootstrap", partial(metrics.paired_bootstrap, resamples=500))
    widths = []
    for copies in (1, 5):
        before, after = (
            RetrievalEmbeddings(of.text_embeds[::2].repeat_interleave(copies, 0), of.image_embeds,
                                torch.arange(40).repeat_interleave(copies))
            for of in (embeddings(0, 1.5), embeddings(0, 0.3))
        )  # fmt: skip
        (record,) = (r for r in compute_gain_records(before, after, **FACTS) if r.direction == "text_to_image")
        assert record.n == 40 * copies
        widths.append(record.interval_95[1] - record.interval_95[0])
    assert widths[1] == pytest.approx(widths[0]) and widths[0] > 0.01


def test_records_survive_json_and_call_a_data_set_as_their_header_does(tmp_path, monkeypatch):
    records = compute_retrieval_records(embeddings(0, 1.0), **FACTS)
    facts = {"fingerprint": "f", "model": "m", "device": "cpu", "precision": "float32", "seconds": 1.0}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "openmoji" / "dataset").mkdir(parents=True)
    for name in ("data/openmoji/dataset", str(tmp_path / "data/openmoji/dataset"), "openmoji/dataset"):
        write_records(tmp_path / "r.json", records, dataset=name, **facts)
        content = read_json(tmp_path / "r.json")
        assert content["dataset"] == short_name(name) == "openmoji/dataset"
        assert read_records(tmp_path / "r.json") == records
        assert content["schema_version"] == 2 and content["versions"]["torch"] and str(tmp_path) not in str(content)


def test_the_sheet_shows_gains_a_tie_and_a_loss_by_rule():
    before = torch.tensor([5, 5, 0, 3, 9, 1, 4, 2, 8, 7])
    after = torch.tensor([1, 2, 0, 6, 3, 1, 4, 0, 9, 1])
    chosen = select_sheet_queries(before, after, seed=0)
    assert [kind for _, kind in chosen] == ["gain"] * 3 + ["tie", "loss"]
    change = {"gain": -1, "tie": 0, "loss": 1}
    assert all(torch.sign(after[query] - before[query]) == change[kind] for query, kind in chosen)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    gains = [query for query in order if after[query] < before[query]]
    assert [query for query, _ in chosen[:3]] == gains[:3], "the first of the draw, not the largest"


def test_a_sheet_holds_small_pictures_and_none_of_a_file_that_has_gone(tmp_path, monkeypatch):
    """The measurement is finished by then."""

    def image(index: int) -> Image.Image:
        if index == 3:
            raise BadImage("unreadable image", "it has gone")
        return Image.new("L", (1200, 900))

    rows = []
    monkeypatch.setattr(plots, "plot_gallery", lambda of_sheet, *_: rows.extend(of_sheet))
    embeds = torch.eye(6)
    found = {"capivara": RetrievalEmbeddings(embeds, embeds, torch.arange(6))}
    plot_retrieval_sheet(tmp_path / "sheet.png", image, list("abcdef"), found)
    pictures = [picture for ((_, shown),) in rows for picture, _ in shown]
    assert {(picture.mode, *picture.size) for picture in pictures if picture} == {("RGB", 400, 300)}
    assert None in pictures
