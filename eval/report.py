"""A page for people: every result file of a folder in one HTML file, its pictures beside it.

    python -m eval.report results/ --output report/
    python -m eval.report runs/openmoji-pt-001/ --output report/ --overwrite_output_dir

A run's folder holds its `results/` and its `run.json`, which gives the training curves.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
from PIL import Image

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import AllowedFolders, atomic_folder, check_inputs_outside, check_output_folder
from capivara_common.image_files import BadImage, ImageAccess, decode_image
from capivara_common.privacy import hide_paths
from eval.benchmarks import get_published_base
from eval.records.plots import plot_bars, plot_training_curves
from eval.records.schema import (
    GAIN_METRIC,
    SCHEMA_VERSION,
    TASKS,
    ResultFile,
    parse_result,
    read_json_object,
)
from eval.records.tables import (
    average_over_seeds,
    build_records_frame,
    find_conflicts,
    format_points,
    pair_with_baselines,
    to_one_line,
    write_html_page,
)

PAGE_TEMPLATE = Path(__file__).parent / "report.html.j2"
RUN_SHEET_FILE = "retrieval.png"  # of a run: queries chosen by a rule, with what the base and the trained model find
QUERY_SHEET_SUFFIX = ".queries.png"  # in place of `.json`: the best and worst queries, as `eval.retrieval` draws them
REPORT_TOLERANCE = 5e-4  # a difference that no table shows: of two runs on different devices, say


@dataclass
class ReportArguments:
    """Arguments of `eval.report`."""

    results: Path = flag(..., "Folder of result files, those of folders in it too.", positional=True)
    output: Path = flag(..., "Folder of the report: index.html and PNGs. Must be missing or empty.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")


@dataclass
class ResultsFolder:
    """What a folder holds, none of which is trusted."""

    folder: Path  # resolved
    results: list[ResultFile] = field(default_factory=list)  # in the order of their names
    runs: list[tuple[str, dict]] = field(default_factory=list)  # (name, content) of every `run.json`
    faults: list[tuple[str, str]] = field(default_factory=list)  # (file, why it, or a part of it, is not shown)
    image_count: int = 0  # beside the page


def read_results_folder(folder: Path) -> ResultsFolder:
    """Read every JSON file of `folder` and below, but for hidden ones and unfinished runs, `….partial`.

    What can't be read is among the `faults`. ValueError where there is no folder, or no result file in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that the evaluations wrote their JSON files to.")
    found = ResultsFolder(folder.resolve())
    for path in sorted(found.folder.rglob("*.json")):
        name = path.relative_to(found.folder).as_posix()
        if any(part.startswith(".") or part.endswith(".partial") for part in name.split("/")):
            continue
        try:
            content, _ = read_json_object(path)
            if "summary_version" in content:
                continue  # of a suite or of examples.real_images: the files that it sums up lie beside it
            if "records" in content:
                found.results.append(parse_result(content, name))
            elif "curve" in content:
                found.runs.append((name, content))
            elif not (path.parent / "config.json").is_file():  # a model's folder: its configuration and tokenizer
                raise ValueError("holds neither records of a measurement nor the curve of a training run")
        except (OSError, ValueError) as error:
            found.faults.append((name, getattr(error, "strerror", None) or str(error)))
    if not found.results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.faults[:3])
        reasons = reasons or "there is no JSON file but those of models"
        raise ValueError(f"{folder} holds no result file of schema version {SCHEMA_VERSION} ({reasons}).")
    return found


def write_report(results: Path, output: Path, overwrite: bool = False) -> ResultsFolder:
    """Write the report of the folder `results` to the folder `output`, whole or not at all.

    ValueError where there is no result file, or `output` would overwrite something.
    """
    check_output_folder(output, overwrite)
    check_inputs_outside(output, results)
    found = read_results_folder(results)
    with atomic_folder(output, overwrite) as folder:
        blocks = [_build_block(rows, found, folder) for rows in group_into_tables(build_records_frame(found.results))]
        runs = []
        for name, run in found.runs:
            try:
                curve = plot_training_curves, run["curve"], run["config"]["language"]
                curves = _draw_chart(f"curves {name}", found, folder, *curve)
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                found.faults.append((name, f"has a curve of another form: {to_one_line(repr(error), 80)}"))
                continue
            sheets, title = [Path(name).with_name(RUN_SHEET_FILE)], "Test captions with the pictures found for them"
            runs.append((name, run, [curves, *_copy_images(sheets, title, found, folder)]))
        values = {"found": found, "blocks": blocks, "runs": runs, "points": format_points, "line": _to_safe_line}
        write_html_page(PAGE_TEMPLATE, folder / "index.html", **values)
    return found


def group_into_tables(frame: pandas.DataFrame) -> list[pandas.DataFrame]:
    """Records that share a table: of retrieval those of a data set, of classification those of all data sets."""
    dataset = frame["dataset"].where(frame["task"] == "retrieval", "")
    order = [frame["task"].map(TASKS.index), frame["language"] != "pt", dataset, "split", "language", "dim", "protocol"]
    return [rows for _, rows in frame.groupby(order)]


