"""The report: which figures are compared, which files are refused, and the page in a browser."""

import contextlib
import html
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from browser import open_browser
from PIL import Image

from capivara_common.files import read_json, write_json
from eval.records.result_files import GAIN_METRIC, Record, write_records_to_result_file
from eval.records.tables import average_over_seeds, build_records_frame, get_model_folder_and_seed, pair_with_baselines
from eval.report import PAGE_TEMPLATE, main, read_results_folder, write_report

FIELDS = {"task": "classification", "dataset": "d", "split": "test", "language": "pt", "protocol": "ours"}
FIELDS |= {"direction": "", "metric": "accuracy", "value": 0.5, "n": 10}
BASELINE = FIELDS | {"model": "baseline", "model_folder": "base"}
MODEL = FIELDS | {"model": "capivara", "model_folder": "runs/a"}
# HTML tags that the page may have.
TAGS = {"html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "div", "a", "b", "br"}
TAGS |= {"table", "tr", "th", "td", "data", "img", "details", "summary"}

GOLDEN = Path(__file__).parent / "golden"
ATTACK = "<script>alert(1)</script> & um círculo"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Result files of a run with three seeds and of a suite, and of a dataset and files with HTML in their names."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(GOLDEN / "runs/seeds", folder / "seeds", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(GOLDEN / "records/suite", folder / "suite")
    for role in ("baseline", "capivara-0"):
        content = read_json(folder / "suite" / f"flickr30k-pt-pt-{role}.json")
        content |= {"skipped": {"17": "unreadable image: /home/maria/fotos/0017.jpg"}, "skipped_rows": 1}
        content["records"] = [record | {"dataset": ATTACK} for record in content["records"]]
        write_json(folder / f"<img src=y>{role}.json", content)
        shutil.copyfile(folder / "seeds/seed-0/retrieval.png", folder / f"<img src=y>{role}.queries.png")
    return folder


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    """Report of `results`, written by the command."""
    output = tmp_path_factory.mktemp("out") / "report"
    main([str(results), "--output", str(output)])
    return output


def read_row(page: str, heading: str, label: str) -> list[float]:
    """Return the numbers of the only table row below a heading that begins with a label."""
    rows = []
    for section in page.split("<section")[1:]:
        if heading in html.unescape("".join(re.findall(r"<h2>(.*?)</h2>", section))):
            for cells in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL):
                if html.unescape(re.sub("<[^>]*>", "", cells.partition("</td>")[0])).strip() == label:
                    rows.append([float(number) for number in re.findall(r'<data value="(.*?)"', cells)])
    (numbers,) = rows
    return numbers


def find_links(page: str) -> list[str]:
    return re.findall(r'(?:src|href)="(.*?)"', page)


def write_result_file(folder: Path, *records: dict, name: str = "r.json", **other_metadata) -> None:
    metadata = {"dataset": "d", "fingerprint": "f", "model": "m", "device": "cpu", "precision": "float32"}
    write_records_to_result_file(folder / name, [Record(**record) for record in records], **metadata | other_metadata)


