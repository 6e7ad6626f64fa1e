r"""Run all benchmarks of the paper with one command and compare the results with the published results.

    python -m eval.suite paper --model capivara --baseline open_clip:xlm-roberta-base-ViT-B-32:laion5b_s13b_b90k \
        --data_dir data/benchmarks --output results/paper
    python -m eval.suite elevater --runs runs/a runs/b runs/c --protocol authors --authors_file portuguese_prompts.py
    python -m eval.suite beyond --model capivara --only xm3600 --languages pt hi --data_dir data/benchmarks

A suite is a set of benchmarks. The suite "paper" has all benchmarks, including three that the paper does not have
(XM3600, Flickr30k-200, Babel-ImageNet). The other suites are subsets.

The data of a benchmark are looked up in the folder --data_dir/KEY, then on the Hub. KEY is its name, such as "xm3600".
The field `local_layout` in eval/benchmarks/KEY.json describes the folder. Benchmarks without data are listed as not
run.

To continue an interrupted suite, repeat the command: embeddings are taken from --cache_dir. Use another output folder
for each --protocol, because the result files have the same names.
"""

import math
import sys
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jinja2
import pandas

from capivara_common.cli import UsageError, flag, parse_arguments, run_main_and_report_user_errors, unknown_name_message
from capivara_common.environment import get_or_init_distributed_state, package_versions
from capivara_common.files import list_seed_run_folders, read_json, write_json, write_text
from capivara_common.privacy import shorten_absolute_paths
from eval.benchmarks import BENCHMARKS_FOLDER, SUITES, Benchmark, find_published_name, load_benchmarks, read_benchmark
from eval.classification import ClassificationArguments, evaluate_zero_shot_and_write_result
from eval.embeddings import EmbeddingArguments
from eval.records.result_files import ROLE_NAMES, Record, read_records
from eval.records.tables import compute_means_and_deviations
from eval.retrieval import RetrievalArguments, evaluate_retrieval_and_write_result
from modeling_capivara.two_towers import load_embedder

SUMMARY_VERSION = 1
# Results that agree in these columns belong to one cell of the table. The cell shows their mean, for example over the
# runs with different seeds.
GROUP_COLUMNS = ["benchmark", "language", "direction", "role"]
TABLE_TEMPLATE = Path(__file__).parent / "suite.md.j2"


@dataclass
class SuiteArguments(EmbeddingArguments):
    """Command-line arguments of `eval.suite`, which compares measured and published benchmark results."""

    suite: str = flag("paper", f"Set of benchmarks to run: {', '.join(SUITES)}.", positional=True, nargs="?")
    model: str | None = flag(
        None, "Folder or Hub id of a CLIP-like model. With --runs, this model is added to the runs."
    )
    runs: list[str] = flag(
        [],
        "Models trained with different seeds, or their folder. The table shows their mean ± standard deviation.",
    )
    baseline: str | None = flag(
        None, "Baseline: folder or Hub id, open_clip:NAME:PRETRAINED or open_clip:local-dir:FOLDER."
    )
    output: Path = flag(Path("results/suite"), "Folder to write the result files, suite.json and table.md to.")
    data_dir: Path | None = flag(None, "Folder with local data: one subfolder per benchmark, named by its key.")
    only: list[str] = flag([], "Keys of the benchmarks to run, from any suite. Default: all benchmarks of the suite.")
    languages: list[str] = flag([], "Language codes to run. Default: the languages in the file of each benchmark.")
    protocol: Literal["ours", "authors"] = flag(
        "ours", "Class names and prompts: of this project (ours), or of CAPIVARA's authors, as published (authors)."
    )
    authors_file: str | None = flag(
        None, "Path of portuguese_prompts.py of CAPIVARA's authors, for --protocol authors."
    )


def check_arguments_and_select_benchmarks(args: SuiteArguments) -> list[Benchmark]:
    """Check the command-line arguments, and return the benchmarks to run.

    These are the benchmarks that --only names. Without --only, they are all benchmarks of the suite.

    Raises:
        UsageError: If a name is unknown (the message lists the known names), or if arguments contradict each other.
    """
    benchmarks = load_benchmarks()
    languages = dict.fromkeys(code for benchmark in benchmarks.values() for code in benchmark.available_languages)
    checks = [("suite", [args.suite], SUITES), ("benchmark", args.only, benchmarks)]
    checks.append(("language", args.languages, languages))
    for kind, names, known in checks:
        if wrong := [name for name in names if name not in known]:
            raise UsageError(unknown_name_message(wrong[0], kind, list(known), f"Known are {', '.join(known)}."))
    if args.data_dir and not args.data_dir.is_dir():
        raise UsageError(f"--data_dir must be an existing folder, got {args.data_dir}.")
    if args.protocol == "authors" and not args.authors_file:
        raise UsageError("--protocol authors requires --authors_file, the path of the authors' portuguese_prompts.py.")
    selected = [b for b in benchmarks.values() if (b.key in args.only if args.only else args.suite in b.suite)]
    if args.languages and not any(code in b.available_languages for code in args.languages for b in selected):
        raise UsageError(f"At least one benchmark must have one of the --languages, got {' '.join(args.languages)}.")
    return selected


