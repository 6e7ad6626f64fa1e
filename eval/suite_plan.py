"""What a suite is to measure: its arguments, its models, and one measurement a benchmark, language and model."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from capivara_common.cli import WrongUse
from capivara_common.files import read_json
from capivara_common.privacy import hide_paths
from eval.benchmarks import METRICS, SUITES, Benchmark, load_benchmarks, must_be_known
from eval.eval_arguments import SuiteArguments
from eval.layouts import Location, adapted, hub_fault, local_data, locate
from modeling_capivara.two_towers import load_embedder


@dataclass(frozen=True)
class Model:
    """A model of the suite."""

    name: str  # as the tasks take it
    role: str  # "baseline" or "capivara"
    run: int  # number among those of its role, from 0
    seed: int | None  # of its training, as its run.json says
    fingerprint: str  # of weights, configuration and precision

    @property
    def suffix(self) -> str:
        """Of the names of its result files."""
        return "baseline" if self.role == "baseline" else f"{self.role}-{self.run}"


@dataclass
class Measurement:
    """One model on one benchmark in one language."""

    benchmark: str  # key
    language: str
    role: str  # of the model
    run: int
    file: str  # name of the result file
    status: str = "planned"  # or "measured", "not run"
    reason: str = ""  # why it is not run
    skipped: int = 0  # images that could not be read
    local: bool = False  # whether its data lie here, so that "not run" is a fault
    data: str = ""  # what the task takes


def chosen(args: SuiteArguments, suite: str) -> list[Benchmark]:
    """The benchmarks of a suite, or those that are asked for.

    Raises:
        ValueError: suite, key, language or metric is unknown; the known ones are listed, nearest first.
    """
    every = load_benchmarks()
    must_be_known("suite", [suite], list(SUITES))
    must_be_known("benchmark", args.only, list(every))
    must_be_known("metric", args.metrics, list(METRICS))
    known = dict.fromkeys(code for benchmark in every.values() for code in all_languages(benchmark))
    must_be_known("language", args.languages, list(known))
    return [b for b in every.values() if (b.key in args.only if args.only else suite in b.suite)]


def all_languages(benchmark: Benchmark) -> tuple[str, ...]:
    """Codes of the languages that may be asked for."""
    return benchmark.known_languages or benchmark.languages


def languages_of(benchmark: Benchmark, asked: list[str]) -> list[str]:
    """Those that are asked for, as far as the benchmark has them; its own where none is."""
    return [code for code in all_languages(benchmark) if code in asked] if asked else list(benchmark.languages)


def protocol_of(benchmark: Benchmark, args: SuiteArguments) -> str:
    """Names and prompts of a classification: those that the arguments ask for, unless the benchmark has its own."""
    return args.protocol if benchmark.protocol == "ours" else benchmark.protocol


def models_of(args: SuiteArguments) -> list[Model]:
    """The models, loaded once: a wrong one ends the suite before long work.

    Raises:
        ValueError: there is none, one can't be loaded, or two runs are the same model.
    """
    names = [args.model] if args.model else []
    for name in args.runs:
        several = [] if (Path(name) / "config.json").is_file() else sorted(map(str, Path(name).glob("seed-*")))
        names += several or [name]
    if not names:
        raise WrongUse("No model is given: take --model MODEL, or --runs RUN RUN RUN.")
    runs = [_model(name, "capivara", args) for name in names]
    if args.model and any(run.fingerprint == runs[0].fingerprint for run in runs[1:]):
        del runs[0]  # --model is one of --runs
    if len({run.fingerprint for run in runs}) < len(runs):
        raise ValueError("Two of --runs hold the same model, so that their deviation would mean nothing.")
    baseline = [_model(args.baseline, "baseline", args)] if args.baseline else []
    return baseline + [replace(run, run=number) for number, run in enumerate(runs)]


def plan(args: SuiteArguments, suite: str) -> tuple[list[Model], list[Measurement]]:
    """The models, and what is to be measured or can't be run.

    Raises:
        ValueError: an argument is wrong; nothing has been measured yet.
    """
    args.check_image_files()
    benchmarks, given = chosen(args, suite), local_data(args.data)
    if args.data_dir and not args.data_dir.is_dir():
        raise WrongUse(f"--data_dir {args.data_dir} is no folder.")
    if args.protocol == "authors" and not args.authors_file:
        raise WrongUse("--protocol authors needs --authors_file, a path or an https address.")
    models, fault, measurements = models_of(args), functools.cache(hub_fault), []
    for benchmark in benchmarks:
        location = locate(benchmark, given, args.data_dir, args.offline, fault)
        languages = languages_of(benchmark, args.languages)
        if not languages and benchmark.key in args.only:  # named, so that it must be heard of
            languages = [benchmark.language]
            known, asked = " ".join(all_languages(benchmark)), " ".join(args.languages)
            location = Location(reason=f"it is in {known}, and --languages asks for {asked}")
        for language in languages:
            data, reason = _readable(benchmark, language, location, args.output)
            status = "not run" if reason else "planned"
            for model in models:
                file = f"{benchmark.key}-{language}-{model.suffix}.json"
                key = benchmark.key, language, model.role, model.run
                measurements.append(Measurement(*key, file, status, reason, local=location.local, data=data))
    if not any(languages_of(benchmark, args.languages) for benchmark in benchmarks):
        raise WrongUse(f"None of the benchmarks has one of the languages {args.languages}; see --list.")
    return models, measurements


def one_line(error: Exception) -> str:
    """What an error says, on one line and without the folders of this machine."""
    return " ".join(hide_paths(str(error)).split())


def _model(name: str, role: str, args: SuiteArguments) -> Model:
    fingerprint = load_embedder(name, "cpu", role == "baseline", args.precision).fingerprint
    facts = Path(name) / "run.json"
    seed = read_json(facts).get("seed") if role == "capivara" and facts.is_file() else None
    return Model(name, role, 0, seed, fingerprint)


def _readable(benchmark: Benchmark, language: str, location: Location, output: Path) -> tuple[str, str]:
    """What the task takes for data, and why that can't be had."""
    reader = benchmark.source.get("reader")
    if location.reason or not location.local or not reader:
        return location.name, location.reason
    try:
        target = output / "layouts" / f"{benchmark.key}-{language}"
        return str(adapted(reader, Path(location.name), benchmark.split, language, target)), ""
    except (ValueError, OSError) as error:
        return location.name, one_line(error)
