"""Read and check the files of a training run, and turn them into values for the templates of the model card.

    run_metadata = collect_run_metadata(Path("runs/openmoji-pt-001"))
    run_metadata["config"]["learning_rate"]

The values come from `run.json` and `results/*.json` (also those in `seed-*/`), `config.json`, the header of
`model.safetensors`, and `onnx/quantisation.json`. If they lack a value that the card requires, an error is raised;
optional values are left out. Texts from files are escaped, so that they can't add Markdown or HTML to the card. Numbers
get the decimal separator of the card's language.
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
# Language of a card -> names of languages and metrics, and translations of texts in result files.
CARD_WORDS = read_json(TEMPLATE_FOLDER / "card_words.json")
LANGUAGES = tuple(CARD_WORDS)
# The output is Markdown, so Jinja's HTML escaping is off; `to_markdown` and `to_code` escape texts from files instead.
MARKDOWN_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER), autoescape=False, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
# Identifiers from https://huggingface.co/docs/hub/repositories-licenses, without "unknown" and "other".
HUB_LICENSES = frozenset((Path(__file__).parent / "licenses.txt").read_text(encoding="utf-8").split())
FORMAT_FILES = {  # tag on the Hub -> files that a folder with this format has
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "sentence-transformers": ("modules.json",),
    "onnx": ("onnx/text_model.onnx", "onnx/vision_model.onnx"),
    "transformers.js": ("onnx/model.onnx", "preprocessor_config.json"),
}
# owner/name as the Hub accepts it: at most 96 characters each, without "--" and "..".
HUB_ID_RE = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])", re.ASCII)
CAPIVARA_CLASS = "CapivaraModel"
CARD_TOLERANCE = 5e-5  # smallest difference of shares that is visible in a card, which rounds to 0.01 %
# Every seed measures the base again, possibly on another device, where rounding may change the ranks of some queries.
BASELINE_TOLERANCE_QUERIES = 3  # queries whose hits may differ
BASELINE_TOLERANCE_RANKS = 1  # allowed difference of a median rank
MAX_LINE_CHARACTERS = 300  # length at which a text from a file is cut
# Texts that can stand in Markdown code without escaping: ASCII letters, digits and characters of names and paths.
PLAIN_CODE_RE = re.compile(r"[A-Za-z0-9][\w./@:+=,() -]*", re.ASCII)
# The folders of an absolute path (Unix, home or Windows), without its last part. URLs don't match.
PATH_PREFIX_RE = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"<>]+/)+|\b[A-Za-z]:\\(?:[^\s\\]+\\)+")
# Texts and labels in the code examples of a card, which use a red and a blue image.
PORTUGUESE_EXAMPLES = {"texts": ["um quadrado vermelho", "um céu azul"], "labels": ["vermelho", "azul", "verde"]}
# Hyperparameters that a card shows, in this order.
_SETTING_NAMES = (
    "effective_batch_size micro_batch_size max_steps optimizer learning_rate min_learning_rate warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon mixed_precision frozen_parameters gradient_checkpointing "
    "lora_rank lora_alpha lora_dropout lora_targets lora_modules_to_save interpolate caption_strategy caption_count "
    "min_similarity min_pair_similarity image_embedding_cache augmented_views eval_steps num_threads"
)


# --- Reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def wrap_format_errors(folder: Path) -> Iterator[None]:
    """Turn errors that malformed values raise, such as TypeError or KeyError, into a ValueError with the folder."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, ArithmeticError, jinja2.UndefinedError) as error:
        raise ValueError(f"A file in {folder} does not have the expected content: {error!r:.100}.") from error


def collect_run_metadata(folder: Path) -> dict[str, Any]:
    """Read and check all values that the card of a run may state.

    Args:
        folder: Folder of a run with one or several seeds, or an export of it.

    Returns:
        Values for `render_card`.

    Raises:
        ValueError: If a file is missing or malformed, two records give different values for the same figure, or a file
            contains an access token.
    """
    if not folder.is_dir():
        raise ValueError(
            f"The folder {folder} does not exist. Give the folder of a finished training run or an export of it."
        )
    with wrap_format_errors(folder):
        return _read_run_metadata(folder)


