"""Write an HTML report of all result files and training runs in a folder.

    python -m eval.report results/ --output report/
    python -m eval.report runs/openmoji-pt-001/ --output report/ --overwrite_output_dir

The report is a folder with index.html and its images. For a training run, it also shows the training curves. Input
files are not trusted: text is escaped, and images are decoded and encoded again.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
from PIL import Image

from capivara_common import files
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.image_files import BadImage, ImageAccess, decode_image
from capivara_common.privacy import shorten_absolute_paths
from eval.benchmarks import get_published_baseline_result
from eval.records import result_files, tables
from eval.records.plots import plot_baseline_and_model_bars, plot_training_curves
from eval.records.result_files import GAIN_METRIC, SCHEMA_VERSION, TASKS, ResultFile
from eval.records.tables import make_short_plain_line

PAGE_TEMPLATE = Path(__file__).parent / "report.html.j2"
# Image that a training run writes. It shows example queries with the images that base and trained model rank first.
RUN_SHEET_FILE = "retrieval.png"
# Suffix of the image with the best and worst queries, which `eval.retrieval` writes. It replaces `.json` in the name of
# the result file.
QUERY_SHEET_SUFFIX = ".queries.png"
# Two metric values (0 to 1) that differ by at most this much count as equal, because another device, such as a GPU, can
# round differently.
REPORT_TOLERANCE = 5e-4


@dataclass
class ReportArguments:
    """Command-line arguments of `eval.report`, which writes an HTML report of results and training runs."""

    results: Path = flag(..., "Folder with result files. Its subfolders are searched, too.", positional=True)
    output: Path = flag(..., "Folder for the report: index.html and images. It must be empty or not exist yet.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it is not empty.")


@dataclass
class ResultsFolder:
    """Content of a results folder for the report: result files, training runs, and files that can't be shown.

    The content of the files is not trusted, because another person may have written them.
    """

    folder: Path  # absolute path, with symbolic links resolved
    results: list[ResultFile] = field(default_factory=list)  # ordered by name
    runs: list[tuple[str, dict]] = field(default_factory=list)  # (file name, content) of each run.json
    faults: list[tuple[str, str]] = field(default_factory=list)  # (file name, why it is not fully shown)
    image_count: int = 0  # images written so far next to the page

    def choose_image_name(self, suffix: str) -> str:
        """Return the file name of the next image of the report: its number and the suffix, such as "007.png"."""
        self.image_count += 1
        return f"{self.image_count:03d}{suffix}"

    def copy_images_as_jpeg(self, sheets: list[Path], title: str, output: Path) -> list[tuple[str | None, str]]:
        """Copy images from the results folder into the folder of the report, as JPEG files on a white background.

        Images that can't be shown are added to `faults`: unreadable files, and links that leave the results folder.

        Args:
            sheets: Paths of the images relative to the results folder. Missing files are ignored.
            title: Title of all images.
            output: Folder of the report.

        Returns:
            File name and title of each copy. The file name is None if the image can't be shown.
        """
        copies, access = [], ImageAccess(files.AllowedFolders(self.folder))
        for inside in (sheet for sheet in sheets if os.path.lexists(self.folder / sheet)):
            try:
                image = decode_image({"bytes": None, "path": str(self.folder / inside)}, access).convert("RGBA")
            except BadImage as error:
                # The page shows only the short reason, because the full message may name folders of this machine.
                name = make_short_plain_line(str(inside), 120)
                self.faults.append((name, f"the image is not shown: {error.reason}"))
                copies.append((None, title))
            else:
                image.thumbnail((1600, 1600))
                copies.append((self.choose_image_name(".jpg"), title))
                opaque = Image.new("RGB", image.size, "white")
                opaque.paste(image, mask=image)
                # The new image has only the pixels of the old one. Metadata, such as the place where a photo was taken,
                # are not copied.
                opaque.save(output / copies[-1][0], quality=85)
        return copies


def read_results_folder(folder: Path) -> ResultsFolder:
    """Read all result files and training runs in a folder and its subfolders.

    Hidden files and unfinished runs (`NAME.partial`) are skipped.

    Returns:
        The result files, the training runs, and in `faults` the files that can't be read.

    Raises:
        ValueError: If the folder does not exist or contains no result file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the folder that the evaluations wrote their result files to.")
    results_folder = ResultsFolder(folder.resolve())
    for path in sorted(results_folder.folder.rglob("*.json")):
        name = path.relative_to(results_folder.folder).as_posix()
        if any(part.startswith(".") or part.endswith(".partial") for part in name.split("/")):
            continue
        try:
            content, _ = result_files.read_untrusted_json_object_and_bytes(path)
            if "summary_version" in content:
                # A summary (of eval.suite or examples.real_images) repeats the result files next to it. It is left out,
                # so that no result is shown twice.
                continue
            if "records" in content:
                results_folder.results.append(result_files.parse_result(content, name))
            elif "curve" in content:
                results_folder.runs.append((name, content))
            elif not (path.parent / "config.json").is_file():
                # The folder of a model, recognized by its config.json, may have JSON files without results, such as
                # tokenizer.json. They are ignored. In all other folders, JSON files without results are reported.
                raise ValueError("must contain the records of a measurement, or the training curve of a run")
        except (OSError, ValueError) as error:
            results_folder.faults.append((name, getattr(error, "strerror", None) or str(error)))
    if not results_folder.results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in results_folder.faults[:3])
        reasons = reasons or "it has no JSON files, or only those of models"
        raise ValueError(f"{folder} must contain result files of schema version {SCHEMA_VERSION} ({reasons}).")
    return results_folder


