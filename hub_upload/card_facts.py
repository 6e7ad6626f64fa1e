"""What a model card may state: the files of a run's folder, read and checked.

    facts = card_facts(Path("runs/openmoji-pt-001"))
    facts.run["config"]["learning_rate"]

Nothing else is read than `run.json` and `results/*.json` (and those in `seed-*/`), for the architecture `config.json`
and the header of `model.safetensors`, and for ONNX `onnx/quantisation.json`. What they lack is an error where the card
needs it, and left out where it doesn't; nothing is guessed.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from capivara_common.files import seed_folders
from capivara_common.hub_cache import COMMIT
from capivara_common.privacy import secret_in
from capivara_common.weight_file import WeightFile
from eval.records.schema import RANK_METRICS, SCHEMA_VERSION, TASKS, ResultFile, is_number, parse_result, read_object
from eval.records.tables import conflicts, records_frame, values_of
from hub_upload.allowed_files import RUN_PICTURES

GRAPHS = "onnx/quantisation.json"
FORMATS = {
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "open_clip_from_inside": ("text_model/config.json",),  # which open_clip finds only from inside the folder
    "sentence_transformers": ("modules.json",),
    "onnx": ("onnx/text_model.onnx", "onnx/vision_model.onnx"),
    "transformers_js": ("onnx/model.onnx", "preprocessor_config.json"),
}
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])", re.ASCII)
OWN_CLASS = "CapivaraModel"
SAME = 5e-5  # a difference that no card shows
# The base is measured beside every seed, maybe on another device, where some queries have other ranks by last bits.
OTHER_QUERIES, OTHER_RANKS = 3, 1


# Identifiers of https://huggingface.co/docs/hub/repositories-licenses, but for "unknown" and "other"
LICENCES = frozenset((Path(__file__).parent / "licences.txt").read_text(encoding="utf-8").split())


class Content(dict):
    """An object of a JSON file; a missing key is a ValueError, which names file and JSON pointer."""

    pointer = ""

    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(f"{self.pointer} has no {key!r}, which the card needs.")


@dataclass
class CardFacts:
    """All that a card may state."""

    folder: Path  # of the run, or of the repository made from it
    name: str  # of the folder, as code names it
    model: Path  # folder of the weights
    run: Content  # `run.json` of the weights in the folder; of the first seed where each has a folder of its own
    runs: list[Content]  # every `run.json`, in the order of seeds
    values: list[Any]  # what was measured, rows of `eval.records.tables.values_of`, in the order of files and records
    cut: list[Any]  # those of embeddings that were cut to their first dimensions, apart from the others
    tokens: int  # longest text that the processor lets through
    config: dict[str, Any]  # `config.json` of the model; empty where the folder holds none
    parameters: int | None  # numbers in the weights; None where the folder holds none
    graphs: dict[str, Any]  # `onnx/quantisation.json`: sizes and differences of the graphs; empty where there is none
    formats: frozenset[str]  # keys of `FORMATS` whose files are there
    pictures: list[str]  # paths of those of `RUN_PICTURES` that are there
    digests: dict[str, str]  # file -> SHA-256 of all that was read, and of the pictures
    license: str | None = None  # that whoever publishes the model states, where none follows from base and data

    @property
    def language(self) -> str:
        """Code of the language of training."""
        return self.run["config"]["language"]

    @property
    def model_class(self) -> str:
        """The model's class; of a run before it was noted, CAPIVARA's own."""
        return self.run.get("model_class", OWN_CLASS)

    @property
    def origins(self) -> Content:
        """What base and data say of themselves; empty for a run before it was noted."""
        return self.run.get("origins") or Content()

    def dataset_title(self, name: str) -> str | None:
        """The title on a data set's own card where it is that of the run's evaluation."""
        evaluated = self.origins.get("evaluation_dataset")
        return evaluated["title"] if evaluated and evaluated["name"] == name else None

    def revision(self, measured: Any) -> str | None:
        """Commit on the Hub of the data that were measured on; None of any other data, whose name may look like an id.

        It is in the result file, or in the run's facts where the file is of the run's own evaluation: same fingerprint.
        """
        header, dataset = measured.file.content, measured.dataset
        commit, fingerprint = header.get("dataset_revision"), header.get("dataset_fingerprint")
        if not commit and fingerprint and self.origins:
            evaluated = self.origins["evaluation_dataset"]
            if fingerprint in (self.run.get("dataset_fingerprints") or {}).values() and evaluated["hub_id"] == dataset:
                commit = evaluated.get("revision")
        return commit if COMMIT.fullmatch(str(commit)) and HUB_ID.fullmatch(dataset) else None

    def groups(self, task: str | None = None) -> list[list[Any]]:
        """The values of a task, or of all, those of the same data, protocol and precision together; the trained
        language first."""
        found: dict[tuple, list[Any]] = {}
        for value in self.values:
            key = (value.dataset, value.split, value.language, value.protocol, value.precision)
            if task in (None, value.task):
                found.setdefault((TASKS.index(value.task), value.language != self.language, *key), []).append(value)
        return [found[key] for key in sorted(found, key=lambda key: key[:2])]


def energy(facts: CardFacts) -> Content | None:
    """What the first run says of its energy, with `kwh`, `kg_co2e` and `hours` of all; None where one has none."""
    of_runs = [run.get("energy") for run in facts.runs]
    if not all(of_runs):
        return None
    for about in of_runs:
        if not any(word in str(about["method"]) for word in ("estimated", "measured")):
            raise ValueError(f"{about.pointer}/method must say whether energy was measured or estimated, by what.")
        for key in ("kwh", "kg_co2e", "hours"):
            if not is_number(about[key]) or about[key] < 0:
                raise ValueError(f"{about.pointer}/{key} must be a number of at least 0, got {about[key]!r:.60}.")
    used = Content(of_runs[0])
    used.pointer = of_runs[0].pointer
    used |= {key: sum(about[key] for about in of_runs) for key in ("kwh", "kg_co2e", "hours")}
    return used


def licence(facts: CardFacts) -> str | None:
    """The model's licence: the inherited one, else the one that its publisher states."""
    return inherited_licence(facts) or facts.license


