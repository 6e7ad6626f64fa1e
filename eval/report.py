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
from capivara_common.files import AllowedFolders, check_inputs_outside, check_output_folder, atomic_folder
from capivara_common.image_files import BadImage, ImageAccess, decode_image
from capivara_common.privacy import hide_paths
from eval.benchmarks import published_base
from eval.records.plots import plot_bars, plot_training_curves
from eval.records.schema import (
    GAIN,
    SCHEMA_VERSION,
    TASKS,
    ResultFile,
    parse_result,
    read_object,
)
from eval.records.tables import conflicts, one_line, pairs_of, points, records_frame, values_of, write_page

TEMPLATE = Path(__file__).parent / "report.html.j2"
SHEET = "retrieval.png"  # of a run: queries chosen by a rule, with what the base and the trained model find
QUERIES = ".queries.png"  # in place of `.json`: the best and worst queries, as `eval.retrieval` draws them
SAME = 5e-4  # a difference that no table shows: of two runs on different devices, say


@dataclass
class ReportArguments:
    """Arguments of `eval.report`."""

    results: Path = flag(..., "Folder of result files, those of folders in it too.", positional=True)
    output: Path = flag(..., "Folder of the report: index.html and PNGs. Must be missing or empty.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder.")


@dataclass
class Found:
    """What a folder holds, none of which is trusted."""

    folder: Path  # resolved
    results: list[ResultFile] = field(default_factory=list)  # in the order of their names
    runs: list[tuple[str, dict]] = field(default_factory=list)  # (name, content) of every `run.json`
    faults: list[tuple[str, str]] = field(default_factory=list)  # (file, why it, or a part of it, is not shown)
    pictures: int = 0  # beside the page


