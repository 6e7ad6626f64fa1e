"""Read and check the files of a training run, and turn them into values for the templates of the model card.

    run_metadata = collect_run_metadata(Path("runs/openmoji-pt-001"))
    run_metadata["config"]["learning_rate"]
    template_values = build_template_values(run_metadata, "en", repo_id=None)

The values come from `run.json`, `results/*.json`, `config.json`, the headers of the safetensors files, and
`onnx/quantisation.json`. If an optional value is missing, the card omits it. Texts from files are escaped, so that they
can't add Markdown or HTML to the card.
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

from capivara_common.files import list_seed_run_folders, read_json
from capivara_common.hub_cache import COMMIT_RE
from capivara_common.model_kinds import KINDS, NATIVE_MODEL_TYPE
from capivara_common.privacy import find_secret
from capivara_common.weight_file import WeightFile
from eval.benchmarks import get_published_baseline_result
from eval.records import result_files
from eval.records.result_files import DIRECTIONS, GAIN_METRIC, RANK_METRICS, TASKS, ResultFile, is_number
from eval.records.tables import average_over_seeds, build_records_frame, find_conflicting_records, pair_with_baselines
from hub_upload.upload_checks import RUN_PLOT_FILES

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
# Maps the language of a card ("en" or "pt") to the words of the card in this language: names of languages and metrics,
# and translations of the texts in result files.
CARD_WORDS = read_json(TEMPLATE_FOLDER / "card_words.json")
LANGUAGES = tuple(CARD_WORDS)
# Jinja's HTML escaping is off, because the output is Markdown. Instead, `escape_value_for_markdown` and
# `format_as_markdown_code_or_escaped_text` escape the texts that come from files.
MARKDOWN_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER), autoescape=False, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
# The license identifiers that the Hub accepts, from https://huggingface.co/docs/hub/repositories-licenses. "unknown"
# and "other" are left out, because they name no license.
HUB_LICENSES = frozenset((Path(__file__).parent / "licenses.txt").read_text(encoding="utf-8").split())
FORMAT_FILES = {  # maps the Hub tag of an export format to the files that a folder in this format contains
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "sentence-transformers": ("modules.json",),
    "onnx": ("onnx/text_model.onnx", "onnx/vision_model.onnx"),
    "transformers.js": ("onnx/model.onnx", "preprocessor_config.json"),
}
# Pattern of a Hub id, such as "hiaac-nlp/CAPIVARA". Owner and name have at most 96 characters each and contain neither
# "--" nor "..".
HUB_ID_RE = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?<![.-])", re.ASCII)
CAPIVARA_CLASS = KINDS[NATIVE_MODEL_TYPE].class_name
FIXED_LENGTH_CLASSES = [kind.class_name for kind in KINDS.values() if kind.pads_to_max_length]
# If two results for the same measurement (values from 0 to 1) differ by more than this, they contradict each other. A
# card shows percentages with two decimals, so a difference of up to 0.005 percentage points is only rounding.
CARD_TOLERANCE = 5e-5
# Larger differences are allowed between evaluations of the base model. It is evaluated again with every seed, possibly
# on another device, where rounding may change the ranks of some queries.
BASELINE_TOLERANCE_QUERIES = 3  # number of queries whose results may differ between two evaluations
BASELINE_TOLERANCE_RANKS = 1  # largest allowed difference between two median ranks
# Texts that a model card takes from the files of a run, such as names, are truncated to this length.
MAX_LINE_CHARACTERS = 300
# Texts that can be written as Markdown code without escaping: ASCII letters, digits and characters of names and paths.
PLAIN_CODE_RE = re.compile(r"[A-Za-z0-9][\w./@:+=,() -]*", re.ASCII)
# The folders of an absolute path, without the file name. They are removed from published texts, because they may reveal
# names of users and computers. Unix paths, paths from the home folder (~) and Windows paths match; URLs don't match.
PATH_PREFIX_RE = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\"<>]+/)+|\b[A-Za-z]:\\(?:[^\s\\]+\\)+")
# Texts and labels in the code examples of a Portuguese model's card. The examples use a red and a blue image.
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
    """Return a context manager that turns errors caused by malformed files, such as KeyError, into ValueError.

    Args:
        folder: Folder of the files that are read, for the error message.

    Raises:
        ValueError: If the `with` block raises an error that a missing value or a wrong type typically causes.
    """
    try:
        yield
    except (TypeError, LookupError, AttributeError, ArithmeticError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"A file in {folder} does not have the expected content: {error!r:.100}. Write the file again."
        ) from error


def collect_run_metadata(folder: Path) -> dict[str, Any]:
    """Read and check all values that the model card of a training run may state.

    Args:
        folder: Folder of a run with one or several seeds, or an export of the run.

    Returns:
        A dict {name: value} for `render_card`. The comments in the `return` statement describe all keys. Some are:

        - "config": settings of the training run.
        - "license": Hub identifier of the license, or None.
        - "values": evaluation results of full-width embeddings, averaged over seeds.

    Raises:
        ValueError: If a file is missing, malformed or contains an access token, or if results contradict each other.
        KeyError, TypeError: If a file lacks a value, or a value has the wrong type.
    """
    if not folder.is_dir():
        raise ValueError(
            f"The folder {folder} does not exist. Give the folder of a finished training run or an export of it."
        )
    digests: dict[str, str] = {}
    model, run, runs = _find_model_and_runs(folder, digests)
    run_folders = (folder, *list_seed_run_folders(folder))
    paths = [path for run_folder in run_folders for path in sorted((run_folder / "results").glob("*.json"))]
    results = [_read_result_recording_digest(path, folder, digests) for path in paths]
    values = _check_and_average_results([result for result in results if result])
    # Imported here and not at the top of the file, because `processing_capivara` imports torch, which would slow down
    # --help.
    from modeling_capivara.processing_capivara import CONTEXT_LENGTH

    tokens, model_class = CONTEXT_LENGTH, run.get("model_class", CAPIVARA_CLASS)
    if model_class != CAPIVARA_CLASS:
        tokens = _read_json_recording_digest(model / "tokenizer_config.json", folder, digests)["model_max_length"]
    pictures = [(model / name).relative_to(folder).as_posix() for name in RUN_PLOT_FILES if (model / name).is_file()]
    files = [name for name in ("config.json", "onnx/quantisation.json") if (model / name).is_file()]
    contents = {name: _read_json_recording_digest(model / name, folder, digests) for name in files}
    digests |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in pictures}
    weights = [WeightFile(path) for path in (*model.glob("model.safetensors"), *model.glob("model-*-of-*.safetensors"))]
    origins = run["origins"]  # metadata from the cards of the base model and the datasets
    evaluation_dataset, license = origins["evaluation_dataset"], str(origins["license"])
    return {
        "folder": folder,  # folder of the run or export
        "model": model,  # folder with the weights: `folder`, or the lowest `seed-*` if each seed has its own folder
        "run": run,  # content of the `run.json` that belongs to these weights
        "runs": runs,  # contents of the `run.json` files of all seeds, sorted by seed
        "config": run["config"],
        "model_class": model_class,  # class of the model; `CapivaraModel` for old runs, which did not store it
        "loss": run.get("loss", "contrastive"),  # "contrastive" (CLIP) or "sigmoid" (SigLIP)
        "origins": origins,
        "titles": {evaluation_dataset["name"]: evaluation_dataset["title"]},  # {dataset name: title on its card}
        "license": license if license in HUB_LICENSES else None,
        "is_inherited": license in HUB_LICENSES,  # whether base model and data determine the license
        "values": [value for value in values if not value.dim],  # results of full-width embeddings, averaged over seeds
        "groups": _group_results_by_table(values),  # all results, one group for each table of the card
        "tokens": tokens,  # maximum number of tokens in a text; the processor truncates longer texts
        "architecture": contents.get("config.json", {}),  # content of `config.json`; empty if the file is missing
        "parameters": sum(math.prod(tensor.shape) for file in weights for tensor in file.tensors.values()),
        "graphs": contents.get("onnx/quantisation.json", {}).get("graphs", {}),  # size and accuracy of each ONNX graph
        "formats": [tag for tag, files in FORMAT_FILES.items() if all((folder / file).is_file() for file in files)],
        "pictures": pictures,  # relative paths of the plots in `RUN_PLOT_FILES` that exist
        "digests": dict(sorted(digests.items())),  # {relative path: SHA-256} of each file that was read for the card
    }


def _find_model_and_runs(folder: Path, digests: dict[str, str]) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Find the folder with the weights of a training run, and read the run's files `run.json`.

    A run with one seed has a single `run.json` in its folder. A run with several seeds has a `run.json` in each of its
    folders `seed-*`. The folder itself may have a `run.json`, too.

    Args:
        folder: Folder of the run or export.
        digests: Dict {relative path: SHA-256} of the files that were read. This function adds the files that it reads.

    Returns:
        A tuple (model, run, runs):

        - model: folder with the weights: `folder` if it has a `run.json`, otherwise the folder of the lowest seed.
        - run: content of the `run.json` that belongs to these weights.
        - runs: contents of the `run.json` files of all seeds, sorted by seed.

    Raises:
        ValueError: If there is no `run.json`, or a file is malformed or has another schema version.
    """
    runs = {}  # {folder: content of its run.json}
    for path in filter(Path.is_file, [parent / "run.json" for parent in (folder, *list_seed_run_folders(folder))]):
        run = runs[path.parent] = _read_json_recording_digest(path, folder, digests)
        if (version := run["schema_version"]) != result_files.SCHEMA_VERSION:
            raise ValueError(
                f"The schema version of {path} must be {result_files.SCHEMA_VERSION}, got {version!r:.20}. Train again."
            )
    if not runs:
        raise ValueError(
            f"There is no run.json in {folder} or its folders seed-*. Give the folder of a finished training run."
        )
    model = folder if folder in runs else min(runs, key=lambda seed_folder: runs[seed_folder]["seed"])
    # If two run.json files name the same seed, the file in the folder with the weights is used.
    by_seed = {run["seed"]: run for run in (*runs.values(), runs[model])}
    return model, runs[model], [by_seed[seed] for seed in sorted(by_seed)]


