"""The report: what is compared with what, what is refused, and the page in a browser."""

import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_browser
from PIL import Image
from report_results import ATTACK, facts, make_results, write_classification

from capivara_common.files import read_json, write_json
from eval.report import main, series_of, write_report
from eval.report_details import class_series, confused_pairs
from eval.report_folder import open_picture, read_folder
from eval.report_sections import blocks_of, headlines, main_pairs, name_parts, protocol_pairs, title_of
from records.schema import Record, write_records
from records.series import folder_and_seed, pairs_of
from records.tables import figure_text

PLACE = {"task": "classification", "dataset": "d", "split": "test", "language": "pt", "protocol": "ours"}
PLACE |= {"direction": "", "metric": "accuracy", "value": 0.5, "n": 10}
BASELINE = PLACE | {"model": "baseline", "model_folder": "base"}
MODEL = PLACE | {"model": "capivara", "model_folder": "runs/a"}
TAGS = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "article", "footer"}
TAGS |= {
    "h1",
    "h2",
    "h3",
    "h4",
    "p",
    "div",
    "span",
    "a",
    "code",
    "br",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "details",
    "summary",
}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    """The report of `results`, written as a user would."""
    output = tmp_path_factory.mktemp("out") / "report"
    main([str(results), "--output", str(output)])
    return output


