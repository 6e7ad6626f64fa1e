"""The model card of a run or repository, README.md, with no figure but those of its files.

    python -m hub_upload.card --model runs/openmoji-pt-001
    python -m hub_upload.card --model runs/openmoji-pt-001 --repo_id my-name/my-model --language pt
    python -m hub_upload.card --model runs/mine --license cc-by-4.0    # where none follows from base and data
    python -m hub_upload.card --check runs/openmoji-pt-001

`--check` renders the card again, compares it line by line, and names each line that differs. Sentences without figures
may be added to a card by hand, and must be added again after it is rewritten. Make the card last: of a repository's
folder after `hub_upload.export`, which rewrites its files, and before `hub_upload.push`.
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

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import seed_folders, write_text
from eval.records.schema import GAIN_METRIC
from hub_upload import card_values as values
from hub_upload.allowed_files import check_repo_id, check_text
from hub_upload.card_values import TEMPLATE_FOLDER, collect_run_metadata, find_data_revision, to_markdown, to_safe_line

CARD_FILE = "README.md"
TEMPLATE_VERSION = 5  # of the templates; a card of another one is checked by its values and digests, not by its words
# What a card was made with, for `--check`; a comment, so that it is not seen. The first version named none.
OPTIONS_COMMENT_RE = re.compile(r"<!-- made by hub_upload\.card with (\{[^\n]*\}) -->")
# What could hide or reframe the lines around it: comments, code, tables, headings, links to anything but pages.
REFRAMING_MARKUP_RE = re.compile(r"<|^\s*(```|~~~|\||#|=+$|-+$)|\]\((?!https?://)")
# In a card of any version: cells of tables that are values, signed values of lists, and digests of files.
CARD_VALUE_RE = re.compile(
    r"(?<=\| )(?:\*\*)?[-+]?\d[\d.,e-]*(?: ± [\d.,]+)?(?:\*\*)?(?= \|)|(?<=[ ])[-+]\d+[.,]\d+|`[0-9a-f]{32}`"
)
MAX_SHOWN_CHARACTERS = 120  # letters of a line in a message
# Of the model index; retrieval is no task of the Hub's own, so its two directions are named as they are.
HUB_TASKS = {
    ("retrieval", "text_to_image"): ("text-to-image-retrieval", "Text-to-image retrieval"),
    ("retrieval", "image_to_text"): ("image-to-text-retrieval", "Image-to-text retrieval"),
    ("classification", ""): ("zero-shot-image-classification", "Zero-shot image classification"),
    ("linear_probe", ""): ("image-classification", "Linear probe"),
}


@dataclass
class CardArguments:
    """Arguments of `hub_upload.card`."""

    model: Path | None = flag(None, "Folder of a finished run, or a repository made from it; its card is written.")
    repo_id: str | None = flag(
        None, "Hub id, owner/name, that the card's code loads; without it, the code runs from within the folder."
    )
    language: Literal["en", "pt"] = flag("en", "Language of the card's text.")
    license: str | None = flag(
        None, "Licence of the model, an identifier of the Hub, where none follows from what base and data state."
    )
    output: Path | None = flag(None, "File of the card, in place of README.md in the folder; it alone is written.")
    check: Path | None = flag(None, "Folder whose card is compared with its files; nothing is written.")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.check is None):
            raise ValueError("Give --model FOLDER to write its card, or --check FOLDER to verify the one there.")
        if self.check and (self.repo_id or self.output or self.license):
            raise ValueError("--check takes what a card was made with from it: no --repo_id, --output or --license.")


def render_card(
    run_metadata: dict[str, Any], language: str = "en", repo_id: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a folder, in "en" or "pt"; its code loads `repo_id`, or from within the folder where there is none.

    A `license` is for a model whose base and data leave it open. Raises ValueError where it is none of the Hub's or
    differs from what follows from them, where a figure is missing, or the card would hold a path of a machine or a
    secret.
    """
    if language not in values.LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(values.LANGUAGES)}, got {language!r}.")
    if repo_id is not None:
        check_repo_id(repo_id)
    folder, model = run_metadata["folder"], run_metadata["model"]
    if repo_id and model != folder:
        raise ValueError(
            f"{folder} holds a model in each of its folders seed-*, and a repository has one. Make it of one of them "
            "first, with `python -m hub_upload.export`."
        )
    options = {"language": language, "repo_id": repo_id, "version": TEMPLATE_VERSION}
    if license is not None:
        if license not in values.HUB_LICENSES:
            raise ValueError(f"license must be an identifier of the Hub, such as mit, got {license!r:.60}.")
        if run_metadata["license"] not in (None, license):
            raise ValueError(
                f"The licence {run_metadata['license']} follows from the model's base and data, so {license} can't be stated."
            )
        run_metadata, options = run_metadata | {"license": license}, options | {"license": license}
    with values.wrap_format_errors(folder):
        title = repo_id.split("/")[1] if repo_id else f"CAPIVARA ({run_metadata['config']['language']})"
        card = ModelCard.from_template(
            build_card_data(run_metadata, to_safe_line(title)),
            template_path=str(TEMPLATE_FOLDER / f"model_card_{language}.md.j2"),
            **values.build_template_values(run_metadata, language, repo_id),
            title=to_markdown(title),
            options=json.dumps(options),
        )
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", str(card), flags=re.MULTILINE)).strip()
    check_text(text, "The card, and so a file of the run,")
    return ModelCard(text)


