"""A page for people: every result file of a folder in one HTML file, its pictures beside it.

    python -m eval.report results/ --output report/
    python -m eval.report runs/openmoji-pt-001/ --output report/ --overwrite_output_dir

A run's folder holds its `results/` and its `run.json`, which gives the training curves.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import pandas
from PIL import Image

from capivara_common.cli import parse, run_command, user_errors
from capivara_common.files import check_inputs_stay, check_output_folder, whole_folder, write_text
from capivara_common.image_files import BadImage, ImageFiles, decode_image
from capivara_common.links import Bounds
from capivara_common.privacy import hide_paths
from eval.eval_arguments import ReportArguments
from records.frame import compared, means_of, records_frame
from records.plots import BarRow, plot_bars, plot_gains, plot_training_curves
from records.schema import DIRECTIONS, GAIN, SCHEMA_VERSION, TASKS, ResultFile, is_number, parse_result, read_object
from records.tables import one_line, points

TEMPLATE = Path(__file__).parent / "report.html.j2"
SHOWN = 6  # queries of the best, and of the worst
BEST = 5  # pictures of a query
SHEET = "retrieval.png"  # of a run: queries chosen by a rule, with what the base and the trained model find


@dataclass
class Found:
    """What a folder holds, none of which is trusted."""

    folder: Path  # resolved
    results: list[ResultFile] = field(default_factory=list)  # in the order of their names
    runs: list[tuple[str, dict]] = field(default_factory=list)  # (name, content) of every `run.json`
    faults: list[tuple[str, str]] = field(default_factory=list)  # (file, why it, or a part of it, is not shown)
    pictures: dict[str, str | None] = field(default_factory=dict)  # chart, or path inside -> file beside the page


def read_folder(folder: Path) -> Found:
    """Read every JSON file of `folder` and below, hidden ones left out; what can't be read is among the `faults`.

    Raises:
        ValueError: the folder is missing, or holds no result file; the first files that are none are named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that the evaluations wrote their JSON files to.")
    found = Found(folder.resolve())
    for path in sorted(found.folder.rglob("*.json")):
        name = path.relative_to(found.folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        try:
            _read_file(path, name, found)
        except (OSError, ValueError) as error:
            found.faults.append((name, getattr(error, "strerror", None) or str(error)))
    if not found.results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.faults[:3])
        reasons = reasons or "there is no JSON file but those of models"
        raise ValueError(f"{folder} holds no result file of schema version {SCHEMA_VERSION} ({reasons}).")
    return found


def write_report(results: Path, output: Path, overwrite: bool = False) -> Found:
    """Write the report of the folder `results` to the folder `output`, whole or not at all.

    Raises:
        ValueError: there is no result file, or `output` would overwrite something.
        OSError: it can't be written.
    """
    check_output_folder(output, overwrite)
    check_inputs_stay(output, results)
    found = read_folder(results)
    strict = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    with whole_folder(output, overwrite) as folder:
        blocks = [_block(rows, found, folder) for rows in tables_of(records_frame(found.results))]
        runs = [(name, run, _run_pictures(name, run, found, folder)) for name, run in found.runs]
        strict.globals = {"points": points, "copy": lambda inside: _copy(inside, found, folder)}
        strict.globals["line"] = lambda text: one_line(hide_paths(str(text)), 300)
        page = strict.from_string(TEMPLATE.read_text("utf-8")).render(found=found, blocks=blocks, runs=runs)
        # Half a surrogate pair can't be written.
        write_text(folder / "index.html", page.encode("utf-8", "replace").decode())
    return found


def tables_of(frame: pandas.DataFrame) -> list[pandas.DataFrame]:
    """Records that share a table: of retrieval those of a data set, of classification those of all data sets."""
    dataset = frame["dataset"].where(frame["task"] == "retrieval", "")
    order = [frame["task"].map(TASKS.index), frame["language"] != "pt", dataset, "split", "language", "dim", "protocol"]
    return [rows for _, rows in frame.groupby(order)]


def open_picture(folder: Path, inside: str) -> Image.Image:
    """The picture inside of the resolved `folder`, on white; raises BadImage where it may not or can't be shown."""
    image = decode_image({"bytes": None, "path": str(folder / inside)}, ImageFiles(Bounds(folder)))
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")


def _read_file(path: Path, name: str, found: Found) -> None:
    content, _ = read_object(path)
    if "summary_version" in content:
        return  # of a suite or of examples.real_images: the files that it sums up lie beside it
    if "records" in content:
        found.results.append(parse_result(content, name))
    elif "curve" in content:
        _check_curve(content["curve"])
        found.runs.append((name, content))
    elif not (path.parent / "config.json").is_file():  # a model's folder: its configuration and tokenizer
        raise ValueError("holds neither records of a measurement nor the curve of a training run")


def _check_curve(curve: Any) -> None:
    """Raise ValueError unless `curve` has the form that `plot_training_curves` draws."""
    if not isinstance(curve, list) or not any("loss" in point for point in curve if isinstance(point, dict)):
        raise ValueError("has a curve without a step of training")
    for point in curve:
        entry = point if isinstance(point, dict) else {}
        numbers = [entry.get(name) for name in ("step", *(("loss", "learning_rate") if "loss" in entry else ()))]
        if "validation" in entry:
            measured = entry["validation"] if isinstance(entry["validation"], dict) else {}
            numbers += [measured.get(direction) for direction in DIRECTIONS]
        if not all(map(is_number, numbers)):
            raise ValueError(f"has a curve with an entry of another form: {one_line(repr(point), 80)}")


