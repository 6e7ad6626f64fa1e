r"""The paper's benchmarks in one command, beside its published figures; what is not available is listed as not run.

    python -m eval.suite paper --model capivara --baseline open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k \
        --data_dir data/benchmarks --output results/paper
    python -m eval.suite elevater --runs runs/a runs/b runs/c --protocol authors --authors_file portuguese_prompts.py
    python -m eval.suite beyond --model capivara --only xm3600 --languages pt hi --data xm3600=data/xm3600
    python -m eval.suite --list

The suite "paper" has all benchmarks, with those beyond the paper (XM3600, Flickr30k-200, Babel-ImageNet); elevater,
beyond, retrieval and classification are parts of it. Data are looked for at --data KEY=PATH, in --data_dir under the
benchmark's key, and on the Hub where its id is known; --list says in which layout.

The same command continues an interrupted suite: what was embedded is taken from --cache_dir, and only the figures are
computed again. Give every protocol an output folder of its own.
"""

import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from capivara_common.cli import parse, run_command, user_errors
from capivara_common.environment import package_versions, processes
from capivara_common.files import read_json, write_json, write_text
from capivara_common.privacy import hide_paths
from eval.benchmarks import Benchmark, load_averages, load_benchmarks
from eval.classification import ClassificationArguments
from eval.classification import evaluate as evaluate_classification
from eval.eval_arguments import SuiteArguments
from eval.layouts import hub_fault, linked_images, local_data, locate
from eval.retrieval import RetrievalArguments
from eval.retrieval import evaluate as evaluate_retrieval
from eval.suite_plan import (
    Measurement,
    Model,
    all_languages,
    chosen,
    one_line,
    plan,
    protocol_of,
)
from eval.suite_tables import Figure, SuiteFigures, average_row, suite_rows, suite_table
from records.schema import Record, read_records

SUMMARY_VERSION = 1


def measure(args: SuiteArguments, benchmark: Benchmark, model: Model, measurement: Measurement) -> list[Record]:
    """Run a task; it writes its result file."""
    shared = {"model": model.name, "output": args.output / measurement.file, "split": benchmark.split}
    shared |= {"role": model.role, "language": measurement.language, "seed": model.seed}
    shared |= {key: getattr(args, key) for key in ("batch_size", "precision", "cache_dir", "device")} | args.limits()
    if benchmark.task == "retrieval":
        columns = {"image_column": benchmark.image_column, "caption_column": benchmark.caption_column}
        columns |= {"caption_positions": benchmark.caption_positions, "gallery": args.gallery}
        columns |= {"dataset_name": benchmark.key}
        made = Path(measurement.data)
        if made.parent == args.output / "layouts":
            shared["image_roots"] = [*args.image_roots, linked_images(made, benchmark.split)]
        return evaluate_retrieval(RetrievalArguments(dataset=measurement.data, **columns, **shared))
    columns = {"image_column": benchmark.image_column, "label_column": benchmark.label_column}
    columns |= {"benchmark": benchmark.prompts, "protocol": protocol_of(benchmark, args)}
    return evaluate_classification(
        ClassificationArguments(images=measurement.data, authors_file=args.authors_file, **columns, **shared)
    )


def run(args: SuiteArguments, suite: str) -> dict[str, Any] | None:
    """Measure what is planned; the summary, on the main process.

    Every process of a launch takes part in a task, so all go through the same plan, which the main one made.
    """
    models, measurements = _on_main(lambda: plan(args, suite))
    benchmarks, by_role = load_benchmarks(), {(model.role, model.run): model for model in models}
    main = processes().is_main_process
    for number, measurement in enumerate(measurements):
        if measurement.status == "planned":
            benchmark, model = benchmarks[measurement.benchmark], by_role[measurement.role, measurement.run]
            _attempt(lambda b=benchmark, m=model, it=measurement: measure(args, b, m, it), measurement)
            if main and measurement.status == "measured":
                measurement.skipped = read_json(args.output / measurement.file)["skipped_rows"]
        if main:
            outcome = measurement.status + (f": {measurement.reason}" if measurement.reason else "")
            print(f"[{number + 1}/{len(measurements)}] {measurement.file.removesuffix('.json')}: {outcome}", flush=True)
    if not main:
        return None
    shutil.rmtree(args.output / "layouts", ignore_errors=True)
    summary = _summary(args, suite, models, measurements)
    write_json(args.output / "suite.json", summary)
    write_text(args.output / "table.md", suite_table(summary))
    return summary


