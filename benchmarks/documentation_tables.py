"""Write the benchmark results of benchmarks/results as tables into the documentation, so that both always agree.

    python -m benchmarks.documentation_tables                               # write the tables
    python -m benchmarks.documentation_tables --demo runs/openmoji-pt-001   # first copy the results of a demo run
    python -m benchmarks.documentation_tables --check                       # only check that the tables are current

Each table stands between two HTML comments in a Markdown file. The Jinja macro in `tables.md.j2` with the name in these
comments generates it.
"""

import re
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from benchmarks.tools import CODE_ROOT, RESULTS_FOLDER, describe_measurement_conditions
from capivara_common.cli import UsageError, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import read_json, write_json, write_text
from eval.records.result_files import DIRECTIONS, Record, read_records
from eval.records.tables import format_percent_over_seeds, format_signed_difference, render_retrieval_table

# A block with a table: an HTML comment with the name of the block, the table, and an HTML comment that ends the block.
BLOCK_RE = re.compile(
    r"(<!-- (\w+): made by `python -m benchmarks.documentation_tables` -->\n).*?(<!-- end \2 -->)", re.DOTALL
)

PORTUGUESE_PAGES = ("LEIAME.md", "docs/how-to/seu_idioma.md")


@dataclass
class DocumentationTablesArguments:
    """Command-line arguments of `benchmarks.documentation_tables`, which writes result tables into Markdown files."""

    demo: list[Path] = flag(
        [],
        "Output folders of trainings with configs/openmoji.yaml, one per seed. Their results replace "
        "benchmarks/results/demo.json.",
    )
    check: bool = flag(False, "Write no table, and fail if a table does not match benchmarks/results.")


def find_pages_with_generated_blocks() -> list[str]:
    """Find the Markdown files of the documentation that contain generated tables.

    Only the top folder of the checkout and its folder `docs` are searched. A generated table is between two HTML
    comments (see `BLOCK_RE`).

    Returns:
        Sorted paths relative to the checkout, such as "docs/reference/benchmarks.md".
    """
    paths = (path.relative_to(CODE_ROOT) for path in (*CODE_ROOT.glob("*.md"), *CODE_ROOT.glob("docs/**/*.md")))
    return sorted(str(path) for path in paths if BLOCK_RE.search((CODE_ROOT / path).read_text(encoding="utf-8")))


def replace_generated_blocks_in_text(page: str, text: str) -> str:
    """Replace all generated tables in the text of a Markdown file by tables of the current benchmark results.

    Args:
        page: Path of the Markdown file relative to the checkout. It decides the language of the tables.
        text: Current content of the file.

    Returns:
        Content of the file with up-to-date tables. No file is written.

    Raises:
        ValueError: If `tables.md.j2` has no macro with the name of a table.
    """
    tables, portuguese = load_block_macros().module, page in PORTUGUESE_PAGES

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if not hasattr(tables, name):
            raise ValueError(
                f"{page} has the block {name!r}, but benchmarks/tables.md.j2 has no macro with this name. Add it."
            )
        return f"{begin}{getattr(tables, name)(portuguese).strip()}\n{end}"

    return BLOCK_RE.sub(block, text)


def load_block_macros() -> Template:
    """Load the Jinja template `tables.md.j2`, whose macros generate the result tables of the documentation.

    The filters and functions that the macros call are registered, too.

    Returns:
        The template. For each generated block of the documentation, it has a macro with the name of the block.
    """
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), extensions=["jinja2.ext.do"], **options)
    environment.filters |= {
        "fixed": format_number,
        "points": format_signed_difference,
        "median": statistics.median,
        "mean": statistics.mean,
        "percent": _percent,
    }
    environment.globals |= {
        "results": load_results,
        "table": _format_markdown_table,
        "versions": _format_versions,
        "ms": _format_milliseconds,
        "step_memory": format_recorded_training_step_peak_memory,
        "zip": zip,
        "recalls": _average_recall_over_directions,
        "retrieval_table": lambda rows: render_retrieval_table([Record(**row) for row in rows]),
    }
    return environment.get_template("tables.md.j2")


def _percent(shares: float | list[float]) -> str:
    """Format fractions in percent.

    Args:
        shares: A fraction from 0 to 1, or the fractions of several seeds.

    Returns:
        "12.3" for one fraction; "12.3 ± 0.4" (mean ± sample standard deviation) for several.
    """
    return format_percent_over_seeds([shares] if isinstance(shares, float) else shares)


def load_results(name: str) -> dict[str, Any]:
    """Read the stored results of one benchmark from the folder benchmarks/results.

    Args:
        name: Name of the result file without `.json`, such as "search".

    Returns:
        The JSON object in the file.
    """
    return read_json(RESULTS_FOLDER / f"{name}.json")


def format_number(number: float, digits: int = 0) -> str:
    """Format a number with thousands separators and `digits` decimal places, for example 12345.67 as "12,346"."""
    return f"{number:,.{digits}f}"