def _read_run_metadata(folder: Path) -> dict[str, Any]:
    """Return the values described in `collect_run_metadata`. Malformed files may raise any error."""
    digests: dict[str, str] = {}
    model, run, runs = _read_runs(folder, digests)
    run_folders = (folder, *seed_folders(folder))
    paths = [path for run_folder in run_folders for path in sorted((run_folder / "results").glob("*.json"))]
    results = [_read_result(path, folder, digests) for path in paths]
    values = _average_results([result for result in results if result])
    # Not at the top of the file, because it imports torch, which would slow down --help.
    from modeling_capivara.processing_capivara import CONTEXT_LENGTH

    tokens, model_class = CONTEXT_LENGTH, run.get("model_class", CAPIVARA_CLASS)
    if model_class != CAPIVARA_CLASS:
        tokens = _read_json(model / "tokenizer_config.json", folder, digests)["model_max_length"]
    pictures = [(model / name).relative_to(folder).as_posix() for name in RUN_PLOT_FILES if (model / name).is_file()]
    files = [name for name in ("config.json", "onnx/quantisation.json") if (model / name).is_file()]
    contents = {name: _read_json(model / name, folder, digests) for name in files}
    digests |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in pictures}
    weights = [WeightFile(path) for path in (*model.glob("model.safetensors"), *model.glob("model-*-of-*.safetensors"))]
    origins = run["origins"]  # metadata from the cards of base and data
    evaluation_dataset, license = origins["evaluation_dataset"], str(origins["license"])
    return {
        "folder": folder,  # of the run or export
        "model": model,  # folder with the weights
        "run": run,  # `run.json` of these weights; if each seed has its own folder, that of the lowest seed
        "runs": runs,  # every `run.json`, sorted by seed
        "config": run["config"],
        "model_class": model_class,  # early runs did not store it; they trained CAPIVARA's own class
        "loss": run.get("loss", "contrastive"),
        "origins": origins,
        "titles": {evaluation_dataset["name"]: evaluation_dataset["title"]},  # dataset -> title on its own card
        "license": license if license in HUB_LICENSES else None,
        "is_inherited": license in HUB_LICENSES,
        "values": [value for value in values if not value.dim],  # rows of `average_over_seeds`, full embeddings only
        "groups": _group_values(values),
        "tokens": tokens,  # maximum length of a text; the processor cuts longer ones
        "architecture": contents.get("config.json", {}),  # `config.json` of the model; empty if there is none
        "parameters": sum(math.prod(tensor.shape) for file in weights for tensor in file.tensors.values()),
        "graphs": contents.get("onnx/quantisation.json", {}).get("graphs", {}),  # size and accuracy of each ONNX graph
        "formats": [tag for tag, files in FORMAT_FILES.items() if all((folder / file).is_file() for file in files)],
        "pictures": pictures,  # relative paths of the files in `RUN_PLOT_FILES` that exist
        "digests": dict(sorted(digests.items())),  # relative path -> SHA-256 of each file that the card is based on
    }


def _read_runs(folder: Path, digests: dict[str, str]) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Read every `run.json` of a run.

    Returns the folder with the weights, the `run.json` of these weights, and the content of all files sorted by seed.
    """
    paths = [path for path in (parent / "run.json" for parent in (folder, *seed_folders(folder))) if path.is_file()]
    if not paths:
        raise ValueError(
            f"There is no run.json in {folder} or its folders seed-*. Give the folder of a finished training run."
        )
    folders_and_runs = []
    for path in paths:
        run = _read_json(path, folder, digests)
        if (version := run["schema_version"]) != schema.SCHEMA_VERSION:
            raise ValueError(
                f"The schema version of {path} must be {schema.SCHEMA_VERSION}, got {version!r:.20}. Train again."
            )
        folders_and_runs.append((path.parent, run))
    model, run = folders_and_runs[0]
    if model != folder:
        model, run = min(folders_and_runs, key=lambda pair: pair[1]["seed"])
    by_seed = {seed_run["seed"]: seed_run for _, seed_run in folders_and_runs} | {run["seed"]: run}
    return model, run, [by_seed[seed] for seed in sorted(by_seed)]


def _read_json(path: Path, folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Return the object in a JSON file, and add the file's digest to `digests` under its path relative to `folder`."""
    name = path.relative_to(folder).as_posix()
    try:
        content, data = schema.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from error
    if secret := find_secret(data.decode("utf-8")):
        raise ValueError(f"{name} contains {secret[0]}. Revoke it, and remove it from the file before publishing.")
    digests[name] = hashlib.sha256(data).hexdigest()
    return content


