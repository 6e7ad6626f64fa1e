"""Write the model card (README.md) of a training run or export, or check that a card still agrees with the files.

    python -m hub_upload.card --model runs/openmoji-pt-001
    python -m hub_upload.card --model runs/openmoji-pt-001 --repo_id my-name/my-model --language pt
    python -m hub_upload.card --model runs/mine --license cc-by-4.0    # only if no license can be inferred
    python -m hub_upload.card --check runs/openmoji-pt-001

All numbers in a card come from files of the run or export. `--check` prints each line that differs from these files.
You may add sentences without numbers to a card, but they are lost when the card is written again.

To publish a model, run `hub_upload.export`, `hub_upload.card` and `hub_upload.push` in this order.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import list_seed_run_folders, write_text
from eval.records.result_files import GAIN_METRIC
from hub_upload import card_values as values
from hub_upload.licenses import check_stated_license
from hub_upload.upload_checks import check_repo_id, check_text_is_publishable

CARD_FILE = "README.md"
# Version of the card templates. Increase it when the text of a template changes. `--check` compares only the numbers
# and file digests of a card from another template version, because its sentences can't be rendered again.
TEMPLATE_VERSION = 6
# HTML comment in which a card stores, as JSON, the options that it was rendered with, so that `--check` can render it
# again. Cards of template version 1 store no version.
OPTIONS_COMMENT_RE = re.compile(r"<!-- made by hub_upload\.card with (\{[^\n]*\}) -->")
# Markup that could hide other lines of a card or change their meaning: HTML, code blocks, tables, headings, and links
# to anything but web pages. Users may add lines to a card, but `--check` refuses added lines with such markup.
REFRAMING_MARKUP_RE = re.compile(r"<|^\s*(```|~~~|\||#|=+$|-+$)|\]\((?!https?://)")
# Values that `--check` compares even if a card was written with another version of the templates: table cells with
# numbers, signed numbers in lists, and digests of files (32 hexadecimal digits).
CARD_VALUE_RE = re.compile(
    r"(?<=\| )(?:\*\*)?[-+]?\d[\d.,e-]*(?: ± [\d.,]+)?(?:\*\*)?(?= \|)|(?<=[ ])[-+]\d+[.,]\d+|`[0-9a-f]{32}`"
)
MAX_SHOWN_CHARACTERS = 120  # an error message quotes at most this many characters of a card line
# Maps the (task, search direction) of a result to the (id, display name) of the task in the Hub's "model index", which
# is the list of metrics in the front matter (YAML header) of a card. The Hub defines no task for image-text retrieval,
# so this project chose the ids and names of the two search directions.
HUB_TASKS = {
    ("retrieval", "text_to_image"): ("text-to-image-retrieval", "Text-to-image retrieval"),
    ("retrieval", "image_to_text"): ("image-to-text-retrieval", "Image-to-text retrieval"),
    ("classification", ""): ("zero-shot-image-classification", "Zero-shot image classification"),
    ("linear_probe", ""): ("image-classification", "Linear probe"),
}


@dataclass
class CardArguments:
    """Command-line arguments of `hub_upload.card`, which writes the model card of a training run or checks it."""

    model: Path | None = flag(None, "Folder of a finished training run, or of its export. Its model card is written.")
    repo_id: str | None = flag(
        None, "Hub id (owner/name) that the code examples in the card load. Default: the current folder."
    )
    language: Literal["en", "pt"] = flag("en", "Language of the card.")
    license: str | None = flag(
        None,
        "License of the model, a Hub identifier such as mit. Needed only if no license can be inferred from the "
        "licenses of base model and training data.",
    )
    output: Path | None = flag(None, "File to write. Default: README.md in the folder.")
    check: Path | None = flag(None, "Folder whose card is compared with the folder's other files. Nothing is written.")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.check is None):
            raise ValueError(
                "Give either --model FOLDER to write a card, or --check FOLDER to compare a card with its files."
            )
        if self.check and (self.repo_id or self.output or self.license):
            raise ValueError("--check reads the options from the card: leave out --repo_id, --output and --license.")


def render_card(
    run_metadata: dict[str, Any], language: str = "en", repo_id: str | None = None, license: str | None = None
) -> ModelCard:
    """Render the model card (README.md) of a training run.

    Args:
        run_metadata: Values from `collect_run_metadata`.
        language: "en" or "pt".
        repo_id: Hub id that the code examples in the card load. None: they load the current folder.
        license: Hub identifier such as "mit". None: the license inferred from base model and training data, if any.

    Returns:
        The card with its front matter (YAML header).

    Raises:
        ValueError: If an argument is invalid, `license` contradicts base model or training data, a number is missing,
            or the card would contain an access token or absolute path.
        KeyError, TypeError, jinja2.UndefinedError: If a file of the run lacks a value, or a value has the wrong type.
    """
    if language not in values.LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(values.LANGUAGES)}, got {language!r}.")
    if repo_id is not None:
        check_repo_id(repo_id)
    folder, model = run_metadata["folder"], run_metadata["model"]
    if repo_id and model != folder:
        raise ValueError(
            f"{folder} contains a model in each of its folders seed-*, but a repository has only one. Export one of "
            "them with `python -m hub_upload.export` first."
        )
    options = {"language": language, "repo_id": repo_id, "version": TEMPLATE_VERSION}
    if license is not None:
        if license not in values.HUB_LICENSES:
            raise ValueError(f"license must be a license identifier of the Hub, for example mit, got {license!r:.60}.")
        if run_metadata["license"] not in (None, license):
            raise ValueError(
                f"Base model and training data require the license {run_metadata['license']}, got --license {license}. "
                "Leave out --license."
            )
        check_stated_license(run_metadata["origins"], license)
        run_metadata, options = run_metadata | {"license": license}, options | {"license": license}
    title = repo_id.split("/")[1] if repo_id else f"CAPIVARA ({run_metadata['config']['language']})"
    card = ModelCard.from_template(
        _build_card_front_matter(run_metadata, values.to_publishable_line(title)),
        template_path=str(values.TEMPLATE_FOLDER / f"model_card_{language}.md.j2"),
        **values.build_template_values(run_metadata, language, repo_id),
        title=values.escape_value_for_markdown(title),
        options=json.dumps(options),
    )
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", str(card), flags=re.MULTILINE)).strip()
    check_text_is_publishable(text, "The card, and therefore a file of the run,")
    return ModelCard(text)


def write_card(
    folder: Path,
    repo_id: str | None = None,
    language: str = "en",
    output: Path | None = None,
    license: str | None = None,
) -> Path:
    """Write the model card (README.md) of a training run or of its export.

    Args:
        folder: Folder of the training run or export.
        repo_id: Hub id that the code examples in the card load. None: they load the current folder.
        language: "en" or "pt".
        output: File to write. None: README.md in `folder`.
        license: Hub identifier such as "mit". None: the license inferred from base model and training data, if any.

    Returns:
        Path of the card.

    Raises:
        ValueError: If an argument is invalid, the files of the run are malformed or incomplete, or a file or the card
            contains an access token or absolute path.
    """
    path = output or folder / CARD_FILE
    with values.wrap_format_errors(folder):
        card = render_card(values.collect_run_metadata(folder), language, repo_id, license)
    write_text(path, str(card))
    return path


# --- Comparison of a card with its files -----------------------------------------------------------------------------


def find_differences_between_card_and_files(folder: Path) -> list[str]:
    """Find the lines in which a model card differs from a card that is rendered again from the files in its folder.

    Lines that a user has added are accepted, unless they contain a number or markup that could hide other lines. For a
    card from another template version, only front matter (YAML header), numbers in tables and lists, file hashes and
    HTML are checked.

    Args:
        folder: Folder of a training run or export.

    Returns:
        One message for each difference. A handwritten card counts as a difference.

    Raises:
        ValueError: If the folder has no README.md, or the training run is not finished.
    """
    # The result is not used: the function is called because it raises a ValueError if the training run is not finished.
    list_seed_run_folders(folder)
    if not (folder / CARD_FILE).is_file():
        raise ValueError(f"{folder} has no {CARD_FILE}. Write it with `python -m hub_upload.card --model {folder}`.")
    text = _read_text(folder / CARD_FILE)
    if not (options := _read_render_options_from_card_comment(text)):
        return [f"{CARD_FILE}: the card was not written by `python -m hub_upload.card`, so it can't be verified."]
    try:
        # A user may have changed the options in the card to values of the wrong type, which cause errors such as a
        # TypeError. `wrap_format_errors` turns these errors into a ValueError.
        with values.wrap_format_errors(folder):
            render_options = {name: options.get(name) for name in ("language", "repo_id", "license")}
            expected = str(render_card(values.collect_run_metadata(folder), **render_options))
    except ValueError as error:
        return [f"{CARD_FILE}: {error}"]
    front_matter, body = _split_front_matter(text)
    expected_front_matter, expected_body = _split_front_matter(expected)
    faults = [*_iter_line_differences(expected_front_matter, front_matter)]
    if options["version"] == TEMPLATE_VERSION:
        return [*faults, *_iter_line_differences(expected_body, body, allow_additions=True)]
    # A line with HTML could hide other lines, so each one is a difference. The last line is left out, because it is the
    # HTML comment with the options of the card.
    html_lines = [line for line in body.rstrip().split("\n")[:-1] if "<" in line]
    faults += [f"{CARD_FILE}: the card has {line[:MAX_SHOWN_CHARACTERS]!r}, unlike its files." for line in html_lines]
    expected_values, card_values = ("\n".join(sorted(CARD_VALUE_RE.findall(part))) for part in (expected_body, body))
    return [*faults, *_iter_line_differences(expected_values, card_values)]


def find_differences_between_generated_card_and_files(folder: Path) -> list[str]:
    """Find outdated or changed lines in a model card, but only if `hub_upload.card` wrote the card.

    Args:
        folder: Folder of a model, with or without a card.

    Returns:
        One message for each difference between card and files. Without a card or with a handwritten card, the list is
        empty.
    """
    card = folder / CARD_FILE
    is_generated = card.is_file() and _read_render_options_from_card_comment(_read_text(card))
    return find_differences_between_card_and_files(folder) if is_generated else []


def _read_render_options_from_card_comment(text: str) -> dict[str, Any] | None:
    """Read the options that a card was rendered with from the HTML comment at its end.

    Args:
        text: Text of the card.

    Returns:
        A dict {"version": template version, "language": "en" or "pt", "repo_id": Hub id or None}. If the user chose the
        license, the dict also has the key "license". None if the text has no such comment, for example because the card
        was written by hand.
    """
    with suppress(ValueError, TypeError, IndexError):
        options = {"version": 1} | json.loads(OPTIONS_COMMENT_RE.findall(text)[-1])
        return options if {"language", "repo_id"} <= options.keys() else None
    return None


def _split_front_matter(text: str) -> tuple[str, str]:
    """Split the text of a card into its YAML front matter and its Markdown text.

    Args:
        text: Text of the card.

    Returns:
        The front matter up to and including its last line `---` (an empty string if there is no such line), and the
        Markdown text that follows.
    """
    end = text.find("\n---\n", 1) + 1
    return text[:end], text[end:]


def _iter_line_differences(expected: str, text: str, allow_additions: bool = False) -> Iterator[str]:
    """Yield a message for each line that a card lacks, and for each line that it should not contain.

    Args:
        expected: Text that was rendered from the files of the run.
        text: Text of the card in the folder. Blank lines and trailing spaces are ignored in both texts.
        allow_additions: True: lines that a user has added to the card are accepted, if they have no numbers and no
            markup that could hide or change other lines. False: each added line is reported.
    """
    wanted, actual = ([line.rstrip() for line in part.split("\n") if line.strip()] for part in (expected, text))
    for _, start, end, first, last in difflib.SequenceMatcher(None, wanted, actual, autojunk=False).get_opcodes():
        missing, added = wanted[start:end], actual[first:last]
        if missing == added:
            continue
        if allow_additions and not missing:
            added = [line for line in added if REFRAMING_MARKUP_RE.search(line) or any(map(str.isnumeric, line))]
        for line in missing:
            yield f"{CARD_FILE}: the files give {line[:MAX_SHOWN_CHARACTERS]!r}, which the card lacks."
        yield from (f"{CARD_FILE}: the card has {line[:MAX_SHOWN_CHARACTERS]!r}, unlike its files." for line in added)


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")


# --- Front matter with the model index -------------------------------------------------------------------------------

# modelcard.md in https://github.com/huggingface/hub-docs describes the format of the front matter. Metric values in it
# are fractions from 0 to 1, as in the result files.


def _build_card_front_matter(run_metadata: dict[str, Any], title: str) -> ModelCardData:
    """Build the front matter (YAML header) of a card, with the metrics of the model (the Hub's "model index").

    Languages, licenses and Hub ids that the Hub does not accept are omitted.

    Args:
        run_metadata: Values from `collect_run_metadata`.
        title: Name of the model in the model index.

    Returns:
        The front matter.
    """
    codes = [code.split("-")[0] for code in run_metadata["config"]["eval_languages"] if isinstance(code, str)]
    languages = list(dict.fromkeys(codes))
    is_capivara = run_metadata["model_class"] == values.CAPIVARA_CLASS
    model_type = "clip" if is_capivara else run_metadata["architecture"].get("model_type", "clip")
    tags = ["capivara", model_type, "image-text-retrieval", "zero-shot", *["multilingual"] * (len(languages) > 1)]
    model, seed = run_metadata["origins"]["model"], run_metadata["run"]["seed"]
    # A base model in a local folder has no Hub id. In this case, the front matter names the models on the Hub from
    # which the base model was derived, if the card of the base model lists them.
    base = _filter_hub_ids([model["hub_id"]] if model.get("hub_id") else model.get("base_model") or ())
    results = [value for value in run_metadata["values"] if value.model == "capivara" and value.metric != GAIN_METRIC]
    # If the model was trained with several seeds, the model index lists only the results of the seed whose weights are
    # published.
    rows = [row for value in results for row in value.measured if value.seeds == 1 or row.seed == seed]
    return ModelCardData(
        # The Hub expects language codes of two or three letters (ISO 639-1 or 639-3), so other codes are left out.
        language=[code for code in languages if re.fullmatch(r"[a-z]{2,3}", code)] or None,
        license=run_metadata["license"],
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base[0] if len(base) == 1 else base or None,
        datasets=_filter_hub_ids(origin.get("hub_id") for origin in run_metadata["origins"]["datasets"]) or None,
        tags=tags + run_metadata["formats"],
        model_name=title,
        eval_results=[_convert_measurement_to_model_index_entry(run_metadata, row) for row in rows],
    )


def _filter_hub_ids(names: Any) -> list[str]:
    """Select the valid Hub ids among values from a file.

    Args:
        names: Iterable of values of any type.

    Returns:
        The values that are strings of the form `owner/name` and that the Hub accepts as ids, in the order of `names`.
    """
    return [name for name in names if isinstance(name, str) and values.HUB_ID_RE.fullmatch(name)]


def _convert_measurement_to_model_index_entry(run_metadata: dict[str, Any], measurement: Any) -> EvalResult:
    """Convert a measurement to an entry of the model index (the metrics in a card's front matter).

    Args:
        run_metadata: Values from `collect_run_metadata`.
        measurement: Evaluation result of one seed. It is an element of the list `measured` in a result of
            `eval.records.tables.average_over_seeds`.

    Returns:
        The entry. Metrics that are fractions, such as recall, have values from 0 to 1.
    """
    record, commit = measurement.record, values.find_eval_dataset_revision(run_metadata["run"], measurement)
    task_type, task_name = HUB_TASKS[record.task, record.direction]
    arguments = {"protocol": values.to_publishable_line(record.protocol)}
    arguments["precision"] = values.to_publishable_line(measurement.precision)
    slug = re.sub(r"[^a-z0-9]+", "-", values.to_publishable_line(record.dataset).lower()).strip("-") or "data"
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=record.dataset if commit else slug,
        dataset_name=values.to_publishable_line(run_metadata["titles"].get(record.dataset) or record.dataset),
        dataset_config=values.to_publishable_line(record.language) or None,
        dataset_split=values.to_publishable_line(record.split),
        dataset_revision=commit,
        metric_type=values.to_publishable_line(record.metric),
        metric_name=values.CARD_WORDS["en"]["names"].get(record.metric) or re.sub(r"^recall@", "R@", record.metric),
        metric_value=record.value,
        metric_args=arguments if record.seed is None else {**arguments, "seed": record.seed},
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command: write a model card or, with --check, compare a model card with the files in its folder."""
    args = parse_arguments(CardArguments, __doc__, argv)
    if args.check is None:
        path = write_card(args.model, args.repo_id, args.language, args.output, args.license)
        print(
            f"Wrote {path} from the files of {args.model}. To check later that card and files still agree, use "
            f"--check {args.model} instead of --model."
        )
        return
    if faults := find_differences_between_card_and_files(args.check):
        error = (
            f"error: The card of {args.check} differs from its files in {len(faults)} lines. Write the card again with "
            "`python -m hub_upload.card --model FOLDER`."
        )
        sys.exit("\n".join([*faults, error]))
    if _read_render_options_from_card_comment(_read_text(args.check / CARD_FILE))["version"] != TEMPLATE_VERSION:
        print(
            f"The tables and digests in the card of {args.check} agree with its files. Its text was not compared, "
            "because the card was written with an older template."
        )
    else:
        print(f"All values in the card of {args.check} agree with its files.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