def _block(rows: pandas.DataFrame, found: Found, output: Path) -> dict[str, Any]:
    """Table, charts and queries of the records that belong together, for the template."""
    first, measured = rows.iloc[0], rows[rows["metric"] != GAIN]
    is_retrieval = first["task"] == "retrieval"
    pairs, conflicts = compared(measured)
    found.faults += conflicts
    gains = rows[rows["metric"] == GAIN].to_dict("records")
    several = len({(pair["before"], pair["folder"]) for pair in pairs}) > 1
    own = measured.drop_duplicates("dataset").set_index("dataset")["metric"]  # the metric that a file has first
    drawn = [p for p in pairs if not p["is_rank"] and (is_retrieval or p["metric"] == own[p["dataset"]])]
    means = [] if is_retrieval else means_of(drawn)
    for entry in pairs + means + gains:
        seed = "" if entry.get("seed") is None else f"seed {entry['seed']}"
        what = (
            _words(entry["direction"]) or entry["dataset"],
            seed if entry["metric"] == GAIN else _words(entry["metric"]),
        )
        models = " against ".join(filter(None, (entry["folder"], entry.get("before"))))
        entry["label"] = [", ".join(filter(None, what)), *[models] * several]
        entry["short"] = "\n".join(one_line(line, 28) for line in entry["label"])
    title = [_words(first["task"]).capitalize(), first["dataset"] if is_retrieval else first["protocol"]]
    title += [f"in {first['language']}"] * bool(first["language"]) + [f"split {first['split']}"]
    title = one_line(", ".join(title + [f"first {first['dim']} dimensions"] * bool(first["dim"])), 200)
    bars = [BarRow(p["short"], p["baseline"], p["capivara"], p["chance"]) for p in drawn]
    spans = [(gain["short"], gain["value"], *gain["interval_95"]) for gain in gains if gain["interval_95"]]
    charts = [("bars", plot_bars, bars), ("gains", plot_gains, spans)]
    skipped = measured.groupby("dataset", sort=False)["skipped_rows"].max()
    return {
        "title": title, "language": first["language"], "protocol": first["protocol"],
        "charts": [_draw(f"{kind} {title}", found, output, plot, what) for kind, plot, what in charts if what],
        "main": [p for p in drawn if p["metric"] == "mean_recall"] if is_retrieval else means or drawn,
        "pairs": pairs, "means": means, "gains": gains, "skipped": skipped[skipped > 0].to_dict(),
        "queries": _queries([result for result in found.results if result.name in set(rows["file"])], found),
    }  # fmt: skip


def _run_pictures(name: str, run: dict[str, Any], found: Found, output: Path) -> list[tuple[str | None, str]]:
    """The curves of a run, and the sheet of queries that lies beside its `run.json`."""
    language = str(run["config"].get("language")) if isinstance(run.get("config"), dict) else ""
    words = run["curve"], language if language.isalpha() else "unknown"
    pictures, sheet = (
        [_draw(f"curves {name}", found, output, plot_training_curves, *words)],
        Path(name).with_name(SHEET),
    )
    if (found.folder / sheet).is_file():
        pictures.append((_copy(str(sheet), found, output, 1600), "Test captions with the pictures found for them"))
    return pictures


def _queries(files: list[ResultFile], found: Found) -> list[tuple[str, list[dict[str, Any]]]]:
    """The best and the worst of a model's stored queries; CAPIVARA's where it has some."""
    for file in sorted(files, key=lambda file: file.records[0].model, reverse=True):
        base = PurePosixPath(file.name).parent  # pictures are named relative to the file
        try:
            queries = [
                {"text": str(entry["query"]), "rank": float(entry["rank"]), "right": str(base / entry["right"]),
                 "best": [(str(base / one["image"]), float(one["score"])) for one in entry["best"]][:BEST]}
                for entry in file.content.get("gallery") or []
            ]  # fmt: skip
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            found.faults.append((file.name, f"its gallery has another form and is not shown: {error!r}"))
            continue
        if queries:
            queries, half = sorted(queries, key=lambda query: query["rank"]), min(SHOWN, -(-len(queries) // 2))
            return [("Best", queries[:half]), ("Worst", queries[half:][: -SHOWN - 1 : -1])]
    return []


def _draw(title: str, found: Found, output: Path, plot: Callable, *what: Any) -> tuple[str, str]:
    """File and title of a chart; the file's name is of letters, digits and dashes alone."""
    name = f"{len(found.pictures):03d}-{re.sub(r'[^a-z0-9]+', '-', title.lower())[:60]}.png"
    found.pictures[name] = name
    plot(*what, output / name)
    return name, title


def _copy(inside: str, found: Found, output: Path, side: int = 200) -> str | None:
    """File of a copy, `side` pixels at most, of a picture inside of the folder; None where it can't be shown."""
    if inside not in found.pictures:
        found.pictures[inside] = None
        try:
            image = open_picture(found.folder, inside)
        except BadImage as error:  # its detail may name folders of this machine
            found.faults.append((one_line(inside, 120), f"this picture is not shown: {error.reason}"))
        else:
            found.pictures[inside] = f"{len(found.pictures):03d}.jpg"
            image.thumbnail((side, side))
            image.save(output / found.pictures[inside], quality=85)  # encoded anew: nothing but its pixels gets out
    return found.pictures[inside]


def _words(name: str) -> str:
    return name.replace("_to_", " → ").replace("_", " ")


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command; says what was left out and where the page is."""
    args = parse(ReportArguments, __doc__, argv)
    found = write_report(args.results, args.output, args.overwrite_output_dir)
    for name, reason in found.faults:
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(found.results)} result files, {len(found.runs)} runs: {args.output / 'index.html'}")


if __name__ == "__main__":
    run_command(main)
