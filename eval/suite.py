r"""The paper's benchmarks in one command, beside its published figures; what is not available is listed as not run.

    python -m eval.suite paper --model capivara --baseline open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k \
        --data_dir data/benchmarks --output results/paper
    python -m eval.suite elevater --runs runs/a runs/b runs/c --protocol authors --authors_file portuguese_prompts.py
    python -m eval.suite beyond --model capivara --only xm3600 --languages pt hi --data_dir data/benchmarks

The suite "paper" has all benchmarks, with those beyond it (XM3600, Flickr30k-200, Babel-ImageNet); the others are parts
of it. Data are looked for in --data_dir under the benchmark's key, and on the Hub where its id is known; its file
in eval/benchmarks says in which layout (`local_layout`). The same command continues an interrupted suite: what was
embedded is taken from --cache_dir. Give every protocol an output folder of its own.
"""

import math
import sys
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jinja2
import pandas

from capivara_common.cli import UsageError, flag, parse_arguments, run_command, unknown_name_message
from capivara_common.environment import package_versions, process_state
from capivara_common.files import read_json, seed_folders, write_json, write_text
from capivara_common.privacy import hide_paths
from eval.benchmarks import (
    BENCHMARKS_FOLDER,
    SUITES,
    Benchmark,
    find_published_name,
    load_benchmarks,
    locate_data,
    read_benchmark,
)
from eval.classification import ClassificationArguments
from eval.classification import evaluate as evaluate_classification
from eval.embeddings import EmbeddingArguments
from eval.records.schema import ROLE_NAMES, Record, read_records
from eval.records.tables import compute_means
from eval.retrieval import RetrievalArguments
from eval.retrieval import evaluate as evaluate_retrieval
from modeling_capivara.two_towers import load_embedder

SUMMARY_VERSION = 1
GROUP_COLUMNS = ["benchmark", "language", "direction", "role"]  # what a mean over runs is of
TABLE_TEMPLATE = Path(__file__).parent / "suite.md.j2"
GONE = {  # flags of earlier versions -> what there is instead
    "gallery": "`python -m eval.retrieval` draws the best and the worst queries beside its result",
    "list": "the files in eval/benchmarks say where the data come from and in which layout",
    "metrics": "the result file of a benchmark has all its metrics",
    "data": "put the data, or a link to them, into --data_dir under the benchmark's key",
    "published": "the benchmark's file in eval/benchmarks has the figures of the light recipe, too",
    "trust_remote_code": "a model's own code is not run; transformers' classes are read",
    "offline": "set HF_HUB_OFFLINE=1, as for everything of Hugging Face",
}


@dataclass
class SuiteArguments(EmbeddingArguments):
    """Flags of `eval.suite`."""

    gone = GONE
    suite: str = flag("paper", f"Which benchmarks: {', '.join(SUITES)}.", positional=True, nargs="?")
    model: str | None = flag(None, "Folder or Hub id of a model of two towers; the first run.")
    runs: list[str] = flag([], "Models of one recipe and several seeds, or the folder of them: mean ± deviation.")
    baseline: str | None = flag(None, "As --model, or open_clip:NAME:PRETRAINED, open_clip:local-dir:FOLDER.")
    output: Path = flag(Path("results/suite"), "Folder of result files, suite.json and table.md.")
    data_dir: Path | None = flag(None, "Folder with local data, each under its key.")
    only: list[str] = flag([], "Keys of the benchmarks to measure, of any suite.")
    languages: list[str] = flag([], "Codes, for benchmarks that have several.")
    protocol: Literal["ours", "authors"] = flag(
        "ours", "Names and prompts: this project's, or those of the published figures."
    )
    authors_file: str | None = flag(None, "Path of the authors' portuguese_prompts.py, for protocol authors.")


def select_benchmarks(args: SuiteArguments) -> list[Benchmark]:
    """The benchmarks of a suite, or those that are asked for; a wrong argument lists the known ones."""
    every = load_benchmarks()
    languages = dict.fromkeys(code for benchmark in every.values() for code in benchmark.available_languages)
    asked = [("suite", [args.suite], SUITES), ("benchmark", args.only, every), ("language", args.languages, languages)]
    for what, names, known in asked:
        if wrong := [name for name in names if name not in known]:
            raise UsageError(unknown_name_message(wrong[0], what, list(known), f"There are {', '.join(known)}."))
    if args.data_dir and not args.data_dir.is_dir():
        raise UsageError(f"--data_dir {args.data_dir} is no folder.")
    if args.protocol == "authors" and not args.authors_file:
        raise UsageError("--protocol authors needs --authors_file, the path of their portuguese_prompts.py.")
    found = [b for b in every.values() if (b.key in args.only if args.only else args.suite in b.suite)]
    if args.languages and not any(code in b.available_languages for code in args.languages for b in found):
        raise UsageError(f"None of the benchmarks has one of the languages {args.languages}.")
    return found