def write_report(results: Path, output: Path, overwrite: bool = False) -> ResultsFolder:
    """Write an HTML report of all result files and training runs in a folder. The write is atomic.

    Args:
        results: Folder with result files, which is searched with its subfolders.
        output: Folder to write the report to: index.html and its images.
        overwrite: Whether to replace an output folder that is not empty.

    Returns:
        The files that were read. The field `faults` lists all files that are not shown, with reasons.

    Raises:
        ValueError: If there is no result file, or if the output folder contains the results or may not be replaced.
    """
    files.check_output_folder_and_clean_leftovers(output, overwrite)
    files.check_inputs_outside(output, results)
    content = read_results_folder(results)
    with files.atomic_folder(output, overwrite) as folder:
        groups = _group_into_tables(tables.build_records_frame(content.results))
        blocks = [_build_report_block_and_write_images(rows, content, folder) for rows in groups]
        runs = []
        for name, run in content.runs:
            try:
                curve, language = run["curve"], run["config"]["language"]
                chart = content.choose_image_name(".png")
                plot_training_curves(curve, language, folder / chart)
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                fault = f"its training curve is invalid: {make_short_plain_line(repr(error), 80)}"
                content.faults.append((name, fault))
                continue
            sheets, title = [Path(name).with_name(RUN_SHEET_FILE)], "Test captions with the images found for them"
            copies = content.copy_images_as_jpeg(sheets, title, folder)
            runs.append((name, run, [(chart, f"curves {name}"), *copies]))
        values = {"results_folder": content, "blocks": blocks, "runs": runs}
        values |= {"points": tables.format_signed_difference, "safe_line": _to_safe_line}
        tables.write_html_from_template(PAGE_TEMPLATE, folder / "index.html", **values)
    return content


def _group_into_tables(frame: pandas.DataFrame) -> list[pandas.DataFrame]:
    """Group records into tables: one per dataset for retrieval, one for all datasets of any other task.

    All records of a table have the same split, language, embedding width and protocol; other values start a further
    table. Tables are sorted by task; within a task, Portuguese tables come first.

    Args:
        frame: Result of `build_records_frame`.

    Returns:
        The rows of each table.
    """
    dataset = frame["dataset"].where(frame["task"] == "retrieval", "")
    order = [frame["task"].map(TASKS.index), frame["language"] != "pt", dataset, "split", "language", "dim", "protocol"]
    return [rows for _, rows in frame.groupby(order)]