def _attempt(task: Callable[[], list[Record]], measurement: Measurement) -> None:
    """Run a task, and note what became of it: one that fails does not end the suite."""
    try:
        task()
        measurement.status = "measured"
    except (ValueError, OSError, ImportError) as error:
        measurement.status, measurement.reason = "not run", one_line(error)
    except Exception as error:  # want of memory, or a fault of ours: the others are measured all the same
        traceback.print_exc()
        measurement.status, measurement.reason = "not run", f"{type(error).__name__}: {error}"


def _on_main(work: Callable[[], Any]) -> Any:
    """The result of `work` on the main process, or its error, on all processes."""
    outcome: list[Any] = [None]
    if processes().is_main_process:
        try:
            outcome = [work()]
        except (ValueError, OSError, ImportError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _summary(args: SuiteArguments, suite: str, models: list[Model], measurements: list[Measurement]) -> dict[str, Any]:
    """suite.json: what was asked for, what became of each measurement, and all that the table says, as data."""
    figures = [
        Figure(m.benchmark, m.language, record.direction, record.metric, m.role, m.run, record.value, record.n)
        for m in measurements
        if m.status == "measured"
        for record in read_records(args.output / m.file)
    ]
    runs = {role: sum(model.role == role for model in models) for role in ("baseline", "capivara")}
    measured, known = SuiteFigures(figures, runs), load_benchmarks()
    pairs = [(known[key], language) for key, language in dict.fromkeys((m.benchmark, m.language) for m in measurements)]
    rows = suite_rows(pairs, measured, args.metrics, args.published, args.protocol)
    left_out = []
    for average in load_averages():
        members = [benchmark for benchmark, _ in pairs if average.of in benchmark.suite]
        row = average_row(average, rows, members, measured, args.published)
        if row is not None:
            last = max(number for number, other in enumerate(rows) if other["benchmark"] == members[-1].key)
            rows.insert(last + 1, row)
        elif members:
            there = sum(any(row["benchmark"] == m.key and row["capivara"]["measured"] for row in rows) for m in members)
            left_out.append(f"{average.title}: left out, since {there} of its {average.count} sets ran.")
    return {
        "summary_version": SUMMARY_VERSION,
        "suite": suite,
        "protocol": args.protocol,
        "published": args.published,
        "precision": args.precision,
        "versions": package_versions(),
        "models": [asdict(model) | {"name": hide_paths(model.name)} for model in models],
        "measurements": [asdict(m) | {"data": hide_paths(m.data)} for m in measurements],
        "rows": rows,
        "averages_left_out": left_out,
        "notes": {b.key: (b.title, b.protocol_note) for b, _ in pairs},
    }


def listing(args: SuiteArguments, suite: str) -> str:
    """The benchmarks of a suite, a line of their data each."""
    given, lines = local_data(args.data), []
    for benchmark in chosen(args, suite):
        location = locate(benchmark, given, args.data_dir, True, hub_fault)
        others = [language for language in all_languages(benchmark) if language not in benchmark.languages]
        lines += [
            f"{benchmark.key}: {benchmark.title}, {benchmark.task}, {benchmark.metric}, split {benchmark.split}",
            f"    languages {' '.join(benchmark.languages)}{f'; also {chr(32).join(others)}' if others else ''}",
            f"    Hub {benchmark.source['hub_id'] or 'unknown'}; from {benchmark.source['url'] or 'its makers'}",
            f"    local {location.name if location.local else 'not found'}; layout: {benchmark.source['local_layout']}",
        ]
    return "\n".join(lines)


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(SuiteArguments, __doc__, argv)
    if args.list_benchmarks:
        print(listing(args, args.suite))
        return
    summary = run(args, args.suite)
    if summary is None:
        return
    print(suite_table(summary))
    faulty = {m["benchmark"] for m in summary["measurements"] if m["status"] == "not run" and m["local"]}
    if faulty:
        sys.exit(f"error: {', '.join(sorted(faulty))} could not be measured although data were given; see above.")


if __name__ == "__main__":
    run_command(main, resumes=True)
