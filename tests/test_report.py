"""The report: what is compared with what, what is refused, and the page in a browser."""

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
from eval.records.schema import GAIN_METRIC, Record, write_records
from eval.records.tables import average_over_seeds, build_records_frame, get_folder_and_seed, pair_with_baselines
from eval.report import PAGE_TEMPLATE, main, read_results_folder, write_report

PLACE = {"task": "classification", "dataset": "d", "split": "test", "language": "pt", "protocol": "ours"}
PLACE |= {"direction": "", "metric": "accuracy", "value": 0.5, "n": 10}
BASELINE = PLACE | {"model": "baseline", "model_folder": "base"}
MODEL = PLACE | {"model": "capivara", "model_folder": "runs/a"}
TAGS = {"html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "div", "a", "b", "br"}
TAGS |= {"table", "tr", "th", "td", "data", "img", "details", "summary"}


GOLDEN = Path(__file__).parent / "golden"
ATTACK = "<script>alert(1)</script> & um círculo"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What a run of three seeds and a suite have written; a data set and files of odd names, with sheets of queries."""
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
    """The report of `results`, written as a user would."""
    output = tmp_path_factory.mktemp("out") / "report"
    main([str(results), "--output", str(output)])
    return output


def row(page: str, heading: str, label: str) -> list[float]:
    """The numbers of the one row of a page that begins with a label, below a heading."""
    found = []
    for section in page.split("<section")[1:]:
        if heading in html.unescape("".join(re.findall(r"<h2>(.*?)</h2>", section))):
            for cells in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL):
                if html.unescape(re.sub("<[^>]*>", "", cells.partition("</td>")[0])).strip() == label:
                    found.append([float(number) for number in re.findall(r'<data value="(.*?)"', cells)])
    (numbers,) = found
    return numbers


def sources(page: str) -> list[str]:
    return re.findall(r'(?:src|href)="(.*?)"', page)


def facts(**more) -> dict:
    return {"dataset": "d", "fingerprint": "f", "model": "m", "device": "cpu", "precision": "float32"} | more


def written(folder: Path, *records: dict, name: str = "r.json", **more) -> Path:
    write_records(folder / name, [Record(**record) for record in records], **facts(**more))
    return folder


def page_of(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


# --- The page --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_browser(report):
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
def test_pictures_lie_beside_the_page_and_text_from_data_is_text(report):
    text = page_of(report)
    assert set(re.findall(r"<([a-z]\w*)", text)) <= TAGS and not re.search(r"<[^>]*\son\w+\s*=", text)
    assert all(re.fullmatch(r"#table-\d+|\d+\.(png|jpg)", source) for source in sources(text))
    assert text.count(html.escape(ATTACK)) > 4
    assert not re.search(r"\|\s*safe|%\s*autoescape", PAGE_TEMPLATE.read_text(encoding="utf-8"))
    files = sorted(path.name for path in report.iterdir())
    shown = {source for source in sources(text) if not source.startswith("#")}
    assert sorted({"index.html", *shown}) == files and {Path(name).suffix for name in shown} == {".png", ".jpg"}
    assert len(list(report.glob("*.png"))) == 8 and text.count("Test captions with the pictures found") == 3
    assert len(list(report.glob("*.jpg"))) == 5 and text.count("Best and worst queries</h3>") == 2
    assert f"1 unreadable images of {html.escape(ATTACK)}" in text and "mean ± standard deviation of 3 seeds" in text
    assert len(re.findall(r"</data> ± \d+\.\d<", text)) > 20 and "/home/" not in text


@pytest.mark.slow
def test_numbers_are_those_of_the_records(results, report):
    """Means, gains, intervals and chance of every figure, against the files by hand."""
    page, checked = page_of(report), 0
    groups: dict[tuple, dict[str, list]] = {}
    for path in (path for path in results.rglob("*.json") if "records" in read_json(path)):
        for r in read_json(path)["records"]:
            where = r["dataset"] if r["task"] == "retrieval" else r["protocol"]
            heading = f"{r['task'].replace('_', ' ').capitalize()}, {where}, in {r['language']}, "
            what = r["direction"].replace("_to_", " → ") or r["dataset"]
            if r["metric"] == GAIN_METRIC:
                numbers = row(page, heading, f"{what}, seed {r['seed']}")
                assert numbers == pytest.approx([r["value"], *r["interval_95"]], abs=1e-6)
                checked += 1
            else:
                label = f"{what}, {r['metric'].replace('_', ' ')}"
                of_role = groups.setdefault((heading, label), {"chance": []})
                of_role.setdefault(r["model"], []).append(r["value"])
                of_role["chance"] += [r["chance"]] if r["chance"] is not None and not of_role["chance"] else []
    for place, values in groups.items():
        before, after = (statistics.mean(values[role]) for role in ("baseline", "capivara"))
        assert row(page, *place) == pytest.approx([before, after, after - before, *values["chance"]], abs=1e-6), place
    assert checked == 12 and len(groups) == 42


# --- What is compared ------------------------------------------------------------------------------------------------


def pairs(folder: Path) -> list[dict]:
    frame = build_records_frame(read_results_folder(folder).results)
    return pair_with_baselines(average_over_seeds(frame[frame["metric"] != GAIN_METRIC], "folder"))


@pytest.mark.parametrize("differs", ["dataset", "split", "language", "protocol", "direction", "metric"])
def test_only_equal_conditions_are_paired(tmp_path, differs):
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    other = {differs: {"direction": "image_to_text", "metric": "recall@5"}.get(differs, "other")}
    for more, gains in (({}, [0.25]), (other, [None, None])):
        written(tmp_path, BASELINE | retrieval, MODEL | retrieval | {"value": 0.75} | more)
        assert [pair["gain"] for pair in pairs(tmp_path)] == gains


@pytest.mark.parametrize(
    ("folder", "seed", "file", "expected"),
    [
        ("seed-1", 1, "results/r.json", ("results", 1)),  # of a run's own results: relative to the run
        (".", 1, "runs/a/seed-1/results/r.json", ("runs/a", 1)),  # a run a seed
        (".", 1, "seed-2/results/r.json", ("seed-2/results", 1)),
        ("runs/a/seed-2", None, "x/r.json", ("runs/a", 2)),  # measured afterwards
        ("/home/maria/models/base/", None, "r.json", ("base", None)),
    ],
)
def test_whose_figure_it_is(folder, seed, file, expected):
    assert get_folder_and_seed(Record(**MODEL | {"model_folder": folder, "seed": seed}), file) == expected


def test_two_models_stay_apart_and_a_contradiction_is_stated(tmp_path):
    written(tmp_path, BASELINE, MODEL, MODEL | {"model_folder": "runs/b", "value": 0.6})
    written(tmp_path, MODEL | {"value": 0.7}, name="z.json")
    found = write_report(tmp_path, tmp_path / "report")
    models = [pair["capivara"] for pair in pairs(tmp_path)]
    assert [(model.folder, model.mean) for model in models] == [("runs/a", 0.5), ("runs/b", 0.6)]
    assert found.faults == [("z.json", "has other figures of d with runs/a; the first ones are shown")]
    page = page_of(tmp_path / "report")
    assert row(page, "Classification", "d, accuracy, runs/b against base") == pytest.approx([0.5, 0.6, 0.1])


def test_other_data_raise_a_doubt(tmp_path):
    written(tmp_path, BASELINE, name="a.json")
    written(tmp_path, MODEL | {"n": 9}, name="b.json", fingerprint="other")
    doubts = ["baseline of 10, model of 9 queries or images", "other data: the fingerprints differ"]
    assert pairs(tmp_path)[0]["doubts"] == doubts
    write_report(tmp_path, tmp_path / "report")
    assert all(doubt in page_of(tmp_path / "report") for doubt in doubts)


# --- What is refused -------------------------------------------------------------------------------------------------


WRONG = {
    "{": "is no JSON",
    "[" * 100_000: "nests too deep",
    '{"scores": 1}': "holds neither records",
    '{"schema_version": 1, "records": []}': "schema_version must be 2, got 1: measure it again",
    json.dumps({"schema_version": 2, "records": [MODEL | {"value": 57.2}]}): "records/0/value must be a share from 0",
}


def test_what_is_no_result_is_named_with_its_reason(tmp_path):
    """But for the files of a model, and summaries of the results beside them."""
    written(tmp_path / "results", BASELINE, name="good.json")
    for name in ("config.json", "tokenizer.json"):
        write_json(tmp_path / "model" / name, {"a": 1})
    write_json(tmp_path / "suite.json", {"summary_version": 1, "records": [MODEL]})
    for number, text in enumerate(WRONG):
        (tmp_path / f"wrong-{number}.json").write_text(text, encoding="utf-8")
    found = read_results_folder(tmp_path)
    assert [result.name for result in found.results] == ["results/good.json"] and len(found.faults) == len(WRONG)
    assert all(reason in said for reason, (_, said) in zip(WRONG.values(), found.faults, strict=True))


def test_a_sheet_that_leads_elsewhere_is_stated(tmp_path):
    """It is a link out of the folder, or no picture; one that is transparent stands on white."""
    retrieval = {"task": "retrieval", "direction": "text_to_image", "metric": "recall@1"}
    for name in ("good", "link", "page"):
        written(tmp_path / "in", MODEL | retrieval, name=f"{name}.json")
    for path in (tmp_path / "secret.png", tmp_path / "in" / "good.queries.png"):
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    (tmp_path / "in" / "link.queries.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "page.queries.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    found = write_report(tmp_path / "in", tmp_path / "report")
    assert [name for name, _ in found.faults] == ["link.queries.png", "page.queries.png"]
    assert page_of(tmp_path / "report").count("not shown</div>") == 2
    (copy,) = (tmp_path / "report").glob("*.jpg")
    assert min(Image.open(copy).getpixel((4, 4))) > 250


def test_slips_end_in_a_line(tmp_path):
    written(tmp_path / "in", BASELINE)
    write_json(tmp_path / "out" / "kept.json", {})
    before = sorted(tmp_path.rglob("*"))
    for words, message in (
        ("missing --output new", "missing is no folder"),
        ("out --output new", "holds no result file"),
        ("in --output out", "not empty.*--overwrite_output_dir"),
        ("in --output . --overwrite_output_dir", "would be replaced"),
    ):
        with contextlib.chdir(tmp_path), pytest.raises(ValueError, match=message):
            main(words.split())
    assert sorted(tmp_path.rglob("*")) == before
