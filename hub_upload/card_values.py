"""What a model card may state: the files of a run's folder, read and checked, and given to the templates.

    run_metadata = collect_run_metadata(Path("runs/openmoji-pt-001"))
    run_metadata["config"]["learning_rate"]

Nothing else is read than `run.json` and `results/*.json` (and those in `seed-*/`), for the architecture `config.json`
and the header of `model.safetensors`, and for ONNX `onnx/quantisation.json`. What they lack is an error where the card
needs it, and left out where it doesn't; nothing is guessed. Texts of others become Markdown that renders as itself, on
one line; numbers get the language's decimal sign.
"""

import hashlib
import html
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jinja2

from capivara_common.files import read_json, seed_folders
from capivara_common.hub_cache import COMMIT_RE
from capivara_common.privacy import find_secret
from capivara_common.weight_file import WeightFile
from eval.benchmarks import get_published_base
from eval.records import schema
from eval.records.schema import DIRECTIONS, GAIN_METRIC, RANK_METRICS, TASKS, ResultFile, is_number
from eval.records.tables import average_over_seeds, build_records_frame, find_conflicts, pair_with_baselines
from hub_upload.allowed_files import RUN_PLOT_FILES

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
CARD_WORDS = read_json(
    TEMPLATE_FOLDER / "card_words.json"
)  # language of a card -> its words for names of the files, and others
LANGUAGES = tuple(CARD_WORDS)
# Not HTML but Markdown: texts of others are escaped where they come in. What a template needs and lacks is an error.
MARKDOWN_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER), autoescape=False, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses, but for "unknown" and "other"
HUB_LICENSES = frozenset((Path(__file__).parent / "licences.txt").read_text(encoding="utf-8").split())
FORMAT_FILES = {  # tag on the Hub -> files by which a folder has it
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "sentence-transformers": ("modules.json",),
    "onnx": ("onnx/text_model.onnx", "onnx/vision_model.onnx"),
    "transformers.js": ("onnx/model.onnx", "preprocessor_config.json"),
}
HUB_ID_RE = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])", re.ASCII)
CAPIVARA_CLASS = "CapivaraModel"
CARD_TOLERANCE = 5e-5  # a difference that no card shows
# The base is measured beside every seed, maybe on another device, where some queries have other ranks by last bits.
BASELINE_TOLERANCE_QUERIES, BASELINE_TOLERANCE_RANKS = 3, 1
MAX_LINE_CHARACTERS = 300
PLAIN_CODE_RE = re.compile(r"[A-Za-z0-9][\w./@:+=,() -]*", re.ASCII)
# Absolute paths of Unix, of a home and of Windows, up to their last part; not the slashes of an address.
PATH_PREFIX_RE = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"<>]+/)+|\b[A-Za-z]:\\(?:[^\s\\]+\\)+")
# Of the code on a card: two texts for its red and its blue picture, and labels.
PORTUGUESE_EXAMPLES = {"texts": ["um quadrado vermelho", "um céu azul"], "labels": ["vermelho", "azul", "verde"]}
_SETTING_NAMES = (
    "effective_batch_size micro_batch_size max_steps optimizer learning_rate min_learning_rate warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon mixed_precision frozen_parameters gradient_checkpointing "
    "lora_rank lora_alpha lora_dropout lora_targets lora_modules_to_save interpolate caption_strategy caption_count "
    "min_similarity min_pair_similarity image_embedding_cache augmented_views eval_steps num_threads"
)


# --- Reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def wrap_format_errors(folder: Path) -> Iterator[None]:
    """ValueError of whatever a value of another kind raises, in the files of a folder."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, ArithmeticError, jinja2.UndefinedError) as error:
        raise ValueError(f"A file of {folder} has another form than the card needs: {error!r:.100}.") from error


def collect_run_metadata(folder: Path) -> dict[str, Any]:
    """Read and check all that the card of a folder may state: a run of one seed or several, or a repository made of it.

    Raises:
        ValueError: a file is missing or has another form, two records give one figure different values, or a file
            holds an access token.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that a run of train_accelerate.py wrote.")
    with wrap_format_errors(folder):
        return _read_run_metadata(folder)


