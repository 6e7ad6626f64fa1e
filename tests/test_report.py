"""The report: what is compared with what, what is refused, and the page in a browser."""

import json
import math
import os
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import open_browser
from PIL import Image
from report_results import ATTACK, facts, make_results

from capivara_common.files import read_json, write_json
from capivara_common.image_files import BadImage
from eval import report as report_module
from eval.records.schema import GAIN, Record, write_records
from eval.records.tables import folder_and_seed, pairs_of, records_frame, values_of
from eval.report import main, open_picture, read_folder, tables_of, write_report

PLACE = {"task": "classification", "dataset": "d", "split": "test", "language": "pt", "protocol": "ours"}
PLACE |= {"direction": "", "metric": "accuracy", "value": 0.5, "n": 10}
BASELINE = PLACE | {"model": "baseline", "model_folder": "base"}
MODEL = PLACE | {"model": "capivara", "model_folder": "runs/a"}
TAGS = {"html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "div", "a", "b", "br"}
TAGS |= {"table", "tr", "th", "td", "data", "img", "details", "summary"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    """The report of `results`, written as a user would."""
    output = tmp_path_factory.mktemp("out") / "report"
    main([str(results), "--output", str(output)])
    return output


class Page(HTMLParser):
    """A page's tags, attributes and sources; its table rows as (heading of the section, first cell, numbers)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.sources, self.rows = set(), set(), [], []
        self.heading, self.inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.inside = tag
        if tag == "tr":
            self.rows.append((self.heading, [], []))
        elif tag == "td":
            self.rows[-1][1].append("")
        elif tag == "data":
            self.rows[-1][2].append(float(dict(attrs)["value"]))

    def handle_data(self, data):
        if self.inside == "h2" and data.strip():
            self.heading = data
        elif self.rows and self.rows[-1][1]:
            self.rows[-1][1][-1] += data

    def row(self, heading: str, label: str) -> list[float]:
        """The numbers of the one row with this label below a heading."""
        below = [(cells, numbers) for where, cells, numbers in self.rows if cells and heading in where]
        (found,) = [numbers for cells, numbers in below if cells[0].strip() == label]
        return found


def written(folder: Path, *records: dict, name: str = "r.json", **more) -> Path:
    write_records(folder / name, [Record(**record) for record in records], **facts("d", "m", **more))
    return folder


# --- The page --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_browser(report):
    with open_browser() as opened:
        opened.open_file(report / "index.html")
        page = opened.page
        assert page.title() == "CAPIVARA: evaluation report"
        widths = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert len(widths) == 9 and min(widths) > 0
        assert page.evaluate("[...document.images].every(image => image.alt)")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            style = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
            colour, ground = (int(re.search(r"\d+", value)[0]) for value in style)
            assert (colour > 200 > 50 > ground) if scheme == "dark" else (ground > 200 > 50 > colour)
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                assert not opened.scrolls_sideways(), f"{width} pixels"
        assert page.get_by_text(ATTACK).first.is_visible()
        for link in page.locator("a").all():
            assert page.locator(link.get_attribute("href")).count() == 1
        assert not opened.errors and not opened.refused and not opened.dialogs
        assert all(request.startswith(report.resolve().as_uri()) for request in opened.requests)


@pytest.mark.slow
def test_pictures_lie_beside_the_page(report):
    text = (report / "index.html").read_text(encoding="utf-8")
    files = sorted(path.name for path in report.iterdir())
    shown = {source for source in Page(text).sources if not source.startswith("#")}
    assert sorted({"index.html", *shown}) == files and {Path(name).suffix for name in shown} == {".png", ".jpg"}
    assert len(list(report.glob("*.png"))) == 6 and "Test captions with the pictures found" in text, "bars and curves"
    assert len(list(report.glob("*.jpg"))) == 3 and text.count("Best and worst queries</h3>") == 2
    assert "2 unreadable images of oxford-flower-102" in text and "mean ± standard deviation of 3 seeds" in text
    assert "8.7</data> ± 0.4<" in text and "/home/" not in text, "three seeds of pt"


@pytest.mark.slow
def test_numbers_are_those_of_the_records(results, report):
    """Means, gains, intervals and chance of every figure, against the files by hand."""
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    groups: dict[tuple, dict[str, list]] = {}
    checked = 0
    for path in (path for path in results.rglob("*.json") if "records" in read_json(path)):
        for r in read_json(path)["records"]:
            where = r["dataset"] if r["task"] == "retrieval" else r["protocol"]
            heading = f"{r['task'].replace('_', ' ').capitalize()}, {where}, in {r['language']}, "
            what = r["direction"].replace("_to_", " → ") or r["dataset"]
            if r["metric"] == GAIN:
                row = page.row(heading, f"{what}, seed {r['seed']}")
                assert row == pytest.approx([r["value"], *r["interval_95"]], abs=1e-6)
                checked += 1
            else:
                label = f"{what}, {r['metric'].replace('_', ' ')}"
                of_role = groups.setdefault((heading, label), {"chance": []})
                of_role.setdefault(r["model"], []).append(r["value"])
                of_role["chance"] += [r["chance"]] if r["chance"] is not None and not of_role["chance"] else []
    for place, values in groups.items():
        before, after = (statistics.mean(values[role]) for role in ("baseline", "capivara"))
        assert page.row(*place) == pytest.approx([before, after, after - before, *values["chance"]], abs=1e-6), place
    assert checked == 12 and len(groups) == 25


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
    for name in ("sheet_capivara", "retrieval_pt", "classification/cifar-10_capivara_ours", "run"):
        content = attacked(read_json(results / f"{name}.json"))
        content |= {"model": attack, "skipped": {attack: attack}}
        for record in content.get("records", []):
            record["protocol"] += attack
        write_json(tmp_path / "in" / f"<img src=y>{name.rpartition('/')[2]}.json", content)
    shutil.copyfile(results / "sheet_capivara.queries.png", tmp_path / "in" / "<img src=y>sheet_capivara.queries.png")
    (tmp_path / "in" / "<script>.json").write_text("<script>")
    found = write_report(tmp_path / "in", tmp_path / "out")
    assert len(found.results) == 3 and len(found.runs) == 1 and len(found.faults) == 1
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags <= TAGS and not {name for name in page.attributes if name.startswith("on")}
    assert all(re.fullmatch(r"#table-\d+|\d+\.(png|jpg)", source) for source in page.sources)
    assert text.count("&lt;script&gt;") > 20 and "{{ 7*7 }}" in text


def test_a_report_of_little(tmp_path):
    written(tmp_path, BASELINE)
    main([str(tmp_path), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "50.0" in page and "Best and worst" not in page and "Training" not in page and "Not read" not in page


def test_half_a_character_does_not_end_it(tmp_path):
    write_json(tmp_path / "r.json", {"schema_version": 2, "records": [MODEL | {"dataset": "$d_1^ $"}]})
    text = (tmp_path / "r.json").read_text(encoding="utf-8").replace("$d_1^ $", "$d_1^ $ \\ud800")
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    write_report(tmp_path, tmp_path / "report")
    assert "$d_1^ $ ?" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_gains_alone_are_shown(tmp_path):
    gain = {"task": "retrieval", "direction": "text_to_image", "metric": GAIN, "value": 0.125, "n": 20}
    written(tmp_path, MODEL | gain, MODEL | gain | {"direction": "image_to_text", "interval_95": (0.1, 0.15)})
    write_report(tmp_path, tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.row("Retrieval", "text → image") == [0.125]
    assert page.row("Retrieval", "image → text") == [0.125, 0.1, 0.15]


def test_the_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    written(tmp_path / "in", BASELINE, MODEL)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module, "write_text", full)
    with pytest.raises(SystemExit, match="No space left"):
        main([str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- What is compared ------------------------------------------------------------------------------------------------


def pairs(folder: Path) -> list[dict]:
    frame = records_frame(read_folder(folder).results)
    return pairs_of(values_of(frame[frame["metric"] != GAIN], "folder"))


@pytest.mark.parametrize("differs", ["dataset", "split", "language", "protocol", "direction", "metric"])
def test_only_equal_conditions_are_paired(tmp_path, differs):
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    baseline, model = BASELINE | retrieval, MODEL | retrieval | {"value": 0.75}
    written(tmp_path, baseline, model)
    (pair,) = pairs(tmp_path)
    assert pair["gain"] == 0.25 and not pair["doubts"]
    other = {"direction": "image_to_text", "metric": "recall@5"}.get(differs, "other")
    written(tmp_path, baseline, model | {differs: other})
    apart = pairs(tmp_path)
    assert len(apart) == 2 and all(pair["gain"] is None for pair in apart)


def test_seeds_are_a_mean_and_a_sample_deviation(tmp_path):
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        record = MODEL | {"value": value, "model_folder": f"runs/a/seed-{seed}"}
        written(tmp_path, record, name=f"{seed}.json")
    (pair,) = pairs(tmp_path)
    assert (pair["capivara"].mean, pair["capivara"].deviation) == pytest.approx((0.2, 0.1)) and pair["seeds"] == 3
    written(tmp_path, MODEL | {"value": 0.3, "model_folder": "runs/a/seed-2"}, name="again.json")
    assert pairs(tmp_path)[0]["capivara"].mean == pytest.approx(0.2), "what is repeated is no fourth seed"


@pytest.mark.parametrize(
    ("folder", "seed", "file", "expected"),
    [
        ("seed-1", 1, "results/r.json", ("results", 1)),  # of a run's own results: relative to the run
        (".", 0, "r.json", ("this run", 0)),
        (".", 1, "seed-1/results/r.json", ("this run", 1)),  # a run a seed
        (".", 1, "runs/a/seed-1/results/r.json", ("runs/a", 1)),
        (".", 1, "seed-2/results/r.json", ("seed-2/results", 1)),
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
    found = write_report(tmp_path, tmp_path / "report")
    models = [pair["capivara"] for pair in pairs(tmp_path)]
    assert [(model.folder, model.mean) for model in models] == [("runs/a", 0.5), ("runs/b", 0.6)]
    assert found.faults == [("z.json", "has other figures of d with runs/a; the first ones are shown")]
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.row("Classification", "d, accuracy, runs/b against base") == pytest.approx([0.5, 0.6, 0.1])


def test_other_data_raise_a_doubt(tmp_path):
    written(tmp_path, BASELINE, name="a.json")
    other = facts("d", "m") | {"fingerprint": "other"}
    write_records(tmp_path / "b.json", [Record(**MODEL | {"n": 9})], **other)
    doubts = ["baseline of 10, model of 9 queries or images", "other data: the fingerprints differ"]
    assert pairs(tmp_path)[0]["doubts"] == doubts
    write_report(tmp_path, tmp_path / "report")
    assert all(doubt in (tmp_path / "report" / "index.html").read_text(encoding="utf-8") for doubt in doubts)
    shutil.rmtree(tmp_path / "report")
    written(tmp_path, BASELINE | {"model_folder": "other", "n": 9}, name="c.json")
    assert [(pair["baseline"].folder, pair["capivara"] is None) for pair in pairs(tmp_path)] == [
        ("base", False),
        ("other", False),
    ]
    write_records(tmp_path / "c.json", [Record(**BASELINE | {"model_folder": "other", "n": 9})], **other)
    assert [(pair["baseline"].folder, pair["capivara"] is None) for pair in pairs(tmp_path)] == [
        ("other", False),
        ("base", True),
    ]


def test_tables_stand_apart_and_in_order(tmp_path):
    """Retrieval first, Portuguese before English, cut embeddings apart; data sets of a protocol together."""
    about = {"task": "retrieval", "direction": "text_to_image", "metric": "mean_recall", "n": 20}
    cut = {"dim": 96, "protocol": "ours; first 96 of 384 dimensions"}
    retrieval = [MODEL | about | more for more in ({"language": "en"}, {}, cut)]
    written(tmp_path, MODEL, MODEL | {"dataset": "e"}, MODEL | {"protocol": "authors"}, *retrieval)
    tables = tables_of(records_frame(read_folder(tmp_path).results))
    assert [(t.iloc[0]["task"], t.iloc[0]["language"], t.iloc[0]["dim"], len(t)) for t in tables] == [
        *(("retrieval", "pt", 0, 1), ("retrieval", "pt", 96, 1), ("retrieval", "en", 0, 1)),
        *(("classification", "pt", 0, 1), ("classification", "pt", 0, 2)),
    ]


# --- What is refused -------------------------------------------------------------------------------------------------


def test_summaries_of_the_results_beside_them_are_no_faults(tmp_path):
    written(tmp_path, BASELINE, name="good.json")
    for name, content in (("suite", {"rows": []}), ("real_images", {"records": [MODEL]})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"summary_version": 1, **content}), encoding="utf-8")
    found = read_folder(tmp_path)
    assert [result.name for result in found.results] == ["good.json"] and not found.faults


def test_the_files_of_a_model_are_no_faults(tiny_folder):
    """A run's folder: its results lie below the model, whose configuration is no result."""
    (tiny_folder / "results").mkdir()
    written(tiny_folder / "results", BASELINE, name="good.json")
    (tiny_folder / "results" / "wrong.json").write_text("{}", encoding="utf-8")
    found = read_folder(tiny_folder)
    assert [result.name for result in found.results] == ["results/good.json"]
    assert [name for name, _ in found.faults] == ["results/wrong.json"]


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
    assert found.faults[0][0] == "wrong.json" and reason in found.faults[0][1]


def test_a_result_with_a_gallery_of_before_is_read(tmp_path):
    """Its values are shown; the pictures that earlier versions listed in it are not."""
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    for number, gallery in enumerate((7, [{"query": "um gato", "rank": 1, "right": "../../etc/passwd", "best": []}])):
        folder = written(tmp_path / f"in-{number}", MODEL | retrieval, gallery=gallery)
        found = write_report(folder, tmp_path / f"report-{number}")
        page = (tmp_path / f"report-{number}" / "index.html").read_text(encoding="utf-8")
        assert len(found.results) == 1 and not found.faults and "50.0" in page and "passwd" not in page


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
        with pytest.raises(BadImage, match=r"lies outside|No such"):
            open_picture(folder, inside)
    for inside, message in (
        ("link.png", "lies outside"), ("no.png", "No such"), ("page.png", "is no image"), ("fifo.png", "a pipe"),
        ("a\0b.png", "null"), ("\ud800.png", "surrogates"), ("a" * 300, "too long"),
    ):  # fmt: skip
        with pytest.raises(BadImage, match=message):
            open_picture(folder, inside)
    Image.new("1", (8000, 7000)).save(folder / "large.png")
    with pytest.raises(BadImage, match="absurd image size"):
        open_picture(folder, "large.png")


def test_a_sheet_that_leads_elsewhere_is_stated(tmp_path):
    """The sheet beside a result is a link out of the folder, or no picture."""
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    for name in ("r", "s"):
        written(tmp_path / "in", MODEL | retrieval, name=f"{name}.json")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "in" / "r.queries.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "s.queries.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    found = write_report(tmp_path / "in", tmp_path / "report")
    assert [name for name, _ in found.faults] == ["r.queries.png", "s.queries.png"]
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("not shown</div>") == 2 and not list((tmp_path / "report").glob("*.jpg"))


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
