"""What a suite is to measure: its arguments, its models, and one measurement a benchmark, language and model."""

import functools
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from common.files import read_json
from common.privacy import hide_paths
from eval.benchmarks import METRICS, SUITES, Benchmark, load_benchmarks, must_be_known
from eval.embeddings import digest_of
from eval.eval_arguments import SuiteArguments
from eval.layouts import Place, adapted, hub_fault, local_data, place_of
from modeling_capivara.embedder import load_embedder

SUMMARY_VERSION = 1


@dataclass(frozen=True)
class Model:
    """A model of the suite.

    Attributes:
        name: as the tasks take it.
        role: "baseline" or "capivara".
        run: number among those of its role, from 0.
        seed: of its training, as its run.json says.
        fingerprint: of weights, configuration and precision.
    """

    name: str
    role: str
    run: int
    seed: int | None
    fingerprint: str

    @property
    def suffix(self) -> str:
        return "baseline" if self.role == "baseline" else f"{self.role}-{self.run}"


@dataclass
class Measurement:
    """One model on one benchmark in one language.

    Attributes:
        benchmark: key.
        language: code.
        role, run: of the model.
        status: "planned", "measured" or "not run".
        reason: why it is not run.
        file: name of the result file.
        facts: digest of all that the result depends on.
        digest: of the result file.
        skipped: images that could not be read.
        local: whether its data lie here, so that "not run" is a fault.
        data: what the task takes.
    """

    benchmark: str
    language: str
    role: str
    run: int
    status: str = "planned"
    reason: str = ""
    file: str = ""
    facts: str = ""
    digest: str = ""
    skipped: int = 0
    local: bool = False
    data: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.benchmark, self.language, self.role, self.run


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
    return benchmark.known_languages or benchmark.languages


def languages_of(benchmark: Benchmark, asked: list[str]) -> list[str]:
    """Those that are asked for, as far as the benchmark has them; its own where none is."""
    return [code for code in all_languages(benchmark) if code in asked] if asked else list(benchmark.languages)


def models_of(args: SuiteArguments) -> list[Model]:
    """The models, loaded once: a wrong one ends the suite before long work, and results are known by fingerprints.

    Raises:
        ValueError: there is none, one can't be loaded, or two runs are the same model.
    """
    names = [args.model] if args.model else []
    for name in args.runs:
        several = [] if (Path(name) / "config.json").is_file() else sorted(map(str, Path(name).glob("seed-*")))
        names += several or [name]
    if not names:
        raise ValueError("No model is given: take --model MODEL, or --runs RUN RUN RUN.")
    runs = [_model(name, "capivara", args) for name in names]
    if args.model and any(run.fingerprint == runs[0].fingerprint for run in runs[1:]):
        del runs[0]  # --model is one of --runs
    if len({run.fingerprint for run in runs}) < len(runs):
        raise ValueError("Two of --runs hold the same model, so that their deviation would mean nothing.")
    baseline = [_model(args.baseline, "baseline", args)] if args.baseline else []
    return baseline + [replace(run, run=number) for number, run in enumerate(runs)]


def _model(name: str, role: str, args: SuiteArguments) -> Model:
    fingerprint = load_embedder(name, "cpu", role == "baseline", args.precision).fingerprint
    facts = Path(name) / "run.json"
    seed = read_json(facts).get("seed") if role == "capivara" and facts.is_file() else None
    return Model(name, role, 0, seed, fingerprint)


