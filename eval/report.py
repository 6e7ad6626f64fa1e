"""A page for people: every result file of a folder as one HTML file that needs nothing else, and its pictures as PNGs.

    python -m eval.report results/ --output report/
    python -m eval.report runs/openmoji-pt-001/ --output report/ --overwrite_output_dir

A run's folder holds its `results/` and its `run.json`, which gives the training curves.
"""

from capivara_common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("eval.eval_arguments:ReportArguments", __doc__)

import math
import sys
from pathlib import Path

from capivara_common.cli import parse, run_command, user_errors
from capivara_common.files import check_inputs_stay, check_output_folder, whole_folder, write_text
from eval.eval_arguments import ReportArguments
from eval.report_details import class_sections, gallery_sections
from eval.report_folder import Found, read_folder
from eval.report_sections import benchmarks, gains, headlines, left_out, measured, protocols, training
from records.report_page import Pictures, render_page
from records.series import Series, collect_series, pairs_of

TEMPLATE = Path(__file__).parent / "report.html.j2"
SAME = 5e-4  # a difference that no figure shows: of two runs on different devices, say


def write_report(results: Path, output: Path, overwrite: bool = False) -> Found:
    """Write the report of the folder `results` to the folder `output`, whole or not at all.

    Raises:
        ValueError: there is no result file, or `output` would overwrite something.
        OSError: it can't be written.
    """
    check_output_folder(output, overwrite)
    check_inputs_stay(output, results)
    found = read_folder(results)
    with whole_folder(output, overwrite) as folder:
        write_text(folder / "index.html", render(found, Pictures(folder)))
    return found


def render(found: Found, pictures: Pictures) -> str:
    """The page; its pictures are drawn into the folder of `pictures`."""
    series = series_of(found)
    pairs = pairs_of(series)
    parts = {
        "measured": measured(found),
        "headlines": headlines(pairs),
        "benchmarks": benchmarks(pairs, found, pictures),
        "gains": gains(found, pictures),
        "protocols": protocols(series),
        "classes": class_sections(found, pictures),
        "galleries": gallery_sections(found, pictures),
        "training": training(found, pictures),
        "left_out": left_out(found),
    }
    return render_page(TEMPLATE, **parts, unread=found.unread, problems=found.problems)


def series_of(found: Found) -> list[Series]:
    """All figures save the gains; repeated ones that differ are stated in `problems`."""
    series = [one for one in collect_series(found.results) if not one.first.is_gain]
    for one in series:
        for first, other in one.conflicts:
            if not math.isclose(first.record.value, other.record.value, abs_tol=SAME):
                dataset, folder = other.record.dataset, other.folder
                problem = (other.file.name, f"has other figures of {dataset} with {folder}; the first ones are shown")
                found.problems += [problem] if problem not in found.problems else []
    return series


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command; says what was left out and where the page is."""
    args = parse(ReportArguments, __doc__, argv)
    found = write_report(args.results, args.output, args.overwrite_output_dir)
    for name, reason in found.unread + found.problems:
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(found.results)} result files, {len(found.runs)} runs: {args.output / 'index.html'}")


if __name__ == "__main__":
    run_command(main)