def _read_result(path: Path, folder: Path, digests: dict[str, str]) -> ResultFile | None:
    """Return a parsed result file, or None for another JSON file, such as the summary of a suite."""
    content, name = _read_json(path, folder, digests), path.relative_to(folder).as_posix()
    try:
        return schema.parse_result(content, name) if "records" in content else None
    except ValueError as error:
        raise ValueError(f"{name}#/{error}.") from error


# --- Measurements ----------------------------------------------------------------------------------------------------


def _average_results(results: list[ResultFile]) -> list[Any]:
    """Average each figure over the seeds, and return the rows of `average_over_seeds`.

    Raises ValueError if there are no measurements, two files contradict each other, or a file names no seed although
    others do.
    """
    if all(record.dim for result in results for record in result.records):
        raise ValueError(
            "The folder's results contain no measurements, which a card requires. Evaluate the model first."
        )
    frame = build_records_frame(results)
    baseline_tolerance = (BASELINE_TOLERANCE_QUERIES / frame["n"]).clip(lower=CARD_TOLERANCE)
    baseline_tolerance = baseline_tolerance.mask(frame["metric"].isin(RANK_METRICS), BASELINE_TOLERANCE_RANKS)
    tolerance = baseline_tolerance.where(frame["model"] == "baseline", CARD_TOLERANCE)
    for row in find_conflicts(frame, "precision", tolerance).itertuples():
        raise ValueError(
            f"{row.first_source}/value and {row.source}/value contradict each other: the same figure is {row.first:g} "
            f"and {row.value:g}. Remove the result file that belongs to another model."
        )
    values = average_over_seeds(frame, "precision")
    for value in values:
        if value.seeds > 1 and value.measured[0].seed is None:
            raise ValueError(
                f"{value.measured[0].source} names no seed, although other results do. Measure it again with --seed, "
                "or remove it."
            )
    return values


def find_data_revision(run: dict[str, Any], measurement: Any) -> str | None:
    """Return the commit on the Hub of the dataset that was measured, or None if the dataset is not from the Hub.

    The result file names the commit, except for evaluations by the training run itself. For these, which have the
    dataset fingerprint of the run, it is in `run.json`.

    Args:
        run: Content of `run.json`.
        measurement: Measurement of one seed, from the `measured` list of a row of `average_over_seeds`.
    """
    header, dataset = measurement.file.content, measurement.dataset
    commit, fingerprint = header.get("dataset_revision"), header.get("dataset_fingerprint")
    if not commit and fingerprint:
        origin = run["origins"]["evaluation_dataset"]
        if fingerprint in (run.get("dataset_fingerprints") or {}).values() and origin["hub_id"] == dataset:
            commit = origin.get("revision")
    return commit if COMMIT_RE.fullmatch(str(commit)) and HUB_ID_RE.fullmatch(dataset) else None


def _group_values(values: list[Any]) -> list[dict[str, Any]]:
    """Group values with the same dataset, protocol and precision, in the order of the files.

    Each group has these keys: "task"; "first", its first value; "pairs" of baseline and model, sorted by direction;
    "main", the most important pairs (mean recalls, or the first metric of a classification); "gains"; "texts" and
    "images", their numbers; and "widths", pairs for full and truncated embeddings in decreasing width.
    """
    values_by_key: dict[tuple, list[Any]] = {}
    for value in sorted(values, key=lambda value: bool(value.dim)):
        protocol = value.protocol.rpartition("; first ")[0] if value.dim else value.protocol
        key = value.task, value.dataset, value.split, value.language, protocol, value.precision
        values_by_key.setdefault(key, []).append(value)
    groups = []
    for (task, *_), group in values_by_key.items():
        pairs = _pair_by_direction(value for value in group if not value.dim)
        main = [pair for pair in pairs if pair["metric"] == "mean_recall"] if task == "retrieval" else pairs[:1]
        gains = [value for value in group if value.metric == GAIN_METRIC]
        n = {value.direction: value.n for value in group}
        sizes = {"texts": n.get("text_to_image"), "images": n.get("image_to_text") or n.get("")}
        groups.append({"task": task, "first": group[0], "pairs": pairs, "main": main, "gains": gains, **sizes})
        groups[-1]["widths"] = _compare_widths(group) if any(value.dim for value in group) else []
    return groups