def _build_report_block_and_write_images(
    rows: pandas.DataFrame, results_folder: ResultsFolder, output: Path
) -> dict[str, Any]:
    """Build the template variables of one table of the report, and draw its chart.

    Args:
        rows: Records of the table, from `_group_into_tables`.
        results_folder: The results folder. Records that contradict an earlier file are added to its `faults`.
        output: Folder of the report.

    Returns:
        A dict `{variable of the template report.html.j2: value}`.
    """
    first, measured = rows.iloc[0], rows[rows["metric"] != GAIN_METRIC]
    is_retrieval = first["task"] == "retrieval"
    conflicts = tables.find_conflicting_records(measured, "folder", REPORT_TOLERANCE)
    for row in conflicts.drop_duplicates(["name", "dataset", "folder"]).itertuples():
        fault = f"contradicts an earlier file (results of {row.folder} on {row.dataset}); the earlier values are shown"
        results_folder.faults.append((row.name, fault))
    pairs = tables.pair_with_baselines(tables.average_over_seeds(measured, "folder"))
    gains = rows[rows["metric"] == GAIN_METRIC].to_dict("records")
    for pair in pairs:
        pair["published"] = get_published_baseline_result(pair)
        pair["models"] = " against ".join(pair[role].folder for role in ("capivara", "baseline") if pair[role])
    # Each classification dataset has a usual metric, which a result file lists first. The chart shows only this metric;
    # the other records, such as top-5 accuracy, are only in the table.
    own_metrics = measured.drop_duplicates("dataset").set_index("dataset")["metric"]
    drawn = [p for p in pairs if not p["is_rank"] and (is_retrieval or p["metric"] == own_metrics[p["dataset"]])]
    has_several_models = len({pair["models"] for pair in pairs}) > 1
    for entry in pairs + gains:
        parts = [_to_words(entry["direction"]) or entry["dataset"], _to_words(entry["metric"])]
        if entry["metric"] == GAIN_METRIC:
            parts[1] = "" if entry["seed"] is None else f"seed {entry['seed']}"
        entry["label"] = [", ".join(filter(None, parts))]
        if has_several_models:
            entry["label"].append(entry.get("models", entry.get("folder")))
        entry["short"] = "\n".join(make_short_plain_line(line, 28) for line in entry["label"])
    title = [_to_words(first["task"]).capitalize(), first["dataset"] if is_retrieval else first["protocol"]]
    title += [f"in {first['language']}"] * bool(first["language"]) + [f"split {first['split']}"]
    title = make_short_plain_line(", ".join(title + [f"first {first['dim']} dimensions"] * bool(first["dim"])), 200)
    sheets = [Path(name).with_suffix(QUERY_SHEET_SUFFIX) for name in dict.fromkeys(rows["name"])]
    skipped = measured.groupby("dataset", sort=False)["skipped_rows"].max()
    charts = []
    if drawn:
        charts = [(results_folder.choose_image_name(".png"), f"bars {title}")]
        plot_baseline_and_model_bars(drawn, output / charts[0][0])
    return {
        "title": title, "protocol": first["protocol"], "pairs": pairs, "gains": gains, "charts": charts,
        "main": [p for p in drawn if p["metric"] == "mean_recall"] if is_retrieval else drawn,
        "skipped": skipped[skipped > 0].to_dict(),
        "sheets": results_folder.copy_images_as_jpeg(sheets, "Best and worst queries", output),
    }  # fmt: skip


def _to_safe_line(text: object) -> str:
    """Convert a value to one line of at most 300 characters, in which private paths are hidden."""
    return make_short_plain_line(shorten_absolute_paths(str(text)), 300)


def _to_words(name: str) -> str:
    """Convert an identifier to words for a label, for example "text_to_image" to "text → image"."""
    return name.replace("_to_", " → ").replace("_", " ")


def main(argv: list[str] | None = None) -> None:
    """Run the command: write a report of the evaluation results in a folder, and print the path of the report.

    If the report leaves out a result file or a part of it, the file name and the reason are printed, too.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(ReportArguments, __doc__, argv)
    content = write_report(args.results, args.output, args.overwrite_output_dir)
    for name, reason in content.faults:
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(content.results)} result files, {len(content.runs)} runs: {args.output / 'index.html'}")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