def write_card(
    folder: Path,
    repo_id: str | None = None,
    language: str = "en",
    output: Path | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of a run or of a repository made from it, to `output` in place of its README.md, and return its
    path. ValueError as of `collect_run_metadata` and `render`.
    """
    path = output or folder / CARD_FILE
    write_text(path, str(render_card(collect_run_metadata(folder), language, repo_id, license)))
    return path


# --- Comparison of a card with its files -----------------------------------------------------------------------------


def find_card_faults(folder: Path) -> list[str]:
    """The faults of a folder's card; empty where card and files agree. ValueError where there is no card.

    The card is rendered again with the options that it names, and compared line by line. Lines may be added to its
    text, if they hold no number, and nothing that could hide or reframe the lines around them. Of a card of an older
    template the front matter, all values and all digests are compared, and it may hold no HTML.
    """
    seed_folders(folder)  # refuses an unfinished run
    if not (folder / CARD_FILE).is_file():
        raise ValueError(f"{folder} has no {CARD_FILE}. Make it with `python -m hub_upload.card --model {folder}`.")
    text = _read_text(folder / CARD_FILE)
    if not (options := read_card_options(text)):
        return [f"{CARD_FILE}: it was not made by `python -m hub_upload.card`, so its figures have no known source."]
    try:
        with values.wrap_format_errors(folder):  # the card's options may be anything, too
            kept = {name: options.get(name) for name in ("language", "repo_id", "license")}
            expected = str(render_card(collect_run_metadata(folder), **kept))
    except ValueError as error:
        return [f"{CARD_FILE}: {error}"]
    (front, body), (wanted_front, wanted) = _split_front_matter(text), _split_front_matter(expected)
    faults = [*_iter_differences(wanted_front, front)]
    if options["version"] == TEMPLATE_VERSION:
        return [*faults, *_iter_differences(wanted, body, allow_additions=True)]
    faults += [
        f"{CARD_FILE}: it says {line[:MAX_SHOWN_CHARACTERS]!r}."
        for line in body.rstrip().split("\n")[:-1]
        if "<" in line
    ]
    return [*faults, *_iter_differences(*("\n".join(sorted(CARD_VALUE_RE.findall(part))) for part in (wanted, body)))]


def find_generated_card_faults(folder: Path) -> list[str]:
    """The faults of a folder's card, if there is one and `hub_upload.card` made it; others are their writers' word."""
    return (
        find_card_faults(folder)
        if (folder / CARD_FILE).is_file() and read_card_options(_read_text(folder / CARD_FILE))
        else []
    )


def read_card_options(text: str) -> dict[str, Any] | None:
    """The options that a card was made with; None where it does not say so."""
    with suppress(ValueError, TypeError, IndexError):
        options = {"version": 1} | json.loads(OPTIONS_COMMENT_RE.findall(text)[-1])
        return options if {"language", "repo_id"} <= options.keys() else None
    return None


def _split_front_matter(text: str) -> tuple[str, str]:
    """Front matter and body."""
    end = text.find("\n---\n", 1) + 1
    return text[:end], text[end:]


def _iter_differences(expected: str, text: str, allow_additions: bool = False) -> Iterator[str]:
    """How a text differs from the expected one, line by line; sentences without a number are none if they `may_add`."""
    wanted, there = ([line.rstrip() for line in part.split("\n") if line.strip()] for part in (expected, text))
    for _, start, end, first, last in difflib.SequenceMatcher(None, wanted, there, autojunk=False).get_opcodes():
        gone, added = wanted[start:end], there[first:last]
        if gone == added:
            continue
        if allow_additions and not gone:
            added = [
                line for line in added if REFRAMING_MARKUP_RE.search(line) or any(letter.isnumeric() for letter in line)
            ]
        yield from (f"{CARD_FILE}: the files give {line[:MAX_SHOWN_CHARACTERS]!r}." for line in gone)
        yield from (f"{CARD_FILE}: it says {line[:MAX_SHOWN_CHARACTERS]!r}." for line in added)


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")


# --- What machines read: front matter with the model index -----------------------------------------------------------

# The format: modelcard.md of https://github.com/huggingface/hub-docs. Values are those of the JSON files, shares.


def build_card_data(run_metadata: dict[str, Any], title: str) -> ModelCardData:
    """The front matter. What names no language, licence or Hub id as the Hub knows them is left out."""
    stated = [code.split("-")[0] for code in run_metadata["config"]["eval_languages"] if isinstance(code, str)]
    languages = list(dict.fromkeys(stated))
    kind = (
        "clip"
        if run_metadata["model_class"] == values.CAPIVARA_CLASS
        else run_metadata["architecture"].get("model_type", "clip")
    )
    tags = ["capivara", kind, "image-text-retrieval", "zero-shot", *["multilingual"] * (len(languages) > 1)]
    model, seed = run_metadata["origins"]["model"], run_metadata["run"]["seed"]
    # The base's own id, or those that the card of a local base names.
    base = filter_hub_ids([model["hub_id"]] if model.get("hub_id") else model.get("base_model") or ())
    of_model = [value for value in run_metadata["values"] if value.model == "capivara" and value.metric != GAIN_METRIC]
    # Of several seeds, the one of the weights in the folder.
    published = [one for value in of_model for one in value.measured if value.seeds == 1 or one.seed == seed]
    return ModelCardData(
        language=[code for code in languages if re.fullmatch(r"[a-z]{2,3}", code)] or None,  # ISO 639-1 or -3
        license=run_metadata["license"],
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base[0] if len(base) == 1 else base or None,
        datasets=filter_hub_ids(origin.get("hub_id") for origin in run_metadata["origins"]["datasets"]) or None,
        tags=tags + run_metadata["formats"],
        model_name=title,
        eval_results=[_build_eval_result(run_metadata, measured) for measured in published],
    )


def filter_hub_ids(names: Any) -> list[str]:
    """Those of some names that are Hub ids."""
    return [name for name in names if isinstance(name, str) and values.HUB_ID_RE.fullmatch(name)]


def _build_eval_result(run_metadata: dict[str, Any], measurement: Any) -> EvalResult:
    """A figure for the model index; huggingface_hub puts those of one task and data set together."""
    record, commit = measurement.record, find_data_revision(run_metadata["run"], measurement)
    kind, task = HUB_TASKS[record.task, record.direction]
    arguments = {"protocol": to_safe_line(record.protocol), "precision": to_safe_line(measurement.precision)}
    slug = re.sub(r"[^a-z0-9]+", "-", to_safe_line(record.dataset).lower()).strip("-") or "data"
    return EvalResult(
        task_type=kind,
        task_name=task,
        dataset_type=record.dataset if commit else slug,
        dataset_name=to_safe_line(run_metadata["titles"].get(record.dataset) or record.dataset),
        dataset_config=to_safe_line(record.language) or None,
        dataset_split=to_safe_line(record.split),
        dataset_revision=commit,
        metric_type=to_safe_line(record.metric),
        metric_name=values.CARD_WORDS["en"]["names"].get(record.metric) or re.sub(r"^recall@", "R@", record.metric),
        metric_value=record.value,
        metric_args=arguments if record.seed is None else {**arguments, "seed": record.seed},
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(CardArguments, __doc__, argv)
    if args.check is None:
        path = write_card(args.model, args.repo_id, args.language, args.output, args.license)
        print(f"{path} states what the files of {args.model} say. Verify it with --check {args.model}.")
        return
    if faults := find_card_faults(args.check):
        sys.exit("\n".join([*faults, f"error: {len(faults)} faults in the card of {args.check}."]))
    if read_card_options(_read_text(args.check / CARD_FILE))["version"] != TEMPLATE_VERSION:
        print(
            f"The tables and digests of the card of {args.check} are those of its files. An older template made it, so "
            "its words were not compared."
        )
    else:
        print(f"Every figure of the card of {args.check} is that of its files.")


if __name__ == "__main__":
    run_command(main)