def load_models(args: SuiteArguments) -> list[dict[str, Any]]:
    """The models as suite.json has them, loaded once: a wrong one ends the suite before long work.

    `run` is the number among those of its role, `seed` what its run.json says, `published` what it, or its base, was
    published as. ValueError where there is none, one can't be loaded, or two runs are the same model.
    """
    names = [args.model] if args.model else []
    for name in args.runs:
        several = [] if (Path(name) / "config.json").is_file() else list(map(str, seed_folders(Path(name))))
        names += several or [name]
    if not names:
        raise UsageError("No model is given: take --model MODEL, or --runs RUN RUN RUN.")
    names = list(dict.fromkeys(names))  # --model may be one of --runs
    runs = [("capivara", run, name) for run, name in enumerate(names)]
    models = []
    for role, run, name in [("baseline", 0, args.baseline)] * bool(args.baseline) + runs:
        facts, is_baseline = Path(name) / "run.json", role == "baseline"
        made = {} if is_baseline or not facts.is_file() else read_json(facts)
        model = load_embedder(name, "cpu", is_baseline, args.precision)
        one = {"name": name, "role": role, "run": run, "seed": made.get("seed"), "fingerprint": model.fingerprint}
        base = str(made.get("config", {}).get("model", ""))
        one |= {"published": find_published_name(name, role, **model.metadata)}
        models.append(
            one | model.metadata | {"base_published": find_published_name(base, "baseline", **model.metadata)}
        )
    if len({model["fingerprint"] for model in models[-len(runs) :]}) < len(runs):
        raise ValueError("Two of --runs hold the same model, so that their deviation would mean nothing.")
    return models