def _read_run_metadata(folder: Path) -> dict[str, Any]:
    digests: dict[str, str] = {}
    model, run, runs = _read_runs(folder, digests)
    paths = [path for of in (folder, *seed_folders(folder)) for path in sorted((of / "results").glob("*.json"))]
    values = _average_results([result for path in paths if (result := _read_result(path, folder, digests))])
    from modeling_capivara.processing_capivara import CONTEXT_LENGTH  # here: --help of the commands awaits no torch

    tokens, model_class = CONTEXT_LENGTH, run.get("model_class", CAPIVARA_CLASS)
    if model_class != CAPIVARA_CLASS:
        tokens = _read_json(model / "tokenizer_config.json", folder, digests)["model_max_length"]
    pictures = [(model / name).relative_to(folder).as_posix() for name in RUN_PLOT_FILES if (model / name).is_file()]
    files = [name for name in ("config.json", "onnx/quantisation.json") if (model / name).is_file()]
    known = {name: _read_json(model / name, folder, digests) for name in files}
    digests |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in pictures}
    weights = [WeightFile(path) for path in (*model.glob("model.safetensors"), *model.glob("model-*-of-*.safetensors"))]
    origins = run["origins"]  # what base and data say of themselves
    evaluated, noted = origins["evaluation_dataset"], str(origins["license"])  # "other" says nothing
    return {
        "folder": folder,  # of the run, or of the repository made from it
        "model": model,  # folder of the weights
        "run": run,  # `run.json` of the weights in the folder; of the first seed where each has a folder of its own
        "runs": runs,  # every `run.json`, in the order of seeds
        "config": run["config"],
        "model_class": model_class,  # of a run before it was noted, CAPIVARA's own
        "loss": run.get("loss", "contrastive"),
        "origins": origins,
        "titles": {evaluated["name"]: evaluated["title"]},  # of data sets, on their own cards
        "license": noted if noted in HUB_LICENSES else None,
        "is_inherited": noted in HUB_LICENSES,
        "values": [value for value in values if not value.dim],  # what was measured, rows of `average_over_seeds`
        "groups": _group_values(values),
        "tokens": tokens,  # longest text that the processor lets through
        "architecture": known.get("config.json", {}),  # `config.json` of the model; empty where the folder holds none
        "parameters": sum(math.prod(one.shape) for file in weights for one in file.tensors.values()),
        "graphs": known.get("onnx/quantisation.json", {}).get("graphs", {}),  # sizes and differences of ONNX's
        "formats": [tag for tag, files in FORMAT_FILES.items() if all((folder / file).is_file() for file in files)],
        "pictures": pictures,  # paths of those of `RUN_PICTURES` that are there
        "digests": dict(sorted(digests.items())),  # file -> SHA-256 of all that was read, and of the pictures
    }


def _read_runs(folder: Path, digests: dict[str, str]) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Folder of the weights, their `run.json`, and every one in the order of seeds."""
    paths = [path for path in (of / "run.json" for of in (folder, *seed_folders(folder))) if path.is_file()]
    if not paths:
        raise ValueError(f"{folder} has no run.json, and none in seed-*/: give the folder of a finished training run.")
    read = []
    for path in paths:
        run = _read_json(path, folder, digests)
        if (version := run["schema_version"]) != schema.SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version!r:.20}, not {schema.SCHEMA_VERSION}.")
        read.append((path.parent, run))
    model, run = read[0] if paths[0].parent == folder else min(read, key=lambda pair: pair[1]["seed"])
    by_seed = {of["seed"]: of for _, of in [*read, (model, run)]}
    return model, run, [by_seed[seed] for seed in sorted(by_seed)]


def _read_json(path: Path, folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    """The object of a JSON file; its digest is noted."""
    name = path.relative_to(folder).as_posix()
    try:
        content, data = schema.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from error
    if secret := find_secret(data.decode("utf-8")):
        raise ValueError(f"{name} holds {secret[0]}. Revoke it, and take it out before publishing.")
    digests[name] = hashlib.sha256(data).hexdigest()
    return content


def _read_result(path: Path, folder: Path, digests: dict[str, str]) -> ResultFile | None:
    """A result file; None of another JSON file, such as a suite's summary."""
    content, name = _read_json(path, folder, digests), path.relative_to(folder).as_posix()
    try:
        return schema.parse_result(content, name) if "records" in content else None
    except ValueError as error:
        raise ValueError(f"{name}#/{error}.") from error


# --- What was measured -----------------------------------------------------------------------------------------------