def _format_milliseconds(percentiles: dict[str, float], digits: int = 0) -> list[str]:
    """Format the median ("p50") and the 95th percentile ("p95") of a time in milliseconds as two table cells."""
    return [format_number(percentiles["p50"], digits), format_number(percentiles["p95"], digits)]


def format_recorded_training_step_peak_memory(name: str) -> str:
    """Format the measured peak memory of a training step with 2816 image-text pairs for a table.

    Args:
        name: Name, without `.json`, of a result file that `benchmarks.train_step --parts recipe` wrote.

    Returns:
        Memory in GiB, such as "51.3". "–" if the file does not exist. If only a smaller batch was measured, a range:
        the memory of that batch and the extrapolated memory of 2816 pairs, such as "30.1–51.3".
    """
    path = RESULTS_FOLDER / f"{name}.json"
    if not path.is_file():
        return "–"
    step = read_json(path, recipe=dict)["recipe"]
    bounds = [step, step["extrapolated"]] if "extrapolated" in step else [step]
    return "–".join(format_number(bound["peak_memory_bytes"] / 2**30, 1) for bound in bounds)


def _format_markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Build a Markdown table.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
        text_columns: Number of columns with text. These first columns are aligned left; all further columns contain
            numbers and are aligned right.

    Returns:
        The table in Markdown.
    """
    lines = [header, ["---"] * text_columns + ["---:"] * (len(header) - text_columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _format_versions(results: dict[str, Any], *packages: str) -> str:
    """Format the versions of packages that a benchmark used.

    Args:
        results: Results of a benchmark, with the versions of its packages under "versions".
        *packages: Names of the packages to list. A package without a recorded version is skipped.

    Returns:
        Text such as "torch 2.13.0, transformers 5.24.0".
    """
    versions = {package: results["versions"][package] for package in packages if package in results["versions"]}
    return ", ".join(f"{package.removesuffix('_torch')} {version}" for package, version in versions.items())


def _average_recall_over_directions(recipe_row: dict[str, Any]) -> list[list[float]]:
    """Average the mean recall over both directions (text to image, image to text).

    Args:
        recipe_row: An entry of "rows" in recipe.json.

    Returns:
        One list for each pair of test set and language, in the order openmoji pt, openmoji en, twemoji pt, and so on.
        Each list contains the average (0 to 1) of each seed.
    """
    test_sets = [f"{name}/test/{code}" for name in ("openmoji", "twemoji", "noto", "photos") for code in ("pt", "en")]
    recalls = []
    for test_set in test_sets:
        by_direction = [recipe_row["values"][f"{test_set}/{direction}"] for direction in DIRECTIONS]
        recalls.append([statistics.mean(pair) for pair in zip(*by_direction, strict=True)])
    return recalls


def _copy_demo_results_and_charts(runs: list[Path]) -> None:
    """Copy the results of demo runs to benchmarks/results/demo.json, and the charts of the first run to docs.

    Args:
        runs: Output folders of the runs, one per seed. Their evaluation records and run.json files are copied.
    """
    records = []
    for run in runs:
        for path in sorted((run / "results").glob("*.json"), reverse=True):
            for record in read_records(path):
                if record.model != "baseline":
                    records.append(asdict(replace(record, model_folder=f"seed-{record.seed}")))
                elif run == runs[0]:
                    # The baseline is the same in all runs, so its records are copied only from the first run.
                    records.append(asdict(record))
    results = {"records": records, "runs": [read_json(run / "run.json") for run in runs]}
    write_json(RESULTS_FOLDER / "demo.json", describe_measurement_conditions() | results)
    for name in ("curves.png", "retrieval.png"):
        save_small_image(runs[0] / name, CODE_ROOT / "docs" / name)


def save_small_image(source: Path, target: Path) -> None:
    """Save a copy of a chart or screenshot with only 256 colors, which looks the same and takes a third of the bytes.

    Args:
        source: Image file to copy.
        target: PNG file to write.
    """
    with PIL.Image.open(source) as picture:
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(target, "PNG", optimize=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command: write the current benchmark results as tables into all Markdown files.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: With `--check`, if a table does not match the results.
        UsageError: If `--check` is combined with `--demo`, which writes a file.
    """
    args = parse_arguments(DocumentationTablesArguments, __doc__, argv)
    if args.demo and args.check:
        raise UsageError("--demo can't be combined with --check, because --check writes no file.")
    if args.demo:
        _copy_demo_results_and_charts(args.demo)
    for page in find_pages_with_generated_blocks():
        text = (CODE_ROOT / page).read_text(encoding="utf-8")
        if not args.check:
            write_text(CODE_ROOT / page, replace_generated_blocks_in_text(page, text))
        elif replace_generated_blocks_in_text(page, text) != text:
            sys.exit(f"Tables of {page} differ from benchmarks/results. Run python -m benchmarks.documentation_tables.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