def inherited_licence(facts: CardFacts) -> str | None:
    """The inherited licence that the run noted, if it is one that the Hub knows; "other" says nothing."""
    noted = str(facts.origins.get("license"))
    return noted if noted in LICENCES else None


def card_facts(folder: Path, name: str | None = None) -> CardFacts:
    """Read and check all that the card of a folder may state: a run of one seed or several, or a repository made of it.

    Code in the card names the folder `name`, or by its own name where None.

    Raises:
        ValueError: a file is missing or has another form, two records give one figure different values, or a file
            holds an access token. The message names the file and the JSON pointer.
    """
    if name is not None and _usable(name) != name:
        raise ValueError(f"{name!r} is no name of a folder that code can hold; take letters, digits, - and _.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that a run of train_accelerate.py wrote.")
    digests: dict[str, str] = {}
    model, run, runs = _runs(folder, digests)
    paths = [path for of in (folder, *seed_folders(folder)) for path in sorted((of / "results").glob("*.json"))]
    values, cut = _values([result for path in paths if (result := _result(path, folder, digests))])
    from modeling_capivara.processing_capivara import CONTEXT_LENGTH  # here: --help of the commands awaits no torch

    tokens = CONTEXT_LENGTH
    if run.get("model_class", OWN_CLASS) != OWN_CLASS:
        tokens = _read(model / "tokenizer_config.json", folder, digests)["model_max_length"]
    pictures = [(model / name).relative_to(folder).as_posix() for name in RUN_PICTURES if (model / name).is_file()]
    config, graphs = (
        _read(model / name, folder, digests) if (model / name).is_file() else {} for name in ("config.json", GRAPHS)
    )
    digests |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in pictures}
    formats = frozenset(key for key, files in FORMATS.items() if all((folder / file).is_file() for file in files))
    return CardFacts(
        folder, name or _usable(folder.resolve().name), model, run, runs, values, cut, tokens, config,
        _parameters(model), graphs, formats, pictures, digests,
    )  # fmt: skip