def _pair_by_direction(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Pair the values of baseline and model, sorted by direction, with "is_worse" in each pair. Gains are left out."""
    pairs = pair_with_baselines(value for value in values if value.metric != GAIN_METRIC)
    for pair in pairs:
        pair["is_worse"] = bool(pair["gain"]) and (pair["gain"] > 0) == pair["is_rank"]
    return sorted(pairs, key=lambda pair: ("", *DIRECTIONS).index(pair["direction"]))


def _compare_widths(group: list[Any]) -> list[dict[str, Any]]:
    """Return the pairs of a group at each embedding width: mean recall, or R@1 if there are too few images for it.

    "recall_share" is the model's recall divided by its recall with full embeddings; None for full embeddings.
    """
    metric = "mean_recall" if any(value.metric == "mean_recall" for value in group) else "recall@1"
    pairs = _pair_by_direction(value for value in group if value.metric == metric)
    wholes = {pair["direction"]: pair["capivara"] for pair in pairs if not pair["dim"]}
    for pair in pairs:
        whole, cut = wholes.get(pair["direction"]), pair["capivara"]
        pair["recall_share"] = cut.mean / whole.mean if pair["dim"] and cut and whole and whole.mean else None
    return sorted(pairs, key=lambda pair: (DIRECTIONS.index(pair["direction"]), -(pair["dim"] or math.inf)))


# --- Texts and numbers -----------------------------------------------------------------------------------------------


def to_safe_line(value: Any) -> str:
    """Return a text from a file on one line, without invisible characters and without the folders of absolute paths."""
    line = " ".join(str(value).split())
    line = "".join(letter for letter in line if unicodedata.category(letter)[0] != "C")  # control, bidi, private
    line = PATH_PREFIX_RE.sub("", line)
    return line if len(line) <= MAX_LINE_CHARACTERS else line[: MAX_LINE_CHARACTERS - 1] + "…"


def to_markdown(value: Any) -> str:
    """Escape a text from a config or dataset, so that Markdown shows it as it is, without markup or HTML."""
    line = re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", to_safe_line(value))
    line = re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", r"\\\1" if line[:1] in "-+=" else r"\1\\", line)  # lists and headings
    return html.escape(line, quote=False)


def to_code(value: Any) -> str:
    """Return a JSON value as Markdown code if it has only characters of names, otherwise as escaped text."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = to_safe_line(written)
    is_plain = text == PATH_PREFIX_RE.sub("", written) and PLAIN_CODE_RE.fullmatch(text)
    return f"`{text}`" if is_plain else to_markdown(written)


def is_portuguese(language: str) -> bool:
    """Return whether a language code means Portuguese, for example "pt" or "pt-BR"."""
    return re.split("[-_]", language)[0] in ("pt", "por")


def select_code_examples(language: str, fallback_texts: Sequence[str]) -> dict[str, str]:
    """Return the texts for the code examples of a card, as Python source.

    Args:
        language: Language code of the model.
        fallback_texts: Texts to use if the language is not Portuguese.

    Returns:
        "texts" and "labels" (lists), "template" (a prompt) and "picture" (a file name).
    """
    texts, template, picture = PORTUGUESE_EXAMPLES, "uma imagem de cor {}", "foto.jpg"
    if not is_portuguese(language):
        texts = {key: list(fallback_texts[: len(value)]) for key, value in PORTUGUESE_EXAMPLES.items()}
        template, picture = "{}", "photo.jpg"
    lists = {key: json.dumps(value, ensure_ascii=False) for key, value in texts.items()}
    return {**lists, "template": template, "picture": picture}


class CardWriter:
    """Formatter of values from a run's files in the language of a card. Templates call its methods as functions."""

    def __init__(self, language: str, run_metadata: dict[str, Any]):
        self.run_metadata, self.words, self.names = run_metadata, CARD_WORDS[language], CARD_WORDS[language]["names"]
        self.separators = str.maketrans(",.", ".," if language == "pt" else ",.")

    def number(self, value: Any, digits: int = 0, sign: bool = False, kind: str = "f") -> str:
        """Format a number.

        Args:
            value: Number from a file.
            digits: Digits after the decimal separator.
            sign: Whether to write a plus sign.
            kind: "f" for fixed-point or "e" for exponent notation.

        Raises:
            ValueError: If `value` is not a number.
        """
        if not is_number(value):
            raise ValueError(f"Expected a number, got {str(value)[:80]!r}. Write the files of the run again.")
        return f"{value:{'+' if sign else ''},.{digits}{kind}}".translate(self.separators)

    def percent(self, share: Any, sign: bool = False) -> str:
        """Format a share as a percentage, or a difference of shares in percentage points, without the unit."""
        return self.number(100 * share if is_number(share) else share, 2, sign)

    def duration(self, seconds: Any) -> str:
        """Format seconds as hours, minutes or seconds, with the unit."""
        if seconds < 90:
            return f"{self.number(seconds, 1 if seconds >= 1 else 2)} s"
        unit, part = ("h", 3600) if seconds >= 5400 else ("min", 60)
        return f"{self.number(seconds / part, 1)} {unit}"

    def language(self, key: str) -> str:
        """Return the name of a language from its code. Unknown codes are returned as they are."""
        return self.words["languages"].get(key) or to_markdown(key)

    def dataset(self, name: str) -> str:
        """Return the title of a dataset if its card has one, otherwise its name as code."""
        titles = self.run_metadata["titles"]
        return to_code(name) if titles.get(name) is None else to_markdown(titles[name])

    def phrase(self, text: str) -> str:
        """Translate a text that this project writes into result files, such as a protocol, from English."""
        for english, translation in self.words["phrases"].items():
            text = text.replace(english, translation)
        return to_markdown(text)

    def each(self, name: str, write: Callable[..., str], *more: Any) -> str:
        """Format the same value of every run, in the order of seeds. Equal values are written once.

        Args:
            name: Key in `run.json`; a dot separates nested keys, for example "seconds.training".
            write: Function that formats the value.
            more: Further arguments of `write`.
        """
        texts = [write(reduce(getitem, name.split("."), run), *more) for run in self.run_metadata["runs"]]
        return texts[0] if len(set(texts)) == 1 else "; ".join(texts)

    def linked(self, origin: dict[str, Any], kind: str) -> str:
        """Return the title of a base model or dataset, with a link if it is on the Hub.

        Args:
            origin: Metadata from `read_origin`.
            kind: Start of the path on the Hub, "datasets/" or empty for a model.
        """
        hub_id, title = origin.get("hub_id"), to_markdown(origin["title"])
        return f"[{title}](https://huggingface.co/{kind}{hub_id})" if HUB_ID_RE.fullmatch(str(hub_id)) else f"*{title}*"


# --- Values for the templates ----------------------------------------------------------------------------------------


def build_template_values(run_metadata: dict[str, Any], language: str, repo_id: str | None) -> dict[str, Any]:
    """Build all values that a template needs, except the title and the options.

    Args:
        run_metadata: Values from `collect_run_metadata`.
        language: Language of the card, "en" or "pt".
        repo_id: Hub id that the code examples load. None: they load the folder they are run in.

    Returns:
        Variables and functions of the template by name.

    Raises:
        ValueError: If a figure is missing.
    """
    run, config = run_metadata["run"], run_metadata["config"]
    trained_language, writer = config["language"], CardWriter(language, run_metadata)

    def sort_key(group: dict[str, Any]) -> tuple[int, bool]:
        return TASKS.index(group["task"]), group["first"].language != trained_language

    groups = sorted(run_metadata["groups"], key=sort_key)
    name = repo_id or run_metadata["model"].relative_to(run_metadata["folder"]).as_posix()
    main = [pair for group in groups for pair in group["main"] if pair["capivara"] and pair["baseline"]]
    gains = [value for value in run_metadata["values"] if value.metric == GAIN_METRIC]
    curve = [point["validation"] for point in run.get("curve") or () if point.get("validation")]
    architecture, origins = run_metadata["architecture"], run_metadata["origins"]
    return {
        **run_metadata | {"name": name, "groups": groups},
        "is_repository": repo_id is not None,
        **{key: getattr(writer, key) for key in dir(writer) if not key.startswith("_")},
        "text": to_markdown,
        "code": to_code,
        "get_published_base": get_published_base,
        "revision": partial(find_data_revision, run),
        "is_portuguese": is_portuguese(trained_language),
        "rank_metrics": RANK_METRICS,
        "is_capivara": run_metadata["model_class"] == CAPIVARA_CLASS,
        "is_siglip": run_metadata["model_class"] == "SiglipModel",
        "citation": (TEMPLATE_FOLDER / "citation.bib").read_text(encoding="utf-8").strip(),
        "examples": partial(select_code_examples, trained_language),
        "width": architecture.get("projection_dim") or (architecture.get("text_config") or {}).get("projection_size"),
        "towers": [(key, architecture.get(key) or {}) for key in ("vision_config", "text_config")],
        "origins_by_kind": [
            ("model", origins["model"]),
            *(("dataset", origin) for origin in origins["datasets"]),
            *(("teacher", origin) for origin in [origins.get("teacher")] if origin),
        ],
        "translated_by": _describe_translators(origins["datasets"], trained_language),
        "licenses": lambda origin: ", ".join(map(to_code, origin.get("licenses") or ())),
        "is_rotated": (run_metadata["model"] / "rotation.safetensors").is_file(),
        "stopped_early": any(seed_run["steps"] < config["max_steps"] for seed_run in run_metadata["runs"]),
        "validation": [(key, curve[0][key], curve[-1][key]) for key in DIRECTIONS] if len(curve) > 1 else [],
        "settings": _select_settings(config, run.get("fixed", {})),
        "main": main,
        "gains": gains,
        "worse": [pair for pair in main if pair["is_worse"]],
        "summary": [pair for pair in main if pair["task"] == "retrieval" and pair["language"] == trained_language],
        "gains_including_zero": _find_gains_including_zero(gains),
        "has_several_datasets": len({value.dataset for value in run_metadata["values"]}) > 1,
        "measured_seeds": [row.seed for row in max(run_metadata["values"], key=lambda value: value.seeds).measured],
        "layout": MARKDOWN_TEMPLATES.get_template("model_card.md.j2"),
    }


def _find_gains_including_zero(gains: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Return the gains with a confidence interval that includes zero, each with the measurements (seeds) concerned."""
    measurements = [
        (gain, [row for row in gain.measured if row.interval_95 and row.interval_95[0] <= 0 <= row.interval_95[1]])
        for gain in gains
    ]
    return [(gain, rows) for gain, rows in measurements if rows]


def _describe_translators(datasets: list[dict[str, Any]], language: str) -> str:
    """Return who translated the training captions: human, machine, mixed, or an empty text if no dataset states it."""
    stated = {origin.get("translations", {}).get(language, "") for origin in datasets} & {"human", "machine"}
    return "mixed" if len(stated) > 1 else "".join(stated)


def _select_settings(config: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that the card shows. Settings without effect in this run are left out.

    Args:
        config: Settings of the run.
        fixed: Values that are the same in every run of this version.
    """
    settings = {key: config.get(key, fixed.get(key)) for key in _SETTING_NAMES.split()}
    if not config["lora_rank"]:
        settings = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    if config.get("caption_strategy") == "none":
        settings |= dict.fromkeys(("caption_count", "min_similarity"))
    if settings["image_embedding_cache"] not in (None, "", "off"):
        settings["image_embedding_cache"] = "on"  # the setting may be a folder of this machine
    return {key: value for key, value in settings.items() if value is not False and value not in (None, "", [], {})}