class Tags(HTMLParser):
    """Tags and attribute names of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.sources = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def written(folder: Path, *records: dict, name: str = "r.json", **more) -> Path:
    write_records(folder / name, [Record(**record) for record in records], facts("d", "m"), **more)
    return folder


# --- The page --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_browser(report):
    with open_browser() as opened:
        opened.open_file(report / "index.html")
        page = opened.page
        assert page.title() == "CAPIVARA: evaluation report"
        widths = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert len(widths) > 100 and min(widths) > 0
        assert page.evaluate("[...document.images].every(image => image.alt)")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert not opened.scrolls_sideways(), f"{width} pixels"
        assert page.get_by_text(ATTACK).first.is_visible()
        for link in page.locator("nav a").all():
            assert page.locator(link.get_attribute("href")).count() == 1
        assert not opened.errors and not opened.refused and not opened.dialogs
        assert {request.split(":")[0] for request in opened.requests} <= {"file", "data"}
        assert sum(request.startswith("file:") for request in opened.requests) == 1


@pytest.mark.slow
def test_pictures_lie_beside_the_page_and_in_it(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    pngs = sorted(path.name for path in report.glob("*.png"))
    assert len(pngs) == 17 and {path.suffix for path in report.iterdir()} == {".png", ".html"}
    assert all(f"<code>{name}</code>" in page for name in pngs)
    assert "text → image".replace(" ", "\u00a0") in page and "8.7 ± 0.4" in page  # three seeds of pt
    assert "2 of cifar-10, 2 of oxford-flower-102" in page and "image file &#39;0017.jpg&#39;" in page
    assert "/home/" not in page
    assert "95 % interval" in page and "Most confused pairs" in page


@pytest.mark.slow
def test_text_from_data_is_text(results, tmp_path):
    """Markup in every text of every file, and in the names of the files."""
    attack = "\"'><img src=x onerror=alert(1)><script>alert(1)</script>{{ 7*7 }}"

    def attacked(value):
        if isinstance(value, dict):
            return {key: entry if key in kept else attacked(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [attacked(entry) for entry in value]
        return value + attack if isinstance(value, str) else value

    kept = {"task", "metric", "model", "direction", "protocol", "image", "right", "language"}
    for name in ("gallery_capivara", "retrieval_pt", "classification/cifar-10_capivara_ours", "run"):
        content = attacked(read_json(results / f"{name}.json"))
        content |= {"model": attack, "skipped": {attack: attack}}
        for record in content.get("records", []):
            record["protocol"] += attack
        write_json(tmp_path / "in" / f"<img src=y>{name.rpartition('/')[2]}.json", content)
    shutil.copytree(results / "gallery_capivara.gallery", tmp_path / "in" / "gallery_capivara.gallery")
    (tmp_path / "in" / "<script>.json").write_text("<script>")
    found = write_report(tmp_path / "in", tmp_path / "out")
    assert len(found.results) == 3 and len(found.runs) == 1 and len(found.unread) == 1 and not found.problems
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.tags <= TAGS and not {name for name in tags.attributes if name.startswith("on")}
    assert all(source.startswith(("data:image/", "#")) for source in tags.sources)
    assert page.count("&lt;script&gt;") > 20 and "{{ 7*7 }}" in page


def test_a_report_of_little(tmp_path):
    written(tmp_path, BASELINE)
    main([str(tmp_path), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "50.0" in page and 'id="gallery"' not in page and 'id="training"' not in page


def test_half_a_character_does_not_end_it(tmp_path):
    write_json(tmp_path / "r.json", {"schema_version": 2, "records": [MODEL | {"dataset": "$d_1^ $"}]})
    text = (tmp_path / "r.json").read_text(encoding="utf-8").replace("$d_1^ $", "$d_1^ $ \\ud800")
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    write_report(tmp_path, tmp_path / "report")
    assert "$d_1^ $ ?" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


# --- What is compared ------------------------------------------------------------------------------------------------


def pairs(folder: Path):
    return pairs_of(series_of(read_folder(folder)))


@pytest.mark.parametrize("differs", ["dataset", "split", "language", "protocol", "direction", "metric"])
def test_only_equal_conditions_are_paired(tmp_path, differs):
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    baseline, model = BASELINE | retrieval, MODEL | retrieval | {"value": 0.75}
    written(tmp_path, baseline, model)
    (pair,) = pairs(tmp_path)
    assert pair.difference == 0.25 and not pair.doubts
    other = {"direction": "image_to_text", "metric": "recall@5"}.get(differs, "other")
    written(tmp_path, baseline, model | {differs: other})
    apart = pairs(tmp_path)
    assert len(apart) == 2 and all(pair.difference is None for pair in apart)


def test_seeds_are_a_mean_and_a_sample_deviation(tmp_path):
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        record = MODEL | {"value": value, "model_folder": f"runs/a/seed-{seed}"}
        written(tmp_path, record, name=f"{seed}.json")
    (pair,) = pairs(tmp_path)
    assert pair.model.values == [0.1, 0.2, 0.3] and pair.model.deviation == pytest.approx(0.1)
    assert figure_text(pair.model) == "20.0 ± 10.0"


@pytest.mark.parametrize(
    ("folder", "seed", "file", "expected"),
    [
        ("seed-1", 1, "results/r.json", ("results", 1)),  # of a run's own results: relative to the run
        (".", 0, "r.json", ("this run", 0)),
        ("runs/a/seed-2", None, "x/r.json", ("runs/a", 2)),  # measured afterwards
        ("runs/a/seed-2", 2, "x/r.json", ("runs/a", 2)),
        ("/home/maria/models/base/", None, "r.json", ("base", None)),
    ],
)
def test_whose_figure_it_is(folder, seed, file, expected):
    record = Record(**MODEL | {"model_folder": folder, "seed": seed})
    assert folder_and_seed(record, file) == expected


def test_two_models_stay_apart_and_a_contradiction_is_stated(tmp_path):
    written(tmp_path, BASELINE, MODEL, MODEL | {"model_folder": "runs/b", "value": 0.6})
    written(tmp_path, MODEL | {"value": 0.7}, name="z.json")
    found = read_folder(tmp_path)
    both = pairs_of(series_of(found))
    assert [(pair.model.folder, pair.model.mean) for pair in both] == [("runs/a", 0.5), ("runs/b", 0.6)]
    assert found.problems[0][0] == "z.json" and "other figures of d with runs/a" in found.problems[0][1]


def test_other_data_raise_a_doubt(tmp_path):
    written(tmp_path, BASELINE, name="a.json")
    other = facts("d", "m") | {"dataset_fingerprint": "other"}
    write_records(tmp_path / "b.json", [Record(**MODEL | {"n": 9})], other)
    assert pairs(tmp_path)[0].doubts == [
        "baseline of 10, model of 9 queries or images",
        "other data: the fingerprints differ",
    ]
    written(tmp_path, BASELINE | {"model_folder": "other", "n": 9}, name="c.json")
    assert [(pair.baseline.folder, pair.model is None) for pair in pairs(tmp_path)] == [
        ("base", False),
        ("other", False),
    ]
    write_records(tmp_path / "c.json", [Record(**BASELINE | {"model_folder": "other", "n": 9})], other)
    assert [(pair.baseline.folder, pair.model is None) for pair in pairs(tmp_path)] == [
        ("other", False),
        ("base", True),
    ]


def test_shares_are_drawn_and_of_a_data_set_its_own_metric(results):
    block = [pair for pair in pairs(results) if pair.condition.dataset == "formas"]
    (rank,) = [pair for pair in block if pair.is_rank]
    assert rank not in main_pairs(block) and rank.difference == -2 and figure_text(rank.model) == "rank 2"
    block = [pair for pair in pairs(results) if pair.condition.task == "classification"]
    assert {pair.condition.metric for pair in main_pairs(block)} == {"accuracy"}


def test_figures_of_cut_embeddings_have_a_block_of_their_own(tmp_path):
    about = {"task": "retrieval", "direction": "text_to_image", "metric": "mean_recall", "n": 20}
    cut = {"dim": 96, "protocol": "ours; first 96 of 384 dimensions"}
    written(tmp_path, *(model | about | width for model in (BASELINE, MODEL) for width in ({}, cut)))
    blocks = blocks_of(pairs(tmp_path))
    titles = [title_of(block[0].condition) for block in blocks]
    assert len(titles) == 2 and titles[1] == f"{titles[0]}, first 96 dimensions"
    assert len({tuple(name_parts(block[0].condition)) for block in blocks}) == 2, "pictures of one name"
    assert len(headlines(pairs(tmp_path))) == 1, "the whole alone"


def test_authors_against_ours_on_the_same_model(results):
    rows = protocol_pairs(series_of(read_folder(results)))
    assert {(ours.condition.metric, ours.role) for _, ours in rows} == {
        (metric, role) for metric in ("accuracy", "top_5_accuracy") for role in ("baseline", "capivara")
    }
    for authors, ours in rows:
        assert (authors.role, authors.folder) == (ours.role, ours.folder)


def test_seeds_share_a_confusion_matrix(tmp_path):
    dice = np.random.default_rng(0)
    for seed in (0, 1):
        path = tmp_path / f"{seed}.json"
        write_classification(path, "cifar-10", "capivara", "ours", 0, dice)
        content = read_json(path)
        for record in content["records"]:
            record["model_folder"] = f"runs/a/seed-{seed}"
        write_json(path, content)
    found = read_folder(tmp_path)
    ((series,),), (first, second) = class_series(found).values(), found.classes.values()
    assert torch.equal(series.confusion, first.confusion + second.confusion)
    assert series.accuracies[0] is None and series.accuracies[3] == (first.accuracies[3] + second.accuracies[3]) / 2


def test_confused_pairs():
    confusion = torch.tensor([[5, 0, 2], [9, 1, 0], [0, 0, 7]])
    assert confused_pairs(confusion, 5) == [(1, 0), (0, 2)]
    assert confused_pairs(confusion, 1) == [(1, 0)]


# --- What is refused -------------------------------------------------------------------------------------------------


def test_summaries_of_the_results_beside_them_are_no_faults(tmp_path):
    written(tmp_path, BASELINE, name="good.json")
    for name, content in (("suite", {"rows": []}), ("real_images", {"records": [MODEL]})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"summary_version": 1, **content}), encoding="utf-8")
    found = read_folder(tmp_path)
    assert [result.name for result in found.results] == ["good.json"] and not found.unread


def test_the_files_of_a_model_are_no_faults(tiny_folder):
    """A run's folder: its results lie below the model, whose configuration is no result."""
    (tiny_folder / "results").mkdir()
    written(tiny_folder / "results", BASELINE, name="good.json")
    (tiny_folder / "results" / "wrong.json").write_text("{}", encoding="utf-8")
    found = read_folder(tiny_folder)
    assert [result.name for result in found.results] == ["results/good.json"]
    assert [name for name, _ in found.unread] == ["results/wrong.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "nests too deep"),
        ('{"scores": 1}', "holds neither records"),
        ('{"curve": [{"step": 1}]}', "curve without a step of training"),
        ('{"curve": [{"step": 1, "loss": "low", "learning_rate": 1}]}', "an entry of another form"),
        ('{"schema_version": 1, "records": []}', "schema_version must be 2, got 1: measure it again"),
        ('{"schema_version": 2, "records": []}', "records must be a list of at least one"),
        ({"value": 57.2}, "records/0/value must be a share from 0 to 1, got 57.2 for accuracy"),
        ({"value": math.nan}, "it holds NaN"),
        ({"value": 10**400}, "records/0/value must be a finite number, got 1000"),
        ({"value": True}, "records/0/value must be a finite number, got True"),
        ({"metric": "median_rank"}, "records/0/metric must be one of classification"),
        ({"model": "clip"}, "records/0/model must be one of baseline, capivara"),
        ({"dataset": ["d"]}, "records/0/dataset must be text, got ['d']"),
        ({"interval_95": [0.1]}, "records/0/interval_95 must be two numbers"),
        ({"n": None}, "records/0/n must be a finite number, got None"),
    ],
)
def test_a_wrong_file_is_named_with_its_reason(tmp_path, content, reason):
    written(tmp_path, BASELINE, name="good.json")
    if isinstance(content, dict):
        content = json.dumps({"schema_version": 2, "records": [MODEL | content]})
    (tmp_path / "wrong.json").write_text(content, encoding="utf-8")
    found = read_folder(tmp_path)
    assert [result.name for result in found.results] == ["good.json"]
    assert found.unread[0][0] == "wrong.json" and reason in found.unread[0][1]


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("per_class_accuracy", [0.5], "an accuracy from 0 to 1, or null, is needed for each of 10"),
        ("confusion_matrix", [[1, 2], [3, 4]], "10 x 10"),
        ("classes", None, "list of names"),
        ("gallery", [{"query": "um gato", "rank": 0, "right": "a.jpg", "best": []}], "a rank from 1"),
        ("gallery", ["um gato"], "gallery has another form"),
    ],
)
def test_a_wrong_part_leaves_the_figures(tmp_path, part, value, reason):
    path = tmp_path / "r.json"
    write_classification(path, "cifar-10", "capivara", "ours", 0, np.random.default_rng(0))
    write_json(path, read_json(path) | {part: value})
    found = read_folder(tmp_path)
    assert len(found.results[0].records) == 2 and reason in found.problems[0][1]