def _read_json_recording_digest(path: Path, folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Read a JSON file whose top level is an object, and add its SHA-256 to `digests`, which the card lists.

    Args:
        path: File to read.
        folder: Folder of the run or export.
        digests: Dict {path relative to `folder`: SHA-256} of the files that were read. This function adds `path`.

    Returns:
        The content of the file.

    Raises:
        ValueError: If the file is malformed or contains an access token or key.
    """
    name = path.relative_to(folder).as_posix()
    try:
        content, data = result_files.read_untrusted_json_object_and_bytes(path)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from error
    if secret := find_secret(data.decode("utf-8")):
        raise ValueError(f"{name} contains {secret[0]}. Revoke it, and remove it from the file before publishing.")
    digests[name] = hashlib.sha256(data).hexdigest()
    return content


def _read_result_recording_digest(path: Path, folder: Path, digests: dict[str, str]) -> ResultFile | None:
    """Read a file with evaluation results, and add its SHA-256 to `digests`, which the card lists.

    Args:
        path: File to read.
        folder: Folder of the run or export.
        digests: Dict {path relative to `folder`: SHA-256} of the files that were read. This function adds `path`.

    Returns:
        The parsed result file. None for a JSON file without the key "records", such as the summary of an evaluation
        suite (a set of benchmarks).

    Raises:
        ValueError: If the file is malformed or contains an access token or key.
    """
    content, name = _read_json_recording_digest(path, folder, digests), path.relative_to(folder).as_posix()
    try:
        return result_files.parse_result(content, name) if "records" in content else None
    except ValueError as error:
        raise ValueError(f"{name}#/{error}.") from error


# --- Measurements ----------------------------------------------------------------------------------------------------


def _check_and_average_results(results: list[ResultFile]) -> list[Any]:
    """Check that the result files of a run do not contradict each other, and average each metric over the seeds.

    Args:
        results: All result files of the run.

    Returns:
        The named tuples that `eval.records.tables.average_over_seeds` returns, one for each metric, model and evaluated
        dataset.

    Raises:
        ValueError: If all results were measured with truncated embeddings, or there are no results. Also if two files
            have different values for the same measurement, or if only some of the files name the seed of the model.
    """
    if all(record.dim for result in results for record in result.records):
        raise ValueError(
            "The folder has no results of full-width embeddings, which a card requires. Evaluate the model first."
        )
    frame = build_records_frame(results)
    baseline_tolerance = (BASELINE_TOLERANCE_QUERIES / frame["n"]).clip(lower=CARD_TOLERANCE)
    baseline_tolerance = baseline_tolerance.mask(frame["metric"].isin(RANK_METRICS), BASELINE_TOLERANCE_RANKS)
    tolerance = baseline_tolerance.where(frame["model"] == "baseline", CARD_TOLERANCE)
    for row in find_conflicting_records(frame, "precision", tolerance).itertuples():
        raise ValueError(
            f"{row.first_source}/value and {row.source}/value contradict each other: for the same measurement, one has "
            f"{row.first:g} and the other {row.value:g}. Remove the result file that belongs to another model."
        )
    values = average_over_seeds(frame, "precision")
    for value in values:
        if value.seeds > 1 and value.measured[0].seed is None:
            raise ValueError(
                f"{value.measured[0].source} names no seed, although other results do. Repeat the evaluation with "
                "--seed, or remove this result file."
            )
    return values


def find_eval_dataset_revision(run: dict[str, Any], measurement: Any) -> str | None:
    """Find the Hub commit of the dataset with which a model was evaluated.

    Args:
        run: Content of `run.json`.
        measurement: Evaluation result of one seed, from the list `measured` in a result of `average_over_seeds`.

    Returns:
        The commit hash. None if it is unknown, or the dataset is not from the Hub.
    """
    header, dataset = measurement.file.content, measurement.dataset
    commit, fingerprint = header.get("dataset_revision"), header.get("dataset_fingerprint")
    # Result files that the training run itself wrote don't name the commit. It is read from run.json, but only if both
    # files have the same fingerprint (hash) of the dataset.
    if not commit and fingerprint:
        origin = run["origins"]["evaluation_dataset"]
        if fingerprint in (run.get("dataset_fingerprints") or {}).values() and origin["hub_id"] == dataset:
            commit = origin.get("revision")
    return commit if COMMIT_RE.fullmatch(str(commit)) and HUB_ID_RE.fullmatch(dataset) else None


def _group_results_by_table(values: list[Any]) -> list[dict[str, Any]]:
    """Group evaluation results, so that the card can show each group as a table.

    The results of a group have the same task, dataset, split, language, evaluation protocol and precision.

    Args:
        values: Results of `average_over_seeds`, for full and truncated embeddings.

    Returns:
        One dict per group, in the order of the files, with these keys:

        - "task": "retrieval", "classification" or "linear_probe".
        - "first": the first result of the group.
        - "pairs": pairs of baseline and model with full-width embeddings (see `_pair_model_with_baseline`).
        - "main": the pairs with the most important metric: mean recall for retrieval, otherwise the first metric.
        - "gains": results of the metric `GAIN_METRIC`, the difference in mean recall between model and baseline.
        - "texts" and "images": numbers of texts and images that were evaluated, or None.
        - "widths": pairs for full and truncated embeddings, from `_compare_recall_by_embedding_width`. Empty if no
          truncated embeddings were evaluated.
    """
    values_by_key: dict[tuple, list[Any]] = {}
    for value in sorted(values, key=lambda value: bool(value.dim)):
        protocol = value.protocol.rpartition("; first ")[0] if value.dim else value.protocol
        key = value.task, value.dataset, value.split, value.language, protocol, value.precision
        values_by_key.setdefault(key, []).append(value)
    groups = []
    for (task, *_), group in values_by_key.items():
        pairs = _pair_model_with_baseline(value for value in group if not value.dim)
        main = [pair for pair in pairs if pair["metric"] == "mean_recall"] if task == "retrieval" else pairs[:1]
        gains = [value for value in group if value.metric == GAIN_METRIC]
        n = {value.direction: value.n for value in group}
        sizes = {"texts": n.get("text_to_image"), "images": n.get("image_to_text") or n.get("")}
        groups.append({"task": task, "first": group[0], "pairs": pairs, "main": main, "gains": gains, **sizes})
        groups[-1]["widths"] = _compare_recall_by_embedding_width(group) if any(value.dim for value in group) else []
    return groups


def _pair_model_with_baseline(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Pair the results of the baseline (the base model) with the results of the trained model.

    Results of the metric `GAIN_METRIC` are skipped, because they are already differences between the two models.

    Args:
        values: Results of `average_over_seeds`.

    Returns:
        The dicts that `eval.records.tables.pair_with_baselines` returns, sorted by retrieval direction. Each has the
        additional key "is_worse": whether the model is worse than the baseline.
    """
    pairs = pair_with_baselines(value for value in values if value.metric != GAIN_METRIC)
    for pair in pairs:
        pair["is_worse"] = bool(pair["gain"]) and (pair["gain"] > 0) == pair["is_rank"]
    return sorted(pairs, key=lambda pair: ("", *DIRECTIONS).index(pair["direction"]))


def _compare_recall_by_embedding_width(group: list[Any]) -> list[dict[str, Any]]:
    """Compare the baseline and the trained model at each embedding width: full embeddings and truncated embeddings.

    The metric is mean recall. If a group has no mean recall, because it has too few images, recall@1 is used instead.

    Args:
        group: Results of `average_over_seeds` that have the same dataset, protocol and precision.

    Returns:
        The dicts that `_pair_model_with_baseline` returns, sorted by direction and decreasing width. Each has the
        additional key "recall_share": the trained model's recall with truncated embeddings divided by its recall with
        full embeddings. The value is None for full embeddings.
    """
    metric = "mean_recall" if any(value.metric == "mean_recall" for value in group) else "recall@1"
    pairs = _pair_model_with_baseline(value for value in group if value.metric == metric)
    wholes = {pair["direction"]: pair["capivara"] for pair in pairs if not pair["dim"]}
    for pair in pairs:
        whole, cut = wholes.get(pair["direction"]), pair["capivara"]
        pair["recall_share"] = cut.mean / whole.mean if pair["dim"] and cut and whole and whole.mean else None
    return sorted(pairs, key=lambda pair: (DIRECTIONS.index(pair["direction"]), -(pair["dim"] or math.inf)))


# --- Texts and numbers -----------------------------------------------------------------------------------------------


def to_publishable_line(value: Any) -> str:
    """Convert a value from a file to one line of text that is safe to publish in a model card.

    Invisible characters and the folders of absolute paths are removed. A line longer than `MAX_LINE_CHARACTERS` is
    truncated.

    Args:
        value: Text, or another value that is converted to a text.

    Returns:
        The line, not escaped for Markdown.
    """
    line = " ".join(str(value).split())
    # Remove all characters of the Unicode category C: control characters, text direction marks and private-use
    # characters. They are invisible, and some of them change how the text around them is displayed.
    line = "".join(letter for letter in line if unicodedata.category(letter)[0] != "C")
    line = PATH_PREFIX_RE.sub("", line)
    return line if len(line) <= MAX_LINE_CHARACTERS else line[: MAX_LINE_CHARACTERS - 1] + "…"


def escape_value_for_markdown(value: Any) -> str:
    """Escape a text from a file, so that Markdown shows it literally, without interpreting markup or HTML.

    Args:
        value: Text, or another value that is converted to a text.

    Returns:
        One line of escaped text.
    """
    line = re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", to_publishable_line(value))
    # A "-", "+" or "=" at the start of a line, or a number such as "1.", would begin a list or mark a heading. A
    # backslash prevents this.
    line = re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", r"\\\1" if line[:1] in "-+=" else r"\1\\", line)
    return html.escape(line, quote=False)


def format_as_markdown_code_or_escaped_text(value: Any) -> str:
    """Format a value from a JSON file for Markdown: simple names and paths as code, other texts escaped.

    Args:
        value: Text, or another value that is written as JSON.

    Returns:
        The value in backticks, if it has only characters of names and paths (`PLAIN_CODE_RE`). Otherwise, the value as
        escaped text.
    """
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = to_publishable_line(written)
    is_plain = text == PATH_PREFIX_RE.sub("", written) and PLAIN_CODE_RE.fullmatch(text)
    return f"`{text}`" if is_plain else escape_value_for_markdown(written)


def _is_portuguese(language: str) -> bool:
    """Return whether a language code stands for Portuguese.

    Args:
        language: Language code. "pt", "pt-BR" and "por" are Portuguese.
    """
    return re.split("[-_]", language)[0] in ("pt", "por")


def select_code_example_inputs(language: str, fallback_texts: Sequence[str]) -> dict[str, str]:
    """Choose the texts that the code examples of a model card pass to the model.

    Args:
        language: Language code of the model.
        fallback_texts: Texts and labels for all languages except Portuguese, which has fixed examples.

    Returns:
        A dict of strings with these keys:

        - "texts" and "labels": Python source code of a list of strings.
        - "template": prompt with the placeholder {} for a label.
        - "picture": file name of an image.
    """
    texts, template, picture = PORTUGUESE_EXAMPLES, "uma imagem de cor {}", "foto.jpg"
    if not _is_portuguese(language):
        texts = {key: list(fallback_texts[: len(value)]) for key, value in PORTUGUESE_EXAMPLES.items()}
        template, picture = "{}", "photo.jpg"
    lists = {key: json.dumps(value, ensure_ascii=False) for key, value in texts.items()}
    return {**lists, "template": template, "picture": picture}


class CardWriter:
    """Formatter of numbers, durations and names in the language of a model card.

    The Jinja templates of the card call its methods by name, for example `{{ percent(gain, sign=true) }}`.

    Args:
        language: Language of the card, "en" or "pt".
        run_metadata: Values from `collect_run_metadata`.
    """

    def __init__(self, language: str, run_metadata: dict[str, Any]):
        self.run_metadata, self.words, self.names = run_metadata, CARD_WORDS[language], CARD_WORDS[language]["names"]
        self.separators = str.maketrans(",.", ".," if language == "pt" else ",.")

    def number(self, value: Any, digits: int = 0, sign: bool = False, kind: str = "f") -> str:
        """Format a number with the thousands and decimal separators of the card's language.

        Args:
            value: Number from a file.
            digits: Digits after the decimal separator.
            sign: Whether to write a plus sign before a number that is not negative.
            kind: "f" for fixed-point or "e" for exponent notation.

        Raises:
            ValueError: If `value` is not a number.
        """
        if not is_number(value):
            raise ValueError(
                f"The card needs a number, but a file of the run has {str(value)[:80]!r}. Write the file again."
            )
        return f"{value:{'+' if sign else ''},.{digits}{kind}}".translate(self.separators)

    def percent(self, share: Any, sign: bool = False) -> str:
        """Format a fraction (0 to 1), such as a recall, as a percentage with two decimals, without a percent sign.

        Args:
            share: A fraction, or a difference of two fractions. For example, 0.015 gives "1.50".
            sign: Whether to write a plus sign before a number that is not negative.

        Raises:
            ValueError: If `share` is not a number.
        """
        return self.number(100 * share if is_number(share) else share, 2, sign)

    def duration(self, seconds: Any) -> str:
        """Format a duration with its unit, in the number format of the card's language.

        Args:
            seconds: Duration in seconds. Durations below 90 seconds are written in seconds, below 90 minutes in
                minutes, and longer durations in hours.
        """
        if seconds < 90:
            return f"{self.number(seconds, 1 if seconds >= 1 else 2)} s"
        unit, part = ("h", 3600) if seconds >= 5400 else ("min", 60)
        return f"{self.number(seconds / part, 1)} {unit}"

    def language(self, key: str) -> str:
        """Translate a language code to the name of the language. The name is written in the card's language.

        Args:
            key: Language code, such as "pt". An unknown code is returned as it is, escaped for Markdown.
        """
        return self.words["languages"].get(key) or escape_value_for_markdown(key)

    def dataset(self, name: str) -> str:
        """Return the title of a dataset, escaped for Markdown.

        If the title is unknown, the name of the dataset is returned as Markdown code.

        Args:
            name: Name of the dataset in the result files.
        """
        title = self.run_metadata["titles"].get(name)
        return format_as_markdown_code_or_escaped_text(name) if title is None else escape_value_for_markdown(title)

    def phrase(self, text: str) -> str:
        """Translate an English text from a result file to the card's language, and escape it for Markdown.

        Args:
            text: English text, such as the description of an evaluation protocol.
        """
        for english, translation in self.words["phrases"].items():
            text = text.replace(english, translation)
        return escape_value_for_markdown(text)

    def each(self, name: str, write: Callable[..., str], *more: Any) -> str:
        """Format a value of `run.json` for each seed of a run, and join the results with semicolons.

        Args:
            name: Key in `run.json`. Dots separate nested keys, as in "seconds.training".
            write: Function that formats a single value, such as `duration`.
            more: Further arguments of `write`.

        Returns:
            The formatted values in the order of seeds, or a single value if all are equal.
        """
        texts = [write(reduce(getitem, name.split("."), run), *more) for run in self.run_metadata["runs"]]
        return texts[0] if len(set(texts)) == 1 else "; ".join(texts)

    def licenses(self, origin: dict[str, Any]) -> str:
        """List the licenses of a base model or dataset as Markdown code, separated by commas.

        Args:
            origin: Metadata of the base model or dataset, from `hub_upload.origins.read_origin_card_metadata`.
        """
        return ", ".join(map(format_as_markdown_code_or_escaped_text, origin.get("licenses") or ()))

    def linked(self, origin: dict[str, Any], kind: str) -> str:
        """Format the title of a base model or dataset as a link to the Hub. Without a Hub id, the title is in italics.

        Args:
            origin: Metadata from `hub_upload.origins.read_origin_card_metadata`.
            kind: Start of the path on the Hub: "datasets/" for a dataset, "" for a model.
        """
        hub_id, title = origin.get("hub_id"), escape_value_for_markdown(origin["title"])
        return f"[{title}](https://huggingface.co/{kind}{hub_id})" if HUB_ID_RE.fullmatch(str(hub_id)) else f"*{title}*"


# --- Values for the templates ----------------------------------------------------------------------------------------


def build_template_values(run_metadata: dict[str, Any], language: str, repo_id: str | None) -> dict[str, Any]:
    """Build the variables for the Jinja template of a model card, except `title`, `options` and `card_data`.

    Args:
        run_metadata: Values from `collect_run_metadata`.
        language: Language of the card, "en" or "pt".
        repo_id: Hub id that the code examples in the card load. None: they load the current folder.

    Returns:
        A dict {name of the template variable: value or function}.

    Raises:
        ValueError: If a value that the card requires is missing.
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
    works_by_kind = {"model": [origins["model"]], "dataset": origins["datasets"], "teacher": [origins.get("teacher")]}
    return {
        **run_metadata | {"name": name, "groups": groups},
        "is_repository": repo_id is not None,
        **{key: getattr(writer, key) for key in dir(writer) if not key.startswith("_")},
        "text": escape_value_for_markdown,
        "code": format_as_markdown_code_or_escaped_text,
        "get_published_baseline_result": get_published_baseline_result,
        "revision": partial(find_eval_dataset_revision, run),
        "is_portuguese": _is_portuguese(trained_language),
        "rank_metrics": RANK_METRICS,
        "is_capivara": run_metadata["model_class"] == CAPIVARA_CLASS,
        "is_siglip": run_metadata["model_class"] in FIXED_LENGTH_CLASSES,
        "citation": (TEMPLATE_FOLDER / "citation.bib").read_text(encoding="utf-8").strip(),
        "examples": partial(select_code_example_inputs, trained_language),
        "width": architecture.get("projection_dim") or (architecture.get("text_config") or {}).get("projection_size"),
        "towers": [(key, architecture.get(key) or {}) for key in ("vision_config", "text_config")],
        "origins_by_kind": [(kind, origin) for kind, works in works_by_kind.items() for origin in works if origin],
        "translated_by": _infer_human_or_machine_translation(origins["datasets"], trained_language),
        "is_rotated": (run_metadata["model"] / "rotation.safetensors").is_file(),
        "stopped_early": any(seed_run["steps"] < config["max_steps"] for seed_run in run_metadata["runs"]),
        "validation": [(key, curve[0][key], curve[-1][key]) for key in DIRECTIONS] if len(curve) > 1 else [],
        "settings": _select_hyperparameters_for_card(config, run.get("fixed", {})),
        "main": main,
        "gains": gains,
        "worse": [pair for pair in main if pair["is_worse"]],
        "summary": [pair for pair in main if pair["task"] == "retrieval" and pair["language"] == trained_language],
        "gains_including_zero": _find_insignificant_gains(gains),
        "has_several_datasets": len({value.dataset for value in run_metadata["values"]}) > 1,
        "measured_seeds": [row.seed for row in max(run_metadata["values"], key=lambda value: value.seeds).measured],
        "layout": MARKDOWN_TEMPLATES.get_template("model_card.md.j2"),
    }


def _find_insignificant_gains(gains: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Find the gains over the baseline that are not significant: their 95 % confidence interval includes zero.

    Args:
        gains: Results of `average_over_seeds` for the metric `GAIN_METRIC`.

    Returns:
        A tuple (gain, measurements) for each gain that is not significant for at least one seed. The list
        `measurements` has the results of the seeds whose interval includes zero.
    """
    measurements = [
        (gain, [row for row in gain.measured if row.interval_95 and row.interval_95[0] <= 0 <= row.interval_95[1]])
        for gain in gains
    ]
    return [(gain, rows) for gain, rows in measurements if rows]


def _infer_human_or_machine_translation(datasets: list[dict[str, Any]], language: str) -> str:
    """Find out from the cards of the training datasets whether humans or machines translated the captions.

    Args:
        datasets: Metadata of the training datasets, from `hub_upload.origins.read_origin_card_metadata`.
        language: Language code of the captions.

    Returns:
        "human" or "machine", "mixed" if the datasets differ, or "" if no card states it.
    """
    stated = {origin.get("translations", {}).get(language, "") for origin in datasets} & {"human", "machine"}
    return "mixed" if len(stated) > 1 else "".join(stated)


def _select_hyperparameters_for_card(config: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """Select the hyperparameters that the card shows: those in `_SETTING_NAMES` that had an effect in the run.

    For example, the settings of LoRA are left out if the run did not use LoRA.

    Args:
        config: Settings of the run, the value of "config" in `run.json`.
        fixed: Hyperparameters that users can't set, because the training code uses constants. They are the value of
            "fixed" in `run.json`.

    Returns:
        A dict {name of the hyperparameter: value}, in the order of `_SETTING_NAMES`.
    """
    settings = {key: config.get(key, fixed.get(key)) for key in _SETTING_NAMES.split()}
    if not config["lora_rank"]:
        settings = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    if config.get("caption_strategy") == "none":
        settings |= dict.fromkeys(("caption_count", "min_similarity"))
    if settings["image_embedding_cache"] not in (None, "", "off"):
        # The value may be the path of a folder on this computer. It must not be published, so the card says only "on".
        settings["image_embedding_cache"] = "on"
    return {key: value for key, value in settings.items() if value is not False and value not in (None, "", [], {})}