def _check_and_describe_models(args: SuiteArguments) -> list[dict[str, Any]]:
    """Load each model of the suite once, and describe it: first the baseline, then the models to compare with it.

    Returns:
        One dict per model, to be stored in suite.json. Its main keys are:

        - "name": folder or Hub id.
        - "role": "baseline" or "capivara".
        - "run": number of the model within its role, from 0.
        - "seed": seed of the training run, or None.
        - "fingerprint": digest that identifies the model.
        - "published" and "base_published": name of the published results of the model and of its base model (see
          `find_published_name`), or None.

    Raises:
        UsageError: If no model is given.
        ValueError: If a model can't be loaded, or if two runs are the same model.
    """
    names = [args.model] if args.model else []
    for name in args.runs:
        is_model = (Path(name) / "config.json").is_file()
        seed_runs = [] if is_model else list(map(str, list_seed_run_folders(Path(name))))
        names += seed_runs or [name]
    if not names:
        raise UsageError("A model is required. Give --model MODEL, or --runs RUN RUN RUN.")
    # A model that is given in both --model and --runs is measured only once.
    names = list(dict.fromkeys(names))
    runs = [("capivara", run, name) for run, name in enumerate(names)]
    models = []
    for role, run, name in [("baseline", 0, args.baseline)] * bool(args.baseline) + runs:
        run_file, is_baseline = Path(name) / "run.json", role == "baseline"
        run_data = {} if is_baseline or not run_file.is_file() else read_json(run_file)
        # A model that can't be loaded ends the suite here, before the long work starts. Only the metadata and the
        # fingerprint, which tells models apart, are needed. The precision "auto" would measure which precision is
        # fastest, so float32 replaces it.
        precision = "float32" if args.precision == "auto" else args.precision
        model = load_embedder(name, "cpu", is_baseline, precision)
        entry = {"name": name, "role": role, "run": run, "seed": run_data.get("seed"), "fingerprint": model.fingerprint}
        base = str(run_data.get("config", {}).get("model", ""))
        entry |= {"published": find_published_name(name, role, **model.metadata)} | model.metadata
        entry["base_published"] = find_published_name(base, "baseline", **model.metadata)
        models.append(entry)
    if len({model["fingerprint"] for model in models[-len(runs) :]}) < len(runs):
        raise ValueError("--runs must be different models, but two of them have the same weights. Remove one.")
    return models