def _average_results(results: list[ResultFile]) -> list[Any]:
    """What all files hold, each the mean over the seeds, as rows of `average_over_seeds`."""
    if all(record.dim for result in results for record in result.records):
        raise ValueError("The folder's results hold no measurement, and a card states what was measured.")
    frame = build_records_frame(results)
    far = (
        (BASELINE_TOLERANCE_QUERIES / frame["n"])
        .clip(lower=CARD_TOLERANCE)
        .mask(frame["metric"].isin(RANK_METRICS), BASELINE_TOLERANCE_RANKS)
    )
    for row in find_conflicts(frame, "precision", far.where(frame["model"] == "baseline", CARD_TOLERANCE)).itertuples():
        raise ValueError(
            f"{row.first_source}/value and {row.source}/value give one figure two values, {row.first:g} and "
            f"{row.value:g}. Remove the result file that is not of this model."
        )
    values = average_over_seeds(frame, "precision")
    if unnamed := [value.measured[0] for value in values if value.seeds > 1 and value.measured[0].seed is None]:
        raise ValueError(f"{unnamed[0].source} names no seed, where others do. Measure it with --seed, or remove it.")
    return values


def find_data_revision(run: dict[str, Any], measurement: Any) -> str | None:
    """Commit on the Hub of the data that were measured on; None of any other data, whose name may look like an id.

    It is in the result file, or in the run's facts where the file is of the run's own evaluation: same fingerprint.
    """
    header, dataset = measurement.file.content, measurement.dataset
    commit, fingerprint = header.get("dataset_revision"), header.get("dataset_fingerprint")
    if not commit and fingerprint:
        evaluated = run["origins"]["evaluation_dataset"]
        if fingerprint in (run.get("dataset_fingerprints") or {}).values() and evaluated["hub_id"] == dataset:
            commit = evaluated.get("revision")
    return commit if COMMIT_RE.fullmatch(str(commit)) and HUB_ID_RE.fullmatch(dataset) else None


def _group_values(values: list[Any]) -> list[dict[str, Any]]:
    """The values of the same data, protocol and precision together, in the order of the files.

    Of each `first` value; `pairs` of baseline and model, by direction, and which of them are `main`: mean recalls, the
    first metric of a classification; `gains`; and `widths`, pairs of embeddings that were cut beside those of the
    whole ones, in falling order.
    """
    found: dict[tuple, list[Any]] = {}
    for value in sorted(values, key=lambda value: bool(value.dim)):
        protocol = value.protocol.rpartition("; first ")[0] if value.dim else value.protocol
        key = value.task, value.dataset, value.split, value.language, protocol, value.precision
        found.setdefault(key, []).append(value)
    groups = []
    for (task, *_), group in found.items():
        pairs = _pair_by_direction(value for value in group if not value.dim)
        main = [pair for pair in pairs if pair["metric"] == "mean_recall"] if task == "retrieval" else pairs[:1]
        gains = [value for value in group if value.metric == GAIN_METRIC]
        n = {value.direction: value.n for value in group}
        about = {"texts": n.get("text_to_image"), "images": n.get("image_to_text") or n.get("")}
        groups.append({"task": task, "first": group[0], "pairs": pairs, "main": main, "gains": gains, **about})
        groups[-1]["widths"] = _compare_widths(group) if any(value.dim for value in group) else []
    return groups


