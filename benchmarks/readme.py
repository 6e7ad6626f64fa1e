"""Write tables of the results in benchmarks/results into the documentation.

python -m benchmarks.readme           # fill the blocks between the markers
python -m benchmarks.readme --demo runs/openmoji-pt-001   # first import the results of a demo run
python -m benchmarks.readme --check   # fail if a block differs from the JSON

A block is the text between a begin marker and an end marker (HTML comments, see `BLOCK_RE`) in a Markdown file. The
begin marker contains the name of the block. The macro with the same name in `tables.md.j2` writes the text.
"""

import re
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from benchmarks.timing import CODE_ROOT, RESULTS_FOLDER, describe_conditions
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import read_json, write_json, write_text
from eval.records.schema import DIRECTIONS, Record, read_records
from eval.records.tables import format_percent, format_points, render_retrieval_table

BLOCK_RE = re.compile(r"(<!-- (\w+): made by `python -m benchmarks.readme` -->\n).*?(<!-- end \2 -->)", re.DOTALL)

PORTUGUESE_PAGES = ("LEIAME.md", "docs/how-to/seu_idioma.md")


@dataclass
class ReadmeArguments:
    """Command-line arguments of `benchmarks.readme`."""

    demo: list[Path] = flag(
        [], "Folders of runs of configs/openmoji.yaml, one per seed. Their results replace demo.json."
    )
    check: bool = flag(False, "Change nothing; fail if a block differs from the JSON.")


def find_pages() -> list[str]:
    """Find the Markdown files that contain a generated block, which is text between two markers (see `BLOCK_RE`).

    Returns:
        Sorted paths relative to the checkout, such as "docs/reference/benchmarks.md". Only the checkout's top
        folder and its folder `docs` are searched.
    """
    paths = (path.relative_to(CODE_ROOT) for path in (*CODE_ROOT.glob("*.md"), *CODE_ROOT.glob("docs/**/*.md")))
    return sorted(str(path) for path in paths if BLOCK_RE.search((CODE_ROOT / path).read_text(encoding="utf-8")))


def fill_blocks(page: str, text: str) -> str:
    """Replace the text of all blocks between markers in a Markdown file. The file itself is not written.

    Args:
        page: Path of the file relative to the checkout. The blocks of `PORTUGUESE_PAGES` are written in Portuguese.
        text: Current content of the file.

    Returns:
        Content of the file with the new text in every block.

    Raises:
        ValueError: If `tables.md.j2` has no macro for a block.
    """
    tables, portuguese = load_template().module, page in PORTUGUESE_PAGES

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if not hasattr(tables, name):
            raise ValueError(f"{page} has the block {name!r}, for which benchmarks/tables.md.j2 has no macro.")
        return f"{begin}{getattr(tables, name)(portuguese).strip()}\n{end}"

    return BLOCK_RE.sub(block, text)


def load_template() -> Template:
    """Load the template `tables.md.j2`, and register the filters and functions that the template calls.

    Returns:
        The template. It has a macro for each block of the documentation.
    """
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), extensions=["jinja2.ext.do"], **options)
    environment.filters |= {
        "fixed": format_number,
        "points": format_points,
        "median": statistics.median,
        "mean": statistics.mean,
    }
    environment.filters["percent"] = _percent
    environment.globals |= {
        "results": load_results,
        "table": format_table,
        "versions": format_versions,
        "ms": format_milliseconds,
        "step_memory": format_step_memory,
        "zip": zip,
    }
    environment.globals |= {
        "recalls": mean_recalls,
        "retrieval_table": lambda rows: render_retrieval_table([Record(**row) for row in rows]),
    }
    return environment.get_template("tables.md.j2")


def _percent(shares: float | list[float]) -> str:
    """Format fractions in percent.

    Args:
        shares: A fraction from 0 to 1, or the fractions of several seeds.

    Returns:
        Text such as `format_percent` returns.
    """
    return format_percent([shares] if isinstance(shares, float) else shares)