def _build_block(rows: pandas.DataFrame, results_folder: ResultsFolder, output: Path) -> dict[str, Any]:
    """Table, bars and pictures of the records that belong together, for the template."""
    first, measured = rows.iloc[0], rows[rows["metric"] != GAIN_METRIC]
    is_retrieval = first["task"] == "retrieval"
    for row in (
        find_conflicts(measured, "folder", REPORT_TOLERANCE).drop_duplicates(["name", "dataset", "folder"]).itertuples()
    ):
        fault = f"has other figures of {row.dataset} with {row.folder}; the first ones are shown"
        results_folder.faults.append((row.name, fault))
    pairs, gains = (
        pair_with_baselines(average_over_seeds(measured, "folder")),
        rows[rows["metric"] == GAIN_METRIC].to_dict("records"),
    )
    for pair in pairs:
        pair["published"] = get_published_base(pair)
        pair["models"] = " against ".join(pair[role].folder for role in ("capivara", "baseline") if pair[role])
    own = measured.drop_duplicates("dataset").set_index("dataset")["metric"]  # the metric that a file has first
    drawn = [p for p in pairs if not p["is_rank"] and (is_retrieval or p["metric"] == own[p["dataset"]])]
    several = len({pair["models"] for pair in pairs}) > 1
    for entry in pairs + gains:
        what = [_to_words(entry["direction"]) or entry["dataset"], _to_words(entry["metric"])]
        if entry["metric"] == GAIN_METRIC:
            what[1] = "" if entry["seed"] is None else f"seed {entry['seed']}"
        entry["label"] = [", ".join(filter(None, what)), *[entry.get("models", entry.get("folder"))] * several]
        entry["short"] = "\n".join(to_one_line(line, 28) for line in entry["label"])
    title = [_to_words(first["task"]).capitalize(), first["dataset"] if is_retrieval else first["protocol"]]
    title += [f"in {first['language']}"] * bool(first["language"]) + [f"split {first['split']}"]
    title = to_one_line(", ".join(title + [f"first {first['dim']} dimensions"] * bool(first["dim"])), 200)
    sheets = [Path(name).with_suffix(QUERY_SHEET_SUFFIX) for name in dict.fromkeys(rows["name"])]
    skipped = measured.groupby("dataset", sort=False)["skipped_rows"].max()
    return {
        "title": title, "protocol": first["protocol"], "pairs": pairs, "gains": gains,
        "charts": [_draw_chart(f"bars {title}", results_folder, output, plot_bars, drawn)] if drawn else [],
        "main": [p for p in drawn if p["metric"] == "mean_recall"] if is_retrieval else drawn,
        "skipped": skipped[skipped > 0].to_dict(),
        "sheets": _copy_images(sheets, "Best and worst queries", results_folder, output),
    }  # fmt: skip


def _draw_chart(
    title: str, results_folder: ResultsFolder, output: Path, plot: Callable, *plot_arguments: Any
) -> tuple[str, str]:
    """File and title of a chart."""
    results_folder.image_count += 1
    plot(*plot_arguments, output / f"{results_folder.image_count:03d}.png")
    return f"{results_folder.image_count:03d}.png", title


def _copy_images(
    sheets: list[Path], title: str, results_folder: ResultsFolder, output: Path
) -> list[tuple[str | None, str]]:
    """File and title of a copy, on white, of each picture inside of the folder; no file where it can't be shown."""
    copies, files = [], ImageAccess(AllowedFolders(results_folder.folder))
    for inside in (sheet for sheet in sheets if os.path.lexists(results_folder.folder / sheet)):
        try:
            image = decode_image({"bytes": None, "path": str(results_folder.folder / inside)}, files).convert("RGBA")
        except BadImage as error:  # its detail may name folders of this machine
            results_folder.faults.append((to_one_line(str(inside), 120), f"this picture is not shown: {error.reason}"))
            copies.append((None, title))
        else:
            results_folder.image_count += 1
            image.thumbnail((1600, 1600))
            copies.append((f"{results_folder.image_count:03d}.jpg", title))
            opaque = Image.new("RGB", image.size, "white")
            opaque.paste(image, mask=image)
            opaque.save(output / copies[-1][0], quality=85)  # encoded anew: nothing but its pixels gets out
    return copies


def _to_safe_line(text: object) -> str:
    return to_one_line(hide_paths(str(text)), 300)


def _to_words(name: str) -> str:
    return name.replace("_to_", " → ").replace("_", " ")


def main(argv: list[str] | None = None) -> None:
    """The command; says what was left out and where the page is."""
    args = parse_arguments(ReportArguments, __doc__, argv)
    found = write_report(args.results, args.output, args.overwrite_output_dir)
    for name, reason in found.faults:
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(found.results)} result files, {len(found.runs)} runs: {args.output / 'index.html'}")


if __name__ == "__main__":
    run_command(main)