def plan(args: SuiteArguments, suite: str) -> tuple[list[Model], list[Measurement], list[Measurement]]:
    """The models; what is to be measured, is there already or can't be run; and what else an earlier call measured.

    Raises:
        ValueError: an argument is wrong; nothing has been measured yet.
    """
    args.check_image_files()
    benchmarks, given = chosen(args, suite), local_data(args.data)
    if args.data_dir and not args.data_dir.is_dir():
        raise ValueError(f"--data_dir {args.data_dir} is no folder.")
    if args.protocol == "authors" and not args.authors_file:
        raise ValueError("--protocol authors needs --authors_file, a path or an https address.")
    done, models, fault = _done(args.output), models_of(args), functools.cache(hub_fault)
    measurements = []
    for benchmark in benchmarks:
        place = place_of(benchmark, given, args.data_dir, args.offline, fault)
        digest = place.digest()
        facts = {model.suffix: _facts(args, benchmark, model, digest) for model in models}
        for language in languages_of(benchmark, args.languages):
            data, reason = _readable(benchmark, language, place, args.output)
            for model in models:
                new = Measurement(benchmark.key, language, model.role, model.run, local=place.local, data=data)
                new.file, new.facts = f"{benchmark.key}-{language}-{model.suffix}.json", facts[model.suffix]
                new.status, new.reason = ("not run", reason) if reason else ("planned", "")
                old = done.get(new.key)
                if old and not (reason or args.overwrite) and _holds(old, new, args.output):
                    new.status, new.digest, new.skipped = "measured", old.digest, old.skipped
                measurements.append(new)
    if not measurements:
        raise ValueError(f"None of the benchmarks has one of the languages {args.languages}; see --list.")
    planned = {measurement.key for measurement in measurements}
    return models, measurements, [old for key, old in done.items() if key not in planned]


def _readable(benchmark: Benchmark, language: str, place: Place, output: Path) -> tuple[str, str]:
    """What the task takes for data, and why that can't be had."""
    reader = benchmark.source.get("reader")
    if place.reason or not place.local or not reader:
        return place.name, place.reason
    try:
        target = output / "layouts" / f"{benchmark.key}-{language}"
        return str(adapted(reader, Path(place.name), benchmark.split, language, target)), ""
    except (ValueError, OSError) as error:
        return place.name, one_line(error)


def _holds(old: Measurement, new: Measurement, output: Path) -> bool:
    """Whether the result of an earlier call is there, and is of the same model, data and arguments."""
    return old.facts == new.facts and old.digest == file_digest(output / new.file)


def _facts(args: SuiteArguments, benchmark: Benchmark, model: Model, data: str) -> str:
    """Digest of all that a result depends on."""
    told = ("key", "task", "split", "image_column", "label_column", "caption_column", "caption_positions")
    facts = {name: getattr(benchmark, name) for name in told}
    facts |= {"model": model.fingerprint, "seed": model.seed, "data": data, "gallery": args.gallery}
    facts |= args.image_settings()
    if benchmark.task == "classification":
        facts["protocol"] = protocol_of(benchmark, args)
        facts["prompts"] = file_digest(Path(__file__).parent / "prompts" / "pt" / f"{benchmark.prompts}.json")
    if facts.get("protocol") == "authors":
        facts["authors_file"] = file_digest(Path(args.authors_file))
    return digest_of(facts)


def protocol_of(benchmark: Benchmark, args: SuiteArguments) -> str:
    return args.protocol if benchmark.protocol == "ours" else benchmark.protocol


def one_line(error: Exception) -> str:
    """What an error says, on one line and without the folders of this machine."""
    return " ".join(hide_paths(str(error)).split())


def file_digest(path: Path) -> str:
    """Of a file; of what is none, its name."""
    return blake2b(path.read_bytes() if path.is_file() else str(path).encode(), digest_size=16).hexdigest()


def _done(output: Path) -> dict[tuple, Measurement]:
    """What an earlier call has measured.

    Raises:
        ValueError: the folder's suite.json has another form.
    """
    path = output / "suite.json"
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        if content["summary_version"] != SUMMARY_VERSION:
            raise ValueError(f"its version is {content['summary_version']}")
        found = [Measurement(**measurement) for measurement in content["measurements"] + content["earlier"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} can't be gone on from ({error}); choose another --output.") from error
    return {measurement.key: measurement for measurement in found if measurement.status == "measured"}