def _usable(name: str) -> str:
    """A folder's name where code can hold it, and it is not that of a temporary folder."""
    return name if re.fullmatch(r"(?!.*--)[A-Za-z0-9][\w-]*(\.[\w-]+)*", name, re.ASCII) else "capivara"


def _runs(folder: Path, digests: dict[str, str]) -> tuple[Path, Content, list[Content]]:
    """Folder of the weights, their `run.json`, and every one in the order of seeds."""
    paths = [path for path in (of / "run.json" for of in (folder, *seed_folders(folder))) if path.is_file()]
    if not paths:
        raise ValueError(f"{folder} has no run.json, and none in seed-*/: give the folder of a finished training run.")
    read = []
    for path in paths:
        run = _read(path, folder, digests)
        if run["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"{run.pointer} has schema version {run['schema_version']!r:.20}, not {SCHEMA_VERSION}.")
        for key, kind in (("config", dict), ("versions", dict), ("seconds", dict), ("seed", int), ("device", str)):
            if not isinstance(run[key], kind):
                raise ValueError(f"{run.pointer}/{key} must be of type {kind.__name__}, got {run[key]!r:.60}.")
        read.append((path.parent, run))
    model, run = read[0] if paths[0].parent == folder else min(read, key=lambda pair: pair[1]["seed"])
    by_seed = {of["seed"]: of for _, of in [*read, (model, run)]}
    return model, run, [by_seed[seed] for seed in sorted(by_seed)]


def _read(path: Path, folder: Path, digests: dict[str, str]) -> Content:
    """The object of a JSON file; its digest is noted."""
    name = path.relative_to(folder).as_posix()
    try:
        content, data = read_object(path)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from error
    if secret := secret_in(data.decode("utf-8")):
        raise ValueError(f"{name} holds {secret[0]}. Revoke it, and take it out before publishing.")
    digests[name] = hashlib.sha256(data).hexdigest()
    return _with_pointers(content, f"{name}#")


def _with_pointers(value: Any, pointer: str) -> Any:
    """A JSON value whose objects know where they stand."""
    if isinstance(value, list):
        return [_with_pointers(item, f"{pointer}/{number}") for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    content = Content((key, _with_pointers(item, f"{pointer}/{key}")) for key, item in value.items())
    content.pointer = pointer
    return content


def _result(path: Path, folder: Path, digests: dict[str, str]) -> ResultFile | None:
    """A result file; None of another JSON file, such as a suite's summary."""
    content = _read(path, folder, digests)
    try:
        return parse_result(content, path.relative_to(folder).as_posix()) if "records" in content else None
    except ValueError as error:
        raise ValueError(f"{content.pointer}/{error}.") from error


def _values(results: list[ResultFile]) -> tuple[list[Any], list[Any]]:
    """What all files hold, each the mean over the seeds: of whole embeddings, and of those that were cut."""
    if all(record.dim for result in results for record in result.records):
        raise ValueError("The folder's results hold no measurement, and a card states what was measured.")
    frame = records_frame(results)
    far = (OTHER_QUERIES / frame["n"]).clip(lower=SAME).mask(frame["metric"].isin(RANK_METRICS), OTHER_RANKS)
    for row in conflicts(frame, "precision", far.where(frame["model"] == "baseline", SAME)).itertuples():
        raise ValueError(
            f"{row.first_source}/value and {row.source}/value give one figure two values, {row.first:g} and "
            f"{row.value:g}. Remove the result file that is not of this model."
        )
    found = values_of(frame, "precision")
    for value in found:
        if value.seeds > 1 and value.measured[0].seed is None:
            raise ValueError(
                f"{value.measured[0].source} names no seed, where others of the same figure do. Measure it with "
                "--seed, or remove the file."
            )
    return [value for value in found if not value.dim], [value for value in found if value.dim]


def _parameters(model: Path) -> int | None:
    """How many numbers the weights are, by the headers of their files; None where there are none."""
    files = [WeightFile(path) for path in (*model.glob("model.safetensors"), *model.glob("model-*-of-*.safetensors"))]
    return sum(math.prod(place.shape) for file in files for place in file.places.values()) if files else None
