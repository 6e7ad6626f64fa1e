"""Fills the marked blocks of the pages: a macro of `tables.md.j2` each, out of the JSON in benchmarks/results.

python -m benchmarks.readme           # rewrites the blocks between the markers
python -m benchmarks.readme --demo runs/openmoji-pt-001   # takes over the results of a run of the demo first
python -m benchmarks.readme --check   # fails where a block is not what the JSON says
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
    """Arguments of `benchmarks.readme`."""

    gone = dict.fromkeys(("real_images", "exchange"), "their figures stay in docs as they are")
    demo: list[Path] = flag([], "Folders of runs of configs/openmoji.yaml, one a seed.")
    check: bool = flag(False, "Change nothing, fail where a figure is not the JSON's.")


def find_pages() -> list[str]:
    """The pages that have a block."""
    found = (path.relative_to(CODE_ROOT) for path in (*CODE_ROOT.glob("*.md"), *CODE_ROOT.glob("docs/*.md")))
    return sorted(str(path) for path in found if BLOCK_RE.search((CODE_ROOT / path).read_text(encoding="utf-8")))


def fill_blocks(page: str, text: str) -> str:
    """The text of a page with every block replaced by what the JSON says. Raises ValueError where it is unknown."""
    tables, portuguese = load_template().module, page == "LEIAME.md"

    def block(found: re.Match) -> str:
        if not hasattr(tables, found[2]):
            raise ValueError(f"{page} has the block {found[2]!r}, which benchmarks/tables.md.j2 does not make.")
        return f"{found[1]}{getattr(tables, found[2])(portuguese).strip()}\n{found[3]}"

    return BLOCK_RE.sub(block, text)


def load_template() -> Template:
    """`tables.md.j2`, a macro a block, with all that it calls."""
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), extensions=["jinja2.ext.do"], **options)
    environment.filters |= {
        "fixed": format_number,
        "points": format_points,
        "median": statistics.median,
        "mean": statistics.mean,
    }
    environment.filters["percent"] = lambda shares: format_percent([shares] if isinstance(shares, float) else shares)
    environment.globals |= {
        "results": load_results,
        "table": format_table,
        "versions": format_versions,
        "ms": format_milliseconds,
        "zip": zip,
    }
    environment.globals |= {
        "recalls": mean_recalls,
        "retrieval_table": lambda rows: render_retrieval_table([Record(**r) for r in rows]),
    }
    return environment.get_template("tables.md.j2")


def load_results(name: str) -> dict[str, Any]:
    """The JSON of a benchmark."""
    return read_json(RESULTS_FOLDER / f"{name}.json")


def format_number(number: float, digits: int = 0) -> str:
    """12345.67 -> "12,346", or with digits after the point."""
    return f"{number:,.{digits}f}"


def format_milliseconds(found: dict[str, float], digits: int = 0) -> list[str]:
    """The cells of a median and a 95th percentile."""
    return [format_number(found["p50"], digits), format_number(found["p95"], digits)]


def format_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A table of Markdown, whose first columns, as many as `text` says, are no figures."""
    lines = [header, ["---"] * text_columns + ["---:"] * (len(header) - text_columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def format_versions(found: dict[str, Any], *packages: str) -> str:
    """ "torch 2.13.0, transformers 5.24.0" out of the versions in the results, in the given order."""
    known = [package for package in packages if package in found["versions"]]
    return ", ".join(f"{package.removesuffix('_torch')} {found['versions'][package]}" for package in known)


def mean_recalls(recipe_row: dict[str, Any]) -> list[list[float]]:
    """Of a row of recipe.json each seed's mean recall of both directions, by test set and language (pt, en)."""
    sets = [f"{name}/test/{code}" for name in ("openmoji", "twemoji", "noto", "photos") for code in ("pt", "en")]
    ways = [zip(*(recipe_row["values"][f"{of}/{way}"] for way in DIRECTIONS), strict=True) for of in sets]
    return [[statistics.mean(both) for both in seeds] for seeds in ways]


def import_demo_runs(runs: list[Path]) -> None:
    """Copy records, run facts and pictures of runs of the demo, a seed each, to where they are committed."""
    records = []
    for run in runs:
        for path in sorted((run / "results").glob("*.json"), reverse=True):
            for record in read_records(path):
                if record.model != "baseline":
                    records.append(asdict(replace(record, model_folder=f"seed-{record.seed}")))
                elif run == runs[0]:  # the same in all
                    records.append(asdict(record))
    facts = {"records": records, "runs": [read_json(run / "run.json") for run in runs]}
    write_json(RESULTS_FOLDER / "demo.json", describe_conditions() | facts)
    for name in ("curves.png", "retrieval.png"):
        save_small_image(runs[0] / name, CODE_ROOT / "docs" / name)


def save_small_image(source: Path, target: Path) -> None:
    """A copy of a drawing in 256 colours, a third of the size and the same to the eye."""
    with PIL.Image.open(source) as picture:
        picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(target, "PNG", optimize=True)


def main(argv: list[str] | None = None) -> None:
    """Fill the blocks of all pages, or check them."""
    args = parse_arguments(ReadmeArguments, __doc__, argv)
    if args.demo:
        import_demo_runs(args.demo)
    for page in find_pages():
        text = (CODE_ROOT / page).read_text(encoding="utf-8")
        if not args.check:
            write_text(CODE_ROOT / page, fill_blocks(page, text))
        elif fill_blocks(page, text) != text:
            sys.exit(f"{page} is not what benchmarks/results says; run `python -m benchmarks.readme`.")


if __name__ == "__main__":
    run_command(main)