def _pair_by_direction(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Values by direction, without gains, each of baseline and model, and whether the model `is_worse`."""
    pairs = pair_with_baselines(value for value in values if value.metric != GAIN_METRIC)
    for pair in pairs:
        pair["is_worse"] = bool(pair["gain"]) and (pair["gain"] > 0) == pair["is_rank"]
    return sorted(pairs, key=lambda pair: ("", *DIRECTIONS).index(pair["direction"]))


def _compare_widths(group: list[Any]) -> list[dict[str, Any]]:
    """The pairs of a group at each width, of mean recall, or of R@1 where there are too few images for it.

    `kept` is the share of the recall of whole embeddings; None of these.
    """
    metric = "mean_recall" if any(value.metric == "mean_recall" for value in group) else "recall@1"
    pairs = _pair_by_direction(value for value in group if value.metric == metric)
    wholes = {pair["direction"]: pair["capivara"] for pair in pairs if not pair["dim"]}
    for pair in pairs:
        whole, own = wholes.get(pair["direction"]), pair["capivara"]
        pair["kept"] = own.mean / whole.mean if pair["dim"] and own and whole and whole.mean else None
    return sorted(pairs, key=lambda pair: (DIRECTIONS.index(pair["direction"]), -(pair["dim"] or math.inf)))


# --- Texts and numbers -----------------------------------------------------------------------------------------------


def to_safe_line(value: Any) -> str:
    """A text of others on one line, without invisible characters and folders of a machine, whatever the current one."""
    line = " ".join(str(value).split())
    line = "".join(letter for letter in line if unicodedata.category(letter)[0] != "C")  # controls, bidi, private use
    line = PATH_PREFIX_RE.sub("", line)
    return line if len(line) <= MAX_LINE_CHARACTERS else line[: MAX_LINE_CHARACTERS - 1] + "…"


def to_markdown(value: Any) -> str:
    """Text of a config or of data as Markdown that renders as itself: no markup, no HTML."""
    line = re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", to_safe_line(value))
    line = re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", r"\\\1" if line[:1] in "-+=" else r"\1\\", line)  # no list, no heading
    return html.escape(line, quote=False)


def to_code(value: Any) -> str:
    """A JSON value as code, where it consists of the characters of names; else as text."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = to_safe_line(written)
    return (
        f"`{text}`"
        if text == PATH_PREFIX_RE.sub("", written) and PLAIN_CODE_RE.fullmatch(text)
        else to_markdown(written)
    )


def is_portuguese(language: str) -> bool:
    """Whether the code of a language is that of Portuguese, such as "pt" or "pt-BR"."""
    return re.split("[-_]", language)[0] in ("pt", "por")


def select_code_examples(language: str, fallback_texts: Sequence[str]) -> dict[str, str]:
    """Texts for the code of a card in its model's language: Portuguese ones, else `words`."""
    texts, template, picture = PORTUGUESE_EXAMPLES, "uma imagem de cor {}", "foto.jpg"
    if not is_portuguese(language):
        texts = {key: list(fallback_texts[: len(value)]) for key, value in PORTUGUESE_EXAMPLES.items()}
        template, picture = "{}", "photo.jpg"
    lists = {key: json.dumps(value, ensure_ascii=False) for key, value in texts.items()}
    return {**lists, "template": template, "picture": picture}


class CardWriter:
    """What stands in the files of a run as a card's language writes it; its methods are the templates' functions."""

    def __init__(self, language: str, run_metadata: dict[str, Any]):
        self.run_metadata, self.words, self.names = run_metadata, CARD_WORDS[language], CARD_WORDS[language]["names"]
        self.separators = str.maketrans(",.", ".," if language == "pt" else ",.")

    def number(self, value: Any, digits: int = 0, sign: bool = False, kind: str = "f") -> str:
        """A number of the files, as format's `kind` "f" or "e" writes it. Raises ValueError where it is none."""
        if not is_number(value):
            raise ValueError(f"{str(value)[:80]!r} stands where a number belongs; make the run's files again.")
        return f"{value:{'+' if sign else ''},.{digits}{kind}}".translate(self.separators)

    def percent(self, share: Any, sign: bool = False) -> str:
        """A share in per cent, or a difference of shares in points; without the unit."""
        return self.number(100 * share if is_number(share) else share, 2, sign)

    def duration(self, seconds: Any) -> str:
        """Seconds, as hours or minutes where there are many."""
        if seconds < 90:
            return f"{self.number(seconds, 1 if seconds >= 1 else 2)} s"
        unit, part = ("h", 3600) if seconds >= 5400 else ("min", 60)
        return f"{self.number(seconds / part, 1)} {unit}"

    def language(self, key: str) -> str:
        """A language by its code."""
        return self.words["languages"].get(key) or to_markdown(key)

    def dataset(self, name: str) -> str:
        """A data set, by the title of its own card where that is known."""
        titles = self.run_metadata["titles"]
        return to_code(name) if titles.get(name) is None else to_markdown(titles[name])

    def phrase(self, text: str) -> str:
        """What the project itself writes into its files, in English."""
        for english, own in self.words["phrases"].items():
            text = text.replace(english, own)
        return to_markdown(text)

    def each(self, name: str, write: Callable[..., str], *more: Any) -> str:
        """What every run has under a name, or two with a point between, in the order of seeds; one where all agree."""
        found = [write(reduce(getitem, name.split("."), run), *more) for run in self.run_metadata["runs"]]
        return found[0] if len(set(found)) == 1 else "; ".join(found)

    def linked(self, origin: dict[str, Any], kind: str) -> str:
        """The title of base or data, with a link where it is on the Hub."""
        hub_id, title = origin.get("hub_id"), to_markdown(origin["title"])
        return f"[{title}](https://huggingface.co/{kind}{hub_id})" if HUB_ID_RE.fullmatch(str(hub_id)) else f"*{title}*"


# --- All of it, for a template ---------------------------------------------------------------------------------------


def build_template_values(run_metadata: dict[str, Any], language: str, repo_id: str | None) -> dict[str, Any]:
    """All that a template is given but title and options; its code loads `repo_id`, or from within the folder.

    Raises ValueError where a figure is missing.
    """
    run, config, trained, writer = (
        run_metadata["run"],
        run_metadata["config"],
        run_metadata["config"]["language"],
        CardWriter(language, run_metadata),
    )
    order = lambda group: (TASKS.index(group["task"]), group["first"].language != trained)  # noqa: E731
    groups = sorted(run_metadata["groups"], key=order)
    main = [pair for group in groups for pair in group["main"] if pair["capivara"] and pair["baseline"]]
    gains = [value for value in run_metadata["values"] if value.metric == GAIN_METRIC]
    curve = [point["validation"] for point in run.get("curve") or () if point.get("validation")]
    architecture, origins = run_metadata["architecture"], run_metadata["origins"]
    return {
        **run_metadata
        | {"name": repo_id or run_metadata["model"].relative_to(run_metadata["folder"]).as_posix(), "groups": groups},
        "is_repository": repo_id is not None,
        **{key: getattr(writer, key) for key in dir(writer) if not key.startswith("_")},
        **{
            "text": to_markdown,
            "code": to_code,
            "published": get_published_base,
            "revision": partial(find_data_revision, run),
        },
        **{"is_portuguese": is_portuguese(trained), "rank_metrics": RANK_METRICS},
        "is_own": run_metadata["model_class"] == CAPIVARA_CLASS,
        "is_siglip": run_metadata["model_class"] == "SiglipModel",
        "citation": (TEMPLATE_FOLDER / "citation.bib").read_text(encoding="utf-8").strip(),
        "examples": partial(select_code_examples, trained),
        "width": architecture.get("projection_dim") or (architecture.get("text_config") or {}).get("projection_size"),
        "towers": [(key, architecture.get(key) or {}) for key in ("vision_config", "text_config")],
        "works": [  # of a run that had one, the teacher, too
            ("model", origins["model"]),
            *(("dataset", origin) for origin in origins["datasets"]),
            *(("teacher", origin) for origin in [origins.get("teacher")] if origin),
        ],
        "translated_by": _describe_translators(origins["datasets"], trained),
        "licences": lambda origin: ", ".join(map(to_code, origin.get("licenses") or ())),
        "rotated": (run_metadata["model"] / "rotation.safetensors").is_file(),
        "stopped_early": any(of["steps"] < config["max_steps"] for of in run_metadata["runs"]),
        "validation": [(way, curve[0][way], curve[-1][way]) for way in DIRECTIONS] if len(curve) > 1 else [],
        "settings": _select_settings(config, run.get("fixed", {})),
        **{"main": main, "gains": gains, "worse": [pair for pair in main if pair["is_worse"]]},
        "summary": [pair for pair in main if pair["task"] == "retrieval" and pair["language"] == trained],
        # Gains whose interval includes zero, with the seeds of which that is so
        "unsure": [
            (gain, ends)
            for gain in gains
            if (ends := [of for of in gain.measured if of.interval_95 and of.interval_95[0] <= 0 <= of.interval_95[1]])
        ],
        "has_several_datasets": len({value.dataset for value in run_metadata["values"]}) > 1,
        "measured_seeds": [of.seed for of in max(run_metadata["values"], key=lambda value: value.seeds).measured],
        "layout": MARKDOWN_TEMPLATES.get_template("model_card.md.j2"),
    }


def _describe_translators(datasets: list[dict[str, Any]], language: str) -> str:
    """Return who translated the training captions: human, machine, mixed, or an empty text if no dataset states it."""
    stated = {origin.get("translations", {}).get(language, "") for origin in datasets} & {"human", "machine"}
    return "mixed" if len(stated) > 1 else "".join(stated)


def _select_settings(config: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters as the run had them, and what is `fixed` in every run; what does not apply is left out."""
    found = {key: config.get(key, fixed.get(key)) for key in _SETTING_NAMES.split()}
    if not config["lora_rank"]:
        found = {key: value for key, value in found.items() if not key.startswith("lora_")}
    if config.get("caption_strategy") == "none":
        found |= dict.fromkeys(("caption_count", "min_similarity"))
    if found["image_embedding_cache"] not in (None, "", "off"):
        found["image_embedding_cache"] = "on"  # a folder of the machine, otherwise
    return {k: v for k, v in found.items() if v is not False and v not in (None, "", [], {})}
