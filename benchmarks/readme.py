"""Fill the marked blocks of the documentation with tables from benchmarks/results.

python -m benchmarks.readme           # fill the blocks between the markers
python -m benchmarks.readme --demo runs/openmoji-pt-001   # first import the results of a demo run
python -m benchmarks.readme --check   # fail if a block differs from the JSON

Each block is written by the macro of its name in `tables.md.j2`.
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


@dataclass
class ReadmeArguments:
    """Command-line arguments of `benchmarks.readme`."""

    demo: list[Path] = flag(
        [], "Folders of runs of configs/openmoji.yaml, one per seed. Their results replace demo.json."
    )
    check: bool = flag(False, "Change nothing; fail if a block differs from the JSON.")


def find_pages() -> list[str]:
    """Return the paths of all pages with a marked block, relative to the checkout."""
    paths = (path.relative_to(CODE_ROOT) for path in (*CODE_ROOT.glob("*.md"), *CODE_ROOT.glob("docs/*.md")))
    return sorted(str(path) for path in paths if BLOCK_RE.search((CODE_ROOT / path).read_text(encoding="utf-8")))


def fill_blocks(page: str, text: str) -> str:
    """Fill the marked blocks of a page.

    Args:
        page: Path of the page, relative to the checkout.
        text: Its text.

    Returns:
        The text with the content of every block replaced.

    Raises:
        ValueError: If `tables.md.j2` has no macro for a block.
    """
    tables, portuguese = load_template().module, page == "LEIAME.md"

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if not hasattr(tables, name):
            raise ValueError(f"{page} has the block {name!r}, for which benchmarks/tables.md.j2 has no macro.")
        return f"{begin}{getattr(tables, name)(portuguese).strip()}\n{end}"

    return BLOCK_RE.sub(block, text)


def load_template() -> Template:
    """Return the template `tables.md.j2`, which has a macro per block, with the functions that it calls."""
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
        "zip": zip,
    }
    environment.globals |= {
        "recalls": mean_recalls,
        "retrieval_table": lambda rows: render_retrieval_table([Record(**row) for row in rows]),
    }
    return environment.get_template("tables.md.j2")


def _percent(shares: float | list[float]) -> str:
    """Format one share or the shares of several seeds in percent."""
    return format_percent([shares] if isinstance(shares, float) else shares)


def load_results(name: str) -> dict[str, Any]:
    """Return the results of a benchmark, by the name of its file without `.json`."""
    return read_json(RESULTS_FOLDER / f"{name}.json")


def format_number(number: float, digits: int = 0) -> str:
    """Format a number with thousands separators, for example 12345.67 as "12,346"."""
    return f"{number:,.{digits}f}"


def format_milliseconds(percentiles: dict[str, float], digits: int = 0) -> list[str]:
    """Format the median ("p50") and the 95th percentile ("p95") of a time in milliseconds as two table cells."""
    return [format_number(percentiles["p50"], digits), format_number(percentiles["p95"], digits)]


def format_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Build a Markdown table. The first `text_columns` columns are aligned left, the others, with figures, right."""
    lines = [header, ["---"] * text_columns + ["---:"] * (len(header) - text_columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def format_versions(results: dict[str, Any], *packages: str) -> str:
    """Format the versions of packages that results record, for example "torch 2.13.0, transformers 5.24.0"."""
    versions = {package: results["versions"][package] for package in packages if package in results["versions"]}
    return ", ".join(f"{package.removesuffix('_torch')} {version}" for package, version in versions.items())


def mean_recalls(recipe_row: dict[str, Any]) -> list[list[float]]:
    """Average the mean recall of both directions.

    Args:
        recipe_row: A row of recipe.json.

    Returns:
        For each test set and language (pt, en), the average of each seed.
    """
    test_sets = [f"{name}/test/{code}" for name in ("openmoji", "twemoji", "noto", "photos") for code in ("pt", "en")]
    recalls = []
    for test_set in test_sets:
        by_direction = [recipe_row["values"][f"{test_set}/{direction}"] for direction in DIRECTIONS]
        recalls.append([statistics.mean(pair) for pair in zip(*by_direction, strict=True)])
    return recalls


def import_demo_runs(runs: list[Path]) -> None:
    """Copy the records, run.json files and images of demo runs, one per seed, to benchmarks/results and docs."""
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
    """Save a chart with 256 colors, which looks the same and takes a third of the bytes."""
    with PIL.Image.open(source) as picture:
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(target, "PNG", optimize=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command: fill the marked blocks of all pages or, with `--check`, fail if a block is outdated."""
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