def load_results(name: str) -> dict[str, Any]:
    """Read the results of a benchmark.

    Args:
        name: Name of the file in benchmarks/results without `.json`, such as "search".

    Returns:
        The JSON object in the file.
    """
    return read_json(RESULTS_FOLDER / f"{name}.json")


def format_number(number: float, digits: int = 0) -> str:
    """Format a number with thousands separators, for example 12345.67 as "12,346"."""
    return f"{number:,.{digits}f}"


def format_milliseconds(percentiles: dict[str, float], digits: int = 0) -> list[str]:
    """Format the median ("p50") and the 95th percentile ("p95") of a time in milliseconds as two table cells."""
    return [format_number(percentiles["p50"], digits), format_number(percentiles["p95"], digits)]


def format_step_memory(name: str) -> str:
    """Format the peak memory of a step of 2816 pairs.

    Args:
        name: Name of a result file of `benchmarks.train_step` with the part `recipe`, without `.json`.

    Returns:
        Memory in GiB, as measured. If fewer pairs were measured, a range from their memory to the extrapolated one. "–"
        if the file does not exist, because nothing has been measured.
    """
    path = RESULTS_FOLDER / f"{name}.json"
    if not path.is_file():
        return "–"
    step = read_json(path, recipe=dict)["recipe"]
    bounds = [step, step["extrapolated"]] if "extrapolated" in step else [step]
    return "–".join(format_number(bound["peak_memory_bytes"] / 2**30, 1) for bound in bounds)


def format_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
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


def format_versions(results: dict[str, Any], *packages: str) -> str:
    """Format the versions of packages that a benchmark used.

    Args:
        results: Results of a benchmark, with the versions of its packages under "versions".
        *packages: Names of the packages to list. A package without a recorded version is skipped.

    Returns:
        Text such as "torch 2.13.0, transformers 5.24.0".
    """
    versions = {package: results["versions"][package] for package in packages if package in results["versions"]}
    return ", ".join(f"{package.removesuffix('_torch')} {version}" for package, version in versions.items())


def mean_recalls(recipe_row: dict[str, Any]) -> list[list[float]]:
    """Average the mean recall over both directions (text to image, image to text).

    Args:
        recipe_row: An entry of "rows" in recipe.json.

    Returns:
        A list for each pair of test set and language, in the order openmoji pt, openmoji en, twemoji pt, and so on. It
        contains the average (0 to 1) of each seed.
    """
    test_sets = [f"{name}/test/{code}" for name in ("openmoji", "twemoji", "noto", "photos") for code in ("pt", "en")]
    recalls = []
    for test_set in test_sets:
        by_direction = [recipe_row["values"][f"{test_set}/{direction}"] for direction in DIRECTIONS]
        recalls.append([statistics.mean(pair) for pair in zip(*by_direction, strict=True)])
    return recalls


def import_demo_runs(runs: list[Path]) -> None:
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
                elif run == runs[0]:  # the baseline is the same in all runs
                    records.append(asdict(record))
    results = {"records": records, "runs": [read_json(run / "run.json") for run in runs]}
    write_json(RESULTS_FOLDER / "demo.json", describe_conditions() | results)
    for name in ("curves.png", "retrieval.png"):
        save_small_image(runs[0] / name, CODE_ROOT / "docs" / name)


def save_small_image(source: Path, target: Path) -> None:
    """Save a copy of a chart with 256 colors, which looks the same and takes a third of the bytes.

    Args:
        source: Image file of the chart.
        target: PNG file to write.
    """
    with PIL.Image.open(source) as picture:
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(target, "PNG", optimize=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command: write the blocks of all Markdown files or, with `--check`, fail if a block is outdated."""
    args = parse_arguments(ReadmeArguments, __doc__, argv)
    if args.demo:
        import_demo_runs(args.demo)
    for page in find_pages():
        text = (CODE_ROOT / page).read_text(encoding="utf-8")
        if not args.check:
            write_text(CODE_ROOT / page, fill_blocks(page, text))
        elif fill_blocks(page, text) != text:
            sys.exit(f"{page} differs from benchmarks/results. Run `python -m benchmarks.readme`.")


if __name__ == "__main__":
    run_command(main)