def test_pictures_stay_in_the_folder(tmp_path):
    folder = (tmp_path / "in").resolve()
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "good.png"):
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "page.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    Image.new("RGB", (8, 8)).save(folder / "other.gif")
    assert open_picture(folder, "good.png").getpixel((0, 0)) == (255, 255, 255)
    os.mkfifo(folder / "fifo.png")
    for inside in ("../secret.png", "a/../../secret.png", str(tmp_path / "secret.png"), "..\\secret.png", "hf://a/b"):
        with pytest.raises(ValueError, match="leads out"):
            open_picture(folder, inside)
    for inside, message in (
        ("link.png", "lies outside"), ("no.png", "No such"), ("page.png", "is no image"), ("fifo.png", "a pipe")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_picture(folder, inside)
    Image.new("1", (8000, 7000)).save(folder / "large.png")
    with pytest.raises(ValueError, match="absurd image size"):
        open_picture(folder, "large.png")


def test_a_missing_picture_is_stated(tmp_path):
    best = [{"image": "../../etc/passwd", "score": 0.5}]
    gallery = [{"query": "um gato", "rank": 2, "right": "g/1.jpg", "best": best}]
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    written(tmp_path / "in", MODEL | retrieval, gallery=gallery)
    found = write_report(tmp_path / "in", tmp_path / "report")
    assert {name for name, _ in found.problems} == {"../../etc/passwd", "g/1.jpg"}
    assert "not shown" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", ["missing", "empty", "no results", "filled output", "output above", "unknown flag"])
def test_slips_end_in_a_line(tmp_path, case):
    folder, output, flags = tmp_path / "in", tmp_path / "out", []
    folder.mkdir()
    message = {"missing": "no folder", "empty": "there is no JSON", "no results": "a.json: holds neither"}.get(case)
    if case == "missing":
        folder.rmdir()
    elif case == "no results":
        write_json(folder / "a.json", {})
    elif not message:
        written(folder, BASELINE)
    if case == "filled output":
        write_json(output / "kept.json", {})
        message = "not empty.*--overwrite_output_dir"
    elif case == "output above":
        output, flags, message = tmp_path, ["--overwrite_output_dir"], "would be replaced"
    elif case == "unknown flag":
        flags, message = ["--colour"], "--colour"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=rf"error: .*{message}"):
        main([str(folder), "--output", str(output), *flags])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_can_be_replaced(tmp_path):
    written(tmp_path / "in", BASELINE)
    write_json(tmp_path / "out" / "old.png", {})
    main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--overwrite_output_dir"])
    assert not (tmp_path / "out" / "old.png").exists() and (tmp_path / "out" / "index.html").exists()