def read_page(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


# --- The page --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_is_shown_without_errors_in_a_browser(report):
    with open_browser() as opened:
        opened.open_file(report / "index.html")
        page = opened.page
        assert page.title() == "CAPIVARA: evaluation report"
        widths = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert len(widths) == 13 and min(widths) > 0
        assert page.evaluate("[...document.images].every(image => image.alt)")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            style = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
            color, background = (int(re.search(r"\d+", value)[0]) for value in style)
            assert (color > 200 > 50 > background) if scheme == "dark" else (background > 200 > 50 > color)
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                assert not opened.scrolls_sideways(), f"{width} pixels"
        assert page.get_by_text(ATTACK).first.is_visible()
        for link in page.locator("a").all():
            assert page.locator(link.get_attribute("href")).count() == 1
        assert not opened.errors and not opened.refused and not opened.dialogs
        assert all(request.startswith(report.resolve().as_uri()) for request in opened.requests)


@pytest.mark.slow
def test_images_are_next_to_the_page_and_text_from_data_is_escaped(report):
    text = read_page(report)
    assert set(re.findall(r"<([a-z]\w*)", text)) <= TAGS and not re.search(r"<[^>]*\son\w+\s*=", text)
    assert all(re.fullmatch(r"#table-\d+|\d+\.(png|jpg)", link) for link in find_links(text))
    assert text.count(html.escape(ATTACK)) > 4
    assert not re.search(r"\|\s*safe|%\s*autoescape", PAGE_TEMPLATE.read_text(encoding="utf-8"))
    files = sorted(path.name for path in report.iterdir())
    images = {link for link in find_links(text) if not link.startswith("#")}
    assert sorted({"index.html", *images}) == files and {Path(name).suffix for name in images} == {".png", ".jpg"}
    assert len(list(report.glob("*.png"))) == 8 and text.count("Test captions with the images found") == 3
    assert len(list(report.glob("*.jpg"))) == 5 and text.count("Best and worst queries</h3>") == 2
    assert f"1 unreadable images of {html.escape(ATTACK)}" in text and "mean ± standard deviation of 3 seeds" in text
    assert len(re.findall(r"</data> ± \d+\.\d<", text)) > 20 and "/home/" not in text


@pytest.mark.slow
def test_the_page_shows_the_figures_of_all_records(results, report):
    """Means, gains, intervals and chance levels are computed here from the files."""
    page, checked = read_page(report), 0
    groups: dict[tuple, dict[str, list]] = {}
    for path in (path for path in results.rglob("*.json") if "records" in read_json(path)):
        for r in read_json(path)["records"]:
            table = r["dataset"] if r["task"] == "retrieval" else r["protocol"]
            heading = f"{r['task'].replace('_', ' ').capitalize()}, {table}, in {r['language']}, "
            subject = r["direction"].replace("_to_", " → ") or r["dataset"]
            if r["metric"] == GAIN_METRIC:
                numbers = read_row(page, heading, f"{subject}, seed {r['seed']}")
                assert numbers == pytest.approx([r["value"], *r["interval_95"]], abs=1e-6)
                checked += 1
            else:
                label = f"{subject}, {r['metric'].replace('_', ' ')}"
                group = groups.setdefault((heading, label), {"chance": []})
                group.setdefault(r["model"], []).append(r["value"])
                if r["chance"] is not None and not group["chance"]:
                    group["chance"].append(r["chance"])
    for key, values in groups.items():
        before, after = (statistics.mean(values[role]) for role in ("baseline", "capivara"))
        assert read_row(page, *key) == pytest.approx([before, after, after - before, *values["chance"]], abs=1e-6), key
    assert checked == 12 and len(groups) == 42


# --- Comparisons -----------------------------------------------------------------------------------------------------


def read_pairs(folder: Path) -> list[dict]:
    frame = build_records_frame(read_results_folder(folder).results)
    return pair_with_baselines(average_over_seeds(frame[frame["metric"] != GAIN_METRIC], "folder"))


@pytest.mark.parametrize("differs", ["dataset", "split", "language", "protocol", "direction", "metric"])
def test_figures_of_different_conditions_are_not_paired(tmp_path, differs):
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    other = {differs: {"direction": "image_to_text", "metric": "recall@5"}.get(differs, "other")}
    for changes, gains in (({}, [0.25]), (other, [None, None])):
        write_result_file(tmp_path, BASELINE | retrieval, MODEL | retrieval | {"value": 0.75} | changes)
        assert [pair["gain"] for pair in read_pairs(tmp_path)] == gains


@pytest.mark.parametrize(
    ("folder", "seed", "file", "expected"),
    [
        ("seed-1", 1, "results/r.json", ("results", 1)),  # a run with several seeds names a seed relative to itself
        (".", 1, "runs/a/seed-1/results/r.json", ("runs/a", 1)),  # each seed is a run
        (".", 1, "seed-2/results/r.json", ("seed-2/results", 1)),
        ("runs/a/seed-2", None, "x/r.json", ("runs/a", 2)),  # measured after the run
        ("/home/maria/models/base/", None, "r.json", ("base", None)),
    ],
)
def test_the_folder_and_seed_of_a_model_are_recognized(folder, seed, file, expected):
    assert get_model_folder_and_seed(Record(**MODEL | {"model_folder": folder, "seed": seed}), file) == expected


def test_models_are_kept_apart_and_contradictions_reported(tmp_path):
    write_result_file(tmp_path, BASELINE, MODEL, MODEL | {"model_folder": "runs/b", "value": 0.6})
    write_result_file(tmp_path, MODEL | {"value": 0.7}, name="z.json")
    ((name, reason),) = write_report(tmp_path, tmp_path / "report").faults
    models = [pair["capivara"] for pair in read_pairs(tmp_path)]
    assert [(model.folder, model.mean) for model in models] == [("runs/a", 0.5), ("runs/b", 0.6)]
    assert name == "z.json" and "runs/a" in reason
    page = read_page(tmp_path / "report")
    assert read_row(page, "Classification", "d, accuracy, runs/b against base") == pytest.approx([0.5, 0.6, 0.1])


def test_a_pair_measured_on_different_data_is_marked(tmp_path):
    write_result_file(tmp_path, BASELINE, name="a.json")
    write_result_file(tmp_path, MODEL | {"n": 9}, name="b.json", fingerprint="other")
    size, data = read_pairs(tmp_path)[0]["doubts"]
    assert "10" in size and "9" in size and "fingerprint" in data
    write_report(tmp_path, tmp_path / "report")
    assert all(doubt in read_page(tmp_path / "report") for doubt in (size, data))


# --- Refused files and arguments -------------------------------------------------------------------------------------


INVALID_FILES = {  # text -> part of the reason
    "{": "JSON",
    "[" * 100_000: "nested",
    '{"scores": 1}': "records",
    '{"schema_version": 1, "records": []}': "schema_version must be 2, got 1",
    json.dumps({"schema_version": 2, "records": [MODEL | {"value": 57.2}]}): "records/0/value",
}


def test_invalid_files_are_listed_with_a_reason(tmp_path):
    """JSON files of models, and summaries of results, are ignored."""
    write_result_file(tmp_path / "results", BASELINE, name="good.json")
    for name in ("config.json", "tokenizer.json"):
        write_json(tmp_path / "model" / name, {"a": 1})
    write_json(tmp_path / "suite.json", {"summary_version": 1, "records": [MODEL]})
    for number, text in enumerate(INVALID_FILES):
        (tmp_path / f"invalid-{number}.json").write_text(text, encoding="utf-8")
    content = read_results_folder(tmp_path)
    assert [result.name for result in content.results] == ["results/good.json"]
    for part, (_, reason) in zip(INVALID_FILES.values(), content.faults, strict=True):
        assert part in reason


def test_a_sheet_that_is_a_link_or_no_image_is_not_copied(tmp_path):
    """A transparent image gets a white background."""
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    for name in ("good", "link", "page"):
        write_result_file(tmp_path / "in", MODEL | retrieval, name=f"{name}.json")
    for path in (tmp_path / "secret.png", tmp_path / "in" / "good.queries.png"):
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    (tmp_path / "in" / "link.queries.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "page.queries.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    content = write_report(tmp_path / "in", tmp_path / "report")
    assert [name for name, _ in content.faults] == ["link.queries.png", "page.queries.png"]
    assert read_page(tmp_path / "report").count("not shown</div>") == 2
    (copy,) = (tmp_path / "report").glob("*.jpg")
    assert min(Image.open(copy).getpixel((4, 4))) > 250


def test_invalid_arguments_are_refused_and_change_nothing(tmp_path):
    write_result_file(tmp_path / "in", BASELINE)
    write_json(tmp_path / "out" / "kept.json", {})
    before = sorted(tmp_path.rglob("*"))
    for argument_text, message in (
        ("missing --output new", "missing .*folder"),
        ("out --output new", "out .*result file"),
        ("in --output out", "--overwrite_output_dir"),
        ("in --output . --overwrite_output_dir", "delete"),
    ):
        with contextlib.chdir(tmp_path), pytest.raises(ValueError, match=message):
            main(argument_text.split())
    assert sorted(tmp_path.rglob("*")) == before