def _check_models_and_plan_measurements(args: SuiteArguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Plan the measurements: one for each benchmark, language and model.

    Returns:
        The models (see `_check_and_describe_models`), and one dict per measurement, to be stored in suite.json:

        - "benchmark", "language", "role" and "run" identify the measurement.
        - "file": name of its result file.
        - "status": "planned" or "not run"; "measured" after a successful measurement.
        - "reason": why the status is "not run".
        - "data": path or Hub id of the data.
        - "local": whether the data are in --data_dir. The status "not run" is then an error.
        - "skipped": number of images that could not be read.
    """
    benchmarks, requested = check_arguments_and_select_benchmarks(args), args.languages
    models, measurements = _check_and_describe_models(args), []
    for benchmark in benchmarks:
        source = benchmark.find_data(args.data_dir)
        languages = benchmark.languages
        if requested:
            languages = [code for code in benchmark.available_languages if code in requested]
        # If the user named this benchmark in --only, the table must list it and say why it was not measured.
        if not languages and benchmark.key in args.only:
            languages, known = [benchmark.language], " ".join(benchmark.available_languages)
            reason = f"its languages are {known}, but --languages is {' '.join(requested)}"
            source = {"data": "", "local": False, "reason": reason}
        for language in languages:
            for model in models:
                suffix = "baseline" if model["role"] == "baseline" else f"{model['role']}-{model['run']}"
                entry = {"benchmark": benchmark.key, "language": language, "role": model["role"], "run": model["run"]}
                entry |= {"file": f"{benchmark.key}-{language}-{suffix}.json", "skipped": 0, **source}
                measurements.append(entry | {"status": "not run" if entry["reason"] else "planned"})
    return models, measurements


def run_measurement(args: SuiteArguments, model: dict[str, Any], measurement: dict[str, Any]) -> list[Record]:
    """Measure one model on one benchmark in one language, and write the result file.

    Args:
        args: Arguments of the suite.
        model: The model, a dict with "name" (folder or Hub id), "role" ("baseline" or "capivara") and "seed" (of its
            training run, or None).
        measurement: The plan, a dict with "benchmark" (its key), "data" (path or Hub id), "language" (code) and "file"
            (name of the result file).

    Returns:
        The measured values: one record per metric, and for retrieval also per direction.
    """
    benchmark = load_benchmarks()[measurement["benchmark"]]
    options = {field.name: getattr(args, field.name) for field in fields(EmbeddingArguments)}
    options |= {"model": model["name"], "output": args.output / measurement["file"], "split": benchmark.split}
    options |= {"role": model["role"], "language": measurement["language"], "seed": model["seed"]}
    options["image_column"] = benchmark.image_column
    if benchmark.task == "retrieval":
        options |= {"caption_column": benchmark.caption_column, "caption_positions": benchmark.caption_positions}
        task = RetrievalArguments(dataset=measurement["data"], dataset_name=benchmark.key, **options)
        return evaluate_retrieval_and_write_result(task, draw_sheet=False)
    options["protocol"] = args.protocol if benchmark.protocol == "ours" else benchmark.protocol
    options |= {"benchmark": benchmark.prompts, "authors_file": args.authors_file}
    options["label_column"] = benchmark.label_column
    return evaluate_zero_shot_and_write_result(ClassificationArguments(images=measurement["data"], **options))


def run_suite(args: SuiteArguments) -> dict[str, Any] | None:
    """Run all measurements of the suite, and write their summary to suite.json and table.md.

    The processes of a distributed launch work on each measurement together. If a measurement fails, the suite records
    the reason and continues.

    Returns:
        On the main process the summary, which is the content of suite.json; None on the other processes.
    """
    models, measurements = _check_models_and_plan_measurements(args)
    is_main = get_or_init_distributed_state().is_main_process
    models_by_run = {(model["role"], model["run"]): model for model in models}
    for number, measurement in enumerate(measurements, 1):
        if measurement["status"] == "planned":
            try:
                run_measurement(args, models_by_run[measurement["role"], measurement["run"]], measurement)
                measurement["status"] = "measured"
            except Exception as error:
                # Every error is caught, so that one benchmark that fails does not end the others.
                error_type = ""
                # ValueError, OSError and ImportError have messages for users. Other errors, such as too little memory
                # or a bug, may have unclear messages, so their type and traceback are shown.
                if not isinstance(error, ValueError | OSError | ImportError):
                    error_type = f"{type(error).__name__}: "
                    traceback.print_exc()
                message = " ".join(shorten_absolute_paths(str(error)).split())
                measurement |= {"status": "not run", "reason": error_type + message}
        if is_main:
            if measurement["status"] == "measured":
                measurement["skipped"] = read_json(args.output / measurement["file"])["skipped_rows"]
            outcome = ": ".join(filter(None, (measurement["status"], measurement["reason"])))
            print(f"[{number}/{len(measurements)}] {measurement['file'].removesuffix('.json')}: {outcome}", flush=True)
    if not is_main:
        return None
    summary = _build_suite_json_content(args, models, measurements)
    write_json(args.output / "suite.json", summary)
    write_text(args.output / "table.md", render_suite_table(summary))
    return summary


def _build_suite_json_content(
    args: SuiteArguments, models: list[dict[str, Any]], measurements: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of suite.json: settings, models, measurements, and the rows of the table.

    Args:
        args: Arguments of the suite.
        models: The models, see `_check_and_describe_models`.
        measurements: All measurements, see `_check_models_and_plan_measurements`. The results of measurements with the
            status "measured" are read from the result files.
    """
    values = []
    for measurement in measurements:
        if measurement["status"] == "measured":
            values += [vars(record) | measurement for record in read_records(args.output / measurement["file"])]
    model_counts = {role: sum(model["role"] == role for model in models) for role in ROLE_NAMES}
    keys = dict.fromkeys((measurement["benchmark"], measurement["language"]) for measurement in measurements)
    pairs = [(load_benchmarks()[key], language) for key, language in keys]
    published = {"baseline": models[-1]["base_published"]} | {model["role"]: model["published"] for model in models}
    rows, averages_left_out = build_suite_rows_and_remarks(pairs, values, model_counts, args.protocol, published)
    return {
        "summary_version": SUMMARY_VERSION,
        **{name: getattr(args, name) for name in ("suite", "protocol", "precision")},
        "versions": package_versions(),
        "models": [model | {"name": shorten_absolute_paths(model["name"])} for model in models],
        "measurements": [entry | {"data": shorten_absolute_paths(entry["data"])} for entry in measurements],
        "rows": rows,
        "averages_left_out": averages_left_out,
        "notes": {benchmark.key: (benchmark.title, benchmark.protocol_note) for benchmark, _ in pairs},
    }


def build_suite_rows_and_remarks(
    pairs: list[tuple[Benchmark, str]],
    values: list[dict[str, Any]],
    model_counts: dict[str, int],
    protocol: str,
    published: dict[str, str | None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Build the rows of a suite's table, which shows measured results next to published results, in percent.

    A model's role is "baseline", or "capivara" if it is compared with the baseline.

    Args:
        pairs: Tuples (benchmark, language). Each gives one row; for retrieval, one row per direction.
        values: One dict per measured result: the fields of `Record`, "benchmark" (its key), "role" and "run" (number of
            the model within its role).
        model_counts: `{role: number of models}`.
        protocol: Source of prompts: "ours" (this project) or "authors" (CAPIVARA's authors).
        published: `{role: name}`. The name selects published results, see `Benchmark.get_published_figure`. None shows
            no results.

    Returns:
        A tuple (rows, remarks):

        - A row is a dict: title, language and direction of the benchmark, and for each role the measured result, the
          published result and their difference.
        - A remark is a text about an average that is omitted, because results of some datasets are missing.
    """
    metrics = [(benchmark.key, language, benchmark.metric) for benchmark, language in pairs]
    metrics = pandas.DataFrame(metrics, columns=["benchmark", "language", "metric"])
    # A result file can have several metrics. The merge keeps only the metric that was published for the benchmark.
    frame = pandas.DataFrame(values, columns=[*GROUP_COLUMNS, "metric", "run", "value", "n"]).merge(metrics)
    frame["value"] = 100 * frame["value"].astype(float)
    average, averages_left_out = read_benchmark(BENCHMARKS_FOLDER / "elevater.json"), []
    members = [benchmark.key for benchmark, _ in pairs if average.key in benchmark.suite]
    member_values = frame[frame["benchmark"].isin(members)]
    # The average over the ELEVATER datasets is shown only if each model was measured on all of them. The column `seeds`
    # has the number of averaged rows. Here each row is one dataset, so `seeds` is the number of datasets.
    run_means = compute_means_and_deviations(member_values, ["role", "run"]).reset_index()
    if len(members) == average.count and (run_means["seeds"] == average.count).sum() == sum(model_counts.values()):
        run_means = run_means.assign(value=run_means["mean"], benchmark=average.key, language="pt", direction="", n=0)
        frame = pandas.concat([frame, run_means])
        last = max(number for number, (benchmark, _) in enumerate(pairs) if benchmark.key in members)
        pairs = [*pairs[: last + 1], (average, "pt"), *pairs[last + 1 :]]
    elif members:
        run_counts = member_values[member_values["role"] == "capivara"].groupby("benchmark")["run"].nunique()
        complete = (run_counts == model_counts["capivara"]).sum()
        averages_left_out.append(f"{average.title}: omitted, since only {complete} of {average.count} datasets ran.")
    means = compute_means_and_deviations(frame, GROUP_COLUMNS)
    # A mean is shown only if all models of the role were measured, because a mean of fewer models would mislead.
    means = means[means["seeds"] == means.index.get_level_values("role").map(model_counts)].to_dict("index")
    rows = []
    for benchmark, language in pairs:
        for direction in benchmark.directions:
            row_means = {role: means.get((benchmark.key, language, direction, role)) for role in published}
            rows.append(_build_suite_table_row(benchmark, language, direction, row_means, published, protocol))
    members_comparable = all(row["like_for_like"] for row in rows if row["benchmark"] in members)
    for row in rows:
        if row["benchmark"] == average.key:
            row["like_for_like"] = members_comparable
    return rows, averages_left_out


def _build_suite_table_row(
    benchmark: Benchmark, language: str, direction: str, means: dict[str, Any], published: dict[str, Any], protocol: str
) -> dict[str, Any]:
    """Build a table row for a benchmark, language and direction.

    Args:
        benchmark: The benchmark.
        language: Language code of the measurement.
        direction: Search direction; "" for classification.
        means: For each role, a row of `compute_means_and_deviations` as a dict, or None if no mean is shown.
        published: For each role, the name of the model whose published results are shown, or None.
        protocol: Source of class names and prompts, "ours" or "authors".

    Returns:
        A dict that describes the benchmark and has these keys:

        - "like_for_like": whether measured and published results are comparable.
        - "baseline" and "capivara": a dict with "published" and "measured" (each None, or a dict with "mean" and "std"
          in percent) and "difference" (measured minus published, in percentage points).
    """
    title = benchmark.title + ("" if benchmark.languages == (language,) else f" ({language})")
    section = "beyond" if "beyond" in benchmark.suite else "paper"
    # `n` is the number of images, with two exceptions: in text-to-image retrieval, it is the number of captions, and
    # for the average over benchmarks, it is 0.
    counts = [int(measured["n"]) for measured in means.values() if measured and direction != "text_to_image"]
    images = next(filter(None, counts), None)
    same_number = None in (benchmark.test_images, images) or images == benchmark.test_images
    same_prompts = benchmark.task == "retrieval" or benchmark.protocol == "babel" or protocol == "authors"
    like_for_like = benchmark.like_for_like and same_number and same_prompts
    row = {"benchmark": benchmark.key, "title": title, "section": section, "language": language}
    row |= {"direction": direction, "metric": benchmark.metric, "images": images}
    row |= {"test_images": benchmark.test_images, "like_for_like": like_for_like}
    for role, name in published.items():
        figure = benchmark.get_published_figure(name, direction) if language == benchmark.language else None
        row[role] = {"published": figure, "measured": None, "difference": None}
        if result := means[role]:
            std = None if math.isnan(result["deviation"]) else result["deviation"]
            row[role]["measured"] = {"mean": result["mean"], "std": std, "runs": int(result["seeds"])}
            row[role]["difference"] = result["mean"] - figure["mean"] if figure else None
    return row


def render_suite_table(summary: dict[str, Any]) -> str:
    """Render the results of a suite as Markdown tables, with remarks below them.

    There is a table for the benchmarks of the paper and a table for the others. The remarks name deviations from the
    published measurements, unreadable images, omitted averages, and benchmarks that were not run.

    Args:
        summary: The content of suite.json, as a dict.

    Returns:
        The Markdown text.
    """
    rows, titles, measurements = summary["rows"], summary["notes"], pandas.DataFrame(summary["measurements"])
    remarks = [
        f"{row['title']}: {row['images']:,} images were measured; the published split has {row['test_images']:,}."
        for row in rows
        if row["images"] and row["test_images"] not in (None, row["images"])
    ]
    for entry in measurements[measurements["skipped"] > 0].itertuples():
        name = entry.file.removesuffix(".json")
        remarks.append(f"{name}: {entry.skipped:,} images could not be read and are omitted.")
    measured = {row["benchmark"] for row in rows if any(row[role]["measured"] for role in ROLE_NAMES)}
    remarks += [f"{title}: {note}" for key, (title, note) in titles.items() if note and key in measured]
    remarks += summary["averages_left_out"]
    not_run = measurements[measurements["status"] != "measured"]
    for (benchmark, reason), entries in not_run.groupby(["benchmark", "reason"], sort=False):
        affected = "; ".join(f"{entry.language}, {entry.role} {entry.run}" for entry in entries.itertuples())
        suffix = f" ({affected})" if len(entries) % len(summary["models"]) else ""
        remarks.append(f"{benchmark}{suffix}: not run: {reason.rstrip('.')}.")
    markdown = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = markdown.from_string(TABLE_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(summary, names=ROLE_NAMES, remarks=remarks).strip() + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the command: measure all benchmarks of the suite, and print the table of results.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: If a measurement failed although the data of the benchmark are in --data_dir.
    """
    if summary := run_suite(parse_arguments(SuiteArguments, __doc__, argv)):
        print(render_suite_table(summary))
        entries = summary["measurements"]
        failed = sorted({entry["benchmark"] for entry in entries if entry["status"] == "not run" and entry["local"]})
        if failed:
            sys.exit(f"error: {', '.join(failed)} failed although --data_dir has the data. The reasons are above.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