def plan_measurements(args: SuiteArguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The models, and what is to be measured: an entry a benchmark, language and model, as suite.json has them.

    An entry's `status` is "planned", "measured" or, with the `reason`, "not run"; `local` says that its data lie here,
    so that "not run" is a fault; `data` is what the task takes, and `skipped` counts images that could not be read.
    """
    benchmarks, asked = select_benchmarks(args), args.languages
    models, measurements = load_models(args), []
    for benchmark in benchmarks:
        place = locate_data(benchmark, args.data_dir)
        languages = [code for code in benchmark.available_languages if code in asked] if asked else benchmark.languages
        if not languages and benchmark.key in args.only:  # named, so that it must be heard of
            languages, known = [benchmark.language], " ".join(benchmark.available_languages)
            reason = f"it is in {known}, and --languages asks for {' '.join(asked)}"
            place = {"data": "", "local": False, "reason": reason}
        for language in languages:
            for model in models:
                suffix = "baseline" if model["role"] == "baseline" else f"{model['role']}-{model['run']}"
                one = {"benchmark": benchmark.key, "language": language, "role": model["role"], "run": model["run"]}
                one |= {"file": f"{benchmark.key}-{language}-{suffix}.json", "skipped": 0, **place}
                measurements.append(one | {"status": "not run" if one["reason"] else "planned"})
    return models, measurements


def run_measurement(
    args: SuiteArguments, benchmark: Benchmark, model: dict[str, Any], measurement: dict[str, Any]
) -> list[Record]:
    """Run a task; it writes its result file."""
    shared = {known.name: getattr(args, known.name) for known in fields(EmbeddingArguments)}
    shared |= {"model": model["name"], "output": args.output / measurement["file"], "split": benchmark.split}
    shared |= {"role": model["role"], "language": measurement["language"], "seed": model["seed"]}
    shared |= {"image_column": benchmark.image_column}
    if benchmark.task == "retrieval":
        shared |= {"caption_column": benchmark.caption_column, "caption_positions": benchmark.caption_positions}
        task = RetrievalArguments(dataset=measurement["data"], dataset_name=benchmark.key, **shared)
        return evaluate_retrieval(task, draw_sheet=False)
    shared |= {"protocol": args.protocol if benchmark.protocol == "ours" else benchmark.protocol}
    shared |= {"benchmark": benchmark.prompts, "authors_file": args.authors_file}
    shared |= {"label_column": benchmark.label_column}
    return evaluate_classification(ClassificationArguments(images=measurement["data"], **shared))


def run_suite(args: SuiteArguments) -> dict[str, Any] | None:
    """Measure what is planned, each task on all processes, going on where one fails; the main one has the summary."""
    models, measurements = plan_measurements(args)
    main, benchmarks = process_state().is_main_process, load_benchmarks()
    by_role = {(model["role"], model["run"]): model for model in models}
    for number, one in enumerate(measurements, 1):
        if one["status"] == "planned":
            try:
                run_measurement(args, benchmarks[one["benchmark"]], by_role[one["role"], one["run"]], one)
                one["status"] = "measured"
            except Exception as error:  # the others are measured all the same
                kind = ""
                if not isinstance(error, ValueError | OSError | ImportError):  # want of memory, or a fault of ours
                    kind = f"{type(error).__name__}: "
                    traceback.print_exc()
                one |= {"status": "not run", "reason": kind + " ".join(hide_paths(str(error)).split())}
        if main:
            if one["status"] == "measured":
                one["skipped"] = read_json(args.output / one["file"])["skipped_rows"]
            outcome = ": ".join(filter(None, (one["status"], one["reason"])))
            print(f"[{number}/{len(measurements)}] {one['file'].removesuffix('.json')}: {outcome}", flush=True)
    if not main:
        return None
    summary = _build_summary(args, models, measurements)
    write_json(args.output / "suite.json", summary)
    write_text(args.output / "table.md", render_suite_table(summary))
    return summary


def _build_summary(
    args: SuiteArguments, models: list[dict[str, Any]], measurements: list[dict[str, Any]]
) -> dict[str, Any]:
    """suite.json: what was asked for, what became of each measurement, and all that the table says, as data."""
    measured = [one for one in measurements if one["status"] == "measured"]
    values = [vars(record) | one for one in measured for record in read_records(args.output / one["file"])]
    runs, known = {role: sum(m["role"] == role for m in models) for role in ROLE_NAMES}, load_benchmarks()
    pairs = dict.fromkeys((one["benchmark"], one["language"]) for one in measurements)
    pairs = [(known[key], language) for key, language in pairs]
    published = {"baseline": models[-1]["base_published"]} | {model["role"]: model["published"] for model in models}
    rows, left_out = build_suite_rows(pairs, values, runs, args.protocol, published)
    return {
        "summary_version": SUMMARY_VERSION,
        **{name: getattr(args, name) for name in ("suite", "protocol", "precision")},
        "versions": package_versions(),
        "models": [model | {"name": hide_paths(model["name"])} for model in models],
        "measurements": [one | {"data": hide_paths(one["data"])} for one in measurements],
        "rows": rows,
        "averages_left_out": left_out,
        "notes": {b.key: (b.title, b.protocol_note) for b, _ in pairs},
    }


def build_suite_rows(
    pairs: list[tuple[Benchmark, str]],
    values: list[dict[str, Any]],
    model_counts: dict[str, int],
    protocol: str = "ours",
    published: dict[str, str | None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a suite's table, as data, in per cent; and a line where the average of ELEVATER is left out.

    `values` have the fields of a `Record`, with `benchmark`, `role` and `run`, the number of the model of its role;
    `runs` is role -> number of its models, `published` role -> what they were published as, their role where None.
    """
    own = pandas.DataFrame(
        [(b.key, language, b.metric) for b, language in pairs], columns=[*GROUP_COLUMNS[:2], "metric"]
    )
    frame = pandas.DataFrame(values, columns=[*GROUP_COLUMNS, "metric", "run", "value", "n"]).merge(own)
    frame["value"] = 100 * frame["value"].astype(float)
    average, left_out = read_benchmark(BENCHMARKS_FOLDER / "elevater.json"), []
    members = [b.key for b, _ in pairs if average.key in b.suite]
    of_sets = frame[frame["benchmark"].isin(members)]
    of_runs = compute_means(of_sets, ["role", "run"]).reset_index()
    if len(members) == average.count and (of_runs["seeds"] == average.count).sum() == sum(model_counts.values()):
        of_runs = of_runs.assign(value=of_runs["mean"], benchmark=average.key, language="pt", direction="", n=0)
        frame = pandas.concat([frame, of_runs])
        last = max(number for number, (b, _) in enumerate(pairs) if b.key in members)
        pairs = [*pairs[: last + 1], (average, "pt"), *pairs[last + 1 :]]
    elif members:
        there = of_sets[of_sets["role"] == "capivara"].groupby("benchmark")["run"].nunique()
        there = (there == model_counts["capivara"]).sum()
        left_out.append(f"{average.title}: left out, since {there} of its {average.count} sets ran.")
    found = compute_means(frame, GROUP_COLUMNS).reset_index()
    found = found[found["seeds"] == found["role"].map(model_counts)]  # a mean of fewer runs would mislead
    published = published or {role: role for role in model_counts}
    cells = [
        {
            **dict(zip(GROUP_COLUMNS, (b.key, language, direction, role), strict=True)), "of": b,
            "published": b.get_published_figure(published[role], direction) if language == b.language else None,
        }
        for b, language in pairs for direction in b.directions for role in model_counts
    ]  # fmt: skip
    cells = pandas.DataFrame(cells).merge(found, "left")
    cells["difference"] = cells["mean"] - [of["mean"] if of else math.nan for of in cells["published"]]
    rows = [_build_row(of, protocol) for _, of in cells.groupby(GROUP_COLUMNS[:3], sort=False)]
    like = all(row["like_for_like"] for row in rows if row["benchmark"] in members)
    return [row | {"like_for_like": like} if row["benchmark"] == average.key else row for row in rows], left_out


def _build_row(cells: pandas.DataFrame, protocol: str) -> dict[str, Any]:
    """Published and measured figures of the roles, and the measured minus the published ones in points."""
    first = cells.iloc[0]
    benchmark: Benchmark = first["of"]
    title = benchmark.title + ("" if benchmark.languages == (first["language"],) else f" ({first['language']})")
    section = "beyond" if "beyond" in benchmark.suite else "paper"
    # Of texts `n` counts captions, of the average nothing.
    images = [int(n) for n in cells["n"] if n > 0 and first["direction"] != "text_to_image"]
    like = benchmark.like_for_like and (benchmark.test_images is None or {*images[:1]} <= {benchmark.test_images})
    like = like and (benchmark.task == "retrieval" or benchmark.protocol == "babel" or protocol == "authors")
    row = {"benchmark": benchmark.key, "title": title, "section": section, "language": first["language"]}
    row |= {"direction": first["direction"], "metric": benchmark.metric, "images": images[0] if images else None}
    row |= {"test_images": benchmark.test_images, "like_for_like": like}
    for of in cells.itertuples():
        std = None if math.isnan(of.deviation) else of.deviation
        measured = None if math.isnan(of.mean) else {"mean": of.mean, "std": std, "runs": int(of.seeds)}
        difference = None if math.isnan(of.difference) else of.difference
        row[of.role] = {"published": of.published, "measured": measured, "difference": difference}
    return row


def render_suite_table(summary: dict[str, Any]) -> str:
    """A suite's summary as Markdown: published and measured figures, their differences, and what was not run."""
    rows, titles, measurements = summary["rows"], summary["notes"], pandas.DataFrame(summary["measurements"])
    facts = [
        f"{row['title']}: {row['images']:,} images; the published split has {row['test_images']:,}."
        for row in rows
        if row["images"] and row["test_images"] not in (None, row["images"])
    ]
    for one in measurements[measurements["skipped"] > 0].itertuples():
        facts.append(f"{one.file.removesuffix('.json')}: {one.skipped:,} images could not be read and are left out.")
    there = {row["benchmark"] for row in rows if any(row[role]["measured"] for role in ROLE_NAMES)}
    facts += [f"{title}: {note}" for key, (title, note) in titles.items() if note and key in there]
    facts += summary["averages_left_out"]
    lost = measurements[measurements["status"] != "measured"]
    for (benchmark, reason), of in lost.groupby(["benchmark", "reason"], sort=False):
        which = "; ".join(f"{one.language}, {one.role} {one.run}" for one in of.itertuples())
        some = f" ({which})" if len(of) % len(summary["models"]) else ""
        facts.append(f"{benchmark}{some}: not run: {reason.rstrip('.')}.")
    markdown = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = markdown.from_string(TABLE_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(summary, names=ROLE_NAMES, facts=facts).strip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    if summary := run_suite(parse_arguments(SuiteArguments, __doc__, argv)):
        print(render_suite_table(summary))
        lost = {one["benchmark"] for one in summary["measurements"] if one["status"] == "not run" and one["local"]}
        if lost:
            sys.exit(f"error: {', '.join(sorted(lost))} could not be measured although data were given; see above.")


if __name__ == "__main__":
    run_command(main, resumable=True)
