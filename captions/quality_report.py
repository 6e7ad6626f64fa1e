"""Counts of the translations that look wrong, with examples, out of the parts that a translation wrote.

python -c "from captions.quality_report import write_quality_report; print(write_quality_report('data/pt', 'pt'))"
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import List, Value

from captions.quality import FLAGS
from captions.translators.languages import scripts_of
from common.files import write_json

REPORT_FILE = "quality.json"
EXAMPLES = 5  # of a flag
MAX_EXAMPLE = 200  # letters of a sentence; a caption can be a book
# The column `quality-<language>` of a row: how many captions were translated, and those that look wrong.
QUALITY = {
    "captions": Value("int32"),
    "flagged": List(
        {
            "column": Value("string"),
            "position": Value("int32"),  # among the source's captions
            "flags": List(Value("string")),
            "source": Value("string"),
            "translation": Value("string"),
        }
    ),
}


def write_quality_report(output: Path | str, language: str) -> str:
    """Write `quality.json` of all parts that are there, and return what it says in a few lines.

    Every shard writes it at its end. The last to write sees the parts of all: what appeared since it read is read, too.
    """
    output, written = Path(output), None
    while written != (parts := sorted(output.glob("*.parquet"))):
        report, written = quality_of(parts, language), parts
        write_json(output / REPORT_FILE, report)
    lines = [f"{report['flagged']:,} of {report['captions']:,} translations look wrong, see {output / REPORT_FILE}."]
    lines += [f"{kind['captions']:12,}  {flag}" for flag, kind in report["flags"].items() if kind["captions"]]
    if not report["script_is_checked"]:
        lines.append(f"Letters were not checked: which script {language!r} has is not known here.")
    return "\n".join(lines)


def quality_of(parts: list[Path], language: str) -> dict[str, Any]:
    """Counts over some parts, and the first examples of each flag."""
    rows = captions = flagged = 0
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {flag: [] for flag in FLAGS}
    column = f"quality-{language}"
    for path in parts:
        with pq.ParquetFile(path) as file:
            qualities = file.read(columns=[column])[column].to_pylist()
        rows += len(qualities)
        for quality in qualities:
            captions += quality["captions"]
            flagged += len(quality["flagged"])
            for one in quality["flagged"]:
                counts.update(one["flags"])
                for flag in one["flags"]:
                    if len(examples[flag]) < EXAMPLES:
                        examples[flag].append({name: one[name][:MAX_EXAMPLE] for name in ("source", "translation")})
    return {
        "language": language,
        "script_is_checked": bool(scripts_of(language)),
        "rows": rows,
        "captions": captions,
        "flagged": flagged,
        "flags": {flag: {"captions": counts[flag], "examples": examples[flag]} for flag in FLAGS},
    }