def read_folder(folder: Path) -> Found:
    """Read every JSON file of `folder` and below, but for hidden ones and unfinished runs, `….partial`.

    What can't be read is among the `faults`. ValueError where there is no folder, or no result file in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that the evaluations wrote their JSON files to.")
    found = Found(folder.resolve())
    for path in sorted(found.folder.rglob("*.json")):
        name = path.relative_to(found.folder).as_posix()
        if any(part.startswith(".") or part.endswith(".partial") for part in name.split("/")):
            continue
        try:
            content, _ = read_object(path)
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


def write_report(results: Path, output: Path, overwrite: bool = False) -> Found:
    """Write the report of the folder `results` to the folder `output`, whole or not at all.

    ValueError where there is no result file, or `output` would overwrite something.
    """
    check_output_folder(output, overwrite)
    check_inputs_outside(output, results)
    found = read_folder(results)
    with atomic_folder(output, overwrite) as folder:
        blocks = [_block(rows, found, folder) for rows in tables_of(records_frame(found.results))]
        runs = []
        for name, run in found.runs:
            try:
                curve = plot_training_curves, run["curve"], run["config"]["language"]
                curves = _draw(f"curves {name}", found, folder, *curve)
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                found.faults.append((name, f"has a curve of another form: {one_line(repr(error), 80)}"))
                continue
            sheets, title = [Path(name).with_name(SHEET)], "Test captions with the pictures found for them"
            runs.append((name, run, [curves, *_copies(sheets, title, found, folder)]))
        values = {"found": found, "blocks": blocks, "runs": runs, "points": points, "line": _line}
        write_page(TEMPLATE, folder / "index.html", **values)
    return found


def tables_of(frame: pandas.DataFrame) -> list[pandas.DataFrame]:
    """Records that share a table: of retrieval those of a data set, of classification those of all data sets."""
    dataset = frame["dataset"].where(frame["task"] == "retrieval", "")
    order = [frame["task"].map(TASKS.index), frame["language"] != "pt", dataset, "split", "language", "dim", "protocol"]
    return [rows for _, rows in frame.groupby(order)]


def _block(rows: pandas.DataFrame, found: Found, output: Path) -> dict[str, Any]:
    """Table, bars and pictures of the records that belong together, for the template."""
    first, measured = rows.iloc[0], rows[rows["metric"] != GAIN]
    is_retrieval = first["task"] == "retrieval"
    for row in conflicts(measured, "folder", SAME).drop_duplicates(["name", "dataset", "folder"]).itertuples():
        fault = f"has other figures of {row.dataset} with {row.folder}; the first ones are shown"
        found.faults.append((row.name, fault))
    pairs, gains = pairs_of(values_of(measured, "folder")), rows[rows["metric"] == GAIN].to_dict("records")
    for pair in pairs:
        pair["published"] = published_base(pair)
        pair["models"] = " against ".join(pair[role].folder for role in ("capivara", "baseline") if pair[role])
    own = measured.drop_duplicates("dataset").set_index("dataset")["metric"]  # the metric that a file has first
    drawn = [p for p in pairs if not p["is_rank"] and (is_retrieval or p["metric"] == own[p["dataset"]])]
    several = len({pair["models"] for pair in pairs}) > 1
    for entry in pairs + gains:
        what = [_words(entry["direction"]) or entry["dataset"], _words(entry["metric"])]
        if entry["metric"] == GAIN:
            what[1] = "" if entry["seed"] is None else f"seed {entry['seed']}"
        entry["label"] = [", ".join(filter(None, what)), *[entry.get("models", entry.get("folder"))] * several]
        entry["short"] = "\n".join(one_line(line, 28) for line in entry["label"])
    title = [_words(first["task"]).capitalize(), first["dataset"] if is_retrieval else first["protocol"]]
    title += [f"in {first['language']}"] * bool(first["language"]) + [f"split {first['split']}"]
    title = one_line(", ".join(title + [f"first {first['dim']} dimensions"] * bool(first["dim"])), 200)
    sheets = [Path(name).with_suffix(QUERIES) for name in dict.fromkeys(rows["name"])]
    skipped = measured.groupby("dataset", sort=False)["skipped_rows"].max()
    return {
        "title": title, "protocol": first["protocol"], "pairs": pairs, "gains": gains,
        "charts": [_draw(f"bars {title}", found, output, plot_bars, drawn)] if drawn else [],
        "main": [p for p in drawn if p["metric"] == "mean_recall"] if is_retrieval else drawn,
        "skipped": skipped[skipped > 0].to_dict(),
        "sheets": _copies(sheets, "Best and worst queries", found, output),
    }  # fmt: skip


def _draw(title: str, found: Found, output: Path, plot: Callable, *what: Any) -> tuple[str, str]:
    """File and title of a chart."""
    found.pictures += 1
    plot(*what, output / f"{found.pictures:03d}.png")
    return f"{found.pictures:03d}.png", title


def _copies(sheets: list[Path], title: str, found: Found, output: Path) -> list[tuple[str | None, str]]:
    """File and title of a copy, on white, of each picture inside of the folder; no file where it can't be shown."""
    copies, files = [], ImageAccess(AllowedFolders(found.folder))
    for inside in (sheet for sheet in sheets if os.path.lexists(found.folder / sheet)):
        try:
            image = decode_image({"bytes": None, "path": str(found.folder / inside)}, files).convert("RGBA")
        except BadImage as error:  # its detail may name folders of this machine
            found.faults.append((one_line(str(inside), 120), f"this picture is not shown: {error.reason}"))
            copies.append((None, title))
        else:
            found.pictures += 1
            image.thumbnail((1600, 1600))
            copies.append((f"{found.pictures:03d}.jpg", title))
            opaque = Image.new("RGB", image.size, "white")
            opaque.paste(image, mask=image)
            opaque.save(output / copies[-1][0], quality=85)  # encoded anew: nothing but its pixels gets out
    return copies


def _line(text: object) -> str:
    return one_line(hide_paths(str(text)), 300)


def _words(name: str) -> str:
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
