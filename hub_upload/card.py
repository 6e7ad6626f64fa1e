"""The model card of a run or repository: README.md and .eval_results/*.yaml, with no figure but those of its files.

    python -m hub_upload.card --model runs/openmoji-pt-001
    python -m hub_upload.card --model runs/openmoji-pt-001 --repo_id my-name/my-model --language pt
    python -m hub_upload.card --model runs/mine --license cc-by-4.0    # where none follows from base and data
    python -m hub_upload.card --check runs/openmoji-pt-001

`--check` renders the card again, compares it and `.eval_results` line by line, and names each line that differs.
Sentences without figures may be added to a card by hand, and must be added again after it is rewritten. Make the card
last: of a repository's folder after `hub_upload.export`, which rewrites those files, and before `hub_upload.push`.
"""

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from capivara_common.cli import flag, parse, run_command
from capivara_common.files import seed_folders, write_text
from eval.records.schema import GAIN
from hub_upload import card_values as values
from hub_upload.allowed_files import check_repo_id, check_words
from hub_upload.card_values import TEMPLATES, card_facts, escaped, one_line, revision

CARD = "README.md"
VERSION = 3  # of the templates; a card of an older one is checked by its values and digests, not by its words
# What a card was made with, for `--check`; a comment, so that it is not seen. The first version named none.
MADE_WITH = re.compile(r"<!-- made by hub_upload\.card with (\{[^\n]*\}) -->")
# What could hide or reframe the lines around it: comments, code, tables, headings, links to anything but pages.
FRAMES = re.compile(r"<|^\s*(```|~~~|\||#|=+$|-+$)|\]\((?!https?://)")
# In a card of any version: cells of tables that are values, signed values of lists, and digests of files.
VALUES = re.compile(
    r"(?<=\| )(?:\*\*)?[-+]?\d[\d.,e-]*(?: ± [\d.,]+)?(?:\*\*)?(?= \|)|(?<=[ ])[-+]\d+[.,]\d+|`[0-9a-f]{32}`"
)
# A row of the table of settings; the first template said what a setting is, in the group, before its name.
SETTING = re.compile(r"^\|((?: [^|`]+ \|)?) `\w+` \| [^|]+ \|$", re.MULTILINE)
SHOWN = 120  # letters of a line in a message
# Of the model index; retrieval is no task of the Hub's own, so its two directions are named as they are.
TASKS = {
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
        None, "Hub id, owner/name, that the card's code loads; without it, the folder by its name, from the one above."
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
        if self.repo_id is not None:
            check_repo_id(self.repo_id)


def render(
    facts: dict[str, Any], language: str = "en", repo_id: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a folder, in "en" or "pt"; its code loads `repo_id`, or the folder by its name where there is none.

    A `license` is for a model whose base and data leave it open. Raises ValueError where it is none of the Hub's or
    differs from what follows from them, where a figure is missing, or the card would hold a path of a machine or a
    secret.
    """
    if language not in values.LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(values.LANGUAGES)}, got {language!r}.")
    if repo_id is not None:
        check_repo_id(repo_id)
    folder, model, name = facts["folder"], facts["model"], facts["name"]
    if repo_id and model != folder:
        raise ValueError(
            f"{folder} holds a model in each of its folders seed-*, and a repository has one. Make it of one of them "
            "first, with `python -m hub_upload.export`."
        )
    options = {"language": language, "repo_id": repo_id, "name": None if repo_id else name, "version": VERSION}
    if license is not None:
        if license not in values.LICENCES:
            raise ValueError(f"license must be an identifier of the Hub, such as mit, got {license!r:.60}.")
        if facts["license"] not in (None, license):
            raise ValueError(
                f"The licence {facts['license']} follows from the model's base and data, so {license} can't be stated."
            )
        facts, options = facts | {"license": license}, options | {"license": license}
    name = repo_id or (name if model == folder else f"{name}/{model.name}")
    with values.needed_form(folder):
        title = repo_id.split("/")[1] if repo_id else f"CAPIVARA ({facts['config']['language']})"
        card = ModelCard.from_template(
            metadata(facts, one_line(title)),
            template_path=str(TEMPLATES / f"model_card_{language}.md.j2"),
            **values.template_values(facts, language, name, repo_id is not None),
            title=escaped(title),
            options=json.dumps(options),
        )
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", str(card), flags=re.MULTILINE))
    check_words(text, "The card, and so a file of the run,")
    return ModelCard(text)


def write_card(
    folder: Path,
    repo_id: str | None = None,
    language: str = "en",
    output: Path | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of a run or of a repository made from it, each file in one piece, and return the card's path.

    Where an `output` is named it alone is written, else README.md and `.eval_results` in the folder. ValueError as of
    `card_facts` and `render`.
    """
    facts = card_facts(folder)
    card = render(facts, language, repo_id, license)
    for file, text in eval_results(facts).items() if output is None else ():
        write_text(folder / file, text)
    path = output or folder / CARD
    write_text(path, str(card))
    return path


# --- Comparison of a card with its files -----------------------------------------------------------------------------


def check(folder: Path) -> list[str]:
    """The faults of a folder's card; empty where card and files agree. ValueError where there is no card.

    The card is rendered again with the options that it names, and compared line by line. Lines may be added to its
    text, if they hold no number, and nothing that could hide or reframe the lines around them. Of a card of an older
    template the front matter, all values and all digests are compared, and no such line may be added.
    """
    seed_folders(folder)  # refuses an unfinished run
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}. Make it with `python -m hub_upload.card --model {folder}`.")
    text = _read(folder / CARD)
    if not (options := made_with(text)):
        return [f"{CARD}: it was not made by `python -m hub_upload.card`, so its figures have no known source."]
    try:
        facts = card_facts(folder, options["name"])
        expected = str(render(facts, options["language"], options["repo_id"], options.get("license")))
        published = eval_results(facts)
    except ValueError as error:
        return [f"{CARD}: {error}"]
    (front, body), (wanted_front, wanted) = _parts(text), _parts(expected)
    faults = [*_differences(CARD, wanted_front, front)]
    if older := is_older(text):
        named = options.get("version", 1)
        wanted = wanted.replace(f', "version": {VERSION}', f', "version": {named}' if named > 1 else "")
        lines, known = (Counter(line.rstrip() for line in part.split("\n")) for part in (body, wanted))
        framing = [line for line in lines - known if FRAMES.search(line.lstrip("| "))]  # of its own it has none
        faults += [f"{CARD}: it says {line[:SHOWN]!r}." for line in framing]
        wanted, body = ("\n".join(sorted(VALUES.findall(part))) for part in (wanted, body))
    faults += _differences(CARD, wanted, body, may_add=not older)
    there = {path.relative_to(folder).as_posix() for path in (folder / ".eval_results").glob("*.y*ml")}
    for name in sorted({*published, *there}):
        text = _read(folder / name) if name in there else ""
        faults += _differences(name, published[name], text) if name in published else [f"{name}: no run made it."]
    return faults


def outdated(folder: Path) -> list[str]:
    """The faults of a folder's card, if there is one and `hub_upload.card` made it; others are their writers' word."""
    return check(folder) if (folder / CARD).is_file() and made_with(_read(folder / CARD)) else []


def made_with(text: str) -> dict[str, Any] | None:
    """The options that a card was made with; None where it does not say so."""
    with suppress(ValueError, TypeError, IndexError):
        options = json.loads(MADE_WITH.findall(text)[-1])
        known = set(options) - {"license", "version"} == {"language", "repo_id", "name"}
        if known and options["language"] in values.LANGUAGES and options.get("version", 1) in range(1, VERSION + 1):
            if options["repo_id"] is not None:
                check_repo_id(options["repo_id"])
            return options
    return None


def is_older(text: str) -> bool:
    """Whether an older template made a card. The first named no version: it is known by its table of settings."""
    settings = SETTING.findall(text)
    named = (made_with(text) or {}).get("version") or (1 if settings and all(settings) else VERSION)
    return named < VERSION


def _parts(text: str) -> tuple[str, str]:
    """Front matter and body."""
    end = text.find("\n---\n", 1) + 1
    return text[:end], text[end:]


def _differences(name: str, expected: str, text: str, may_add: bool = False) -> Iterator[str]:
    """How a text differs from the expected one, line by line; sentences without a number are none if they `may_add`."""
    wanted, there = ([line.rstrip() for line in part.split("\n") if line.strip()] for part in (expected, text))
    for _, start, end, first, last in difflib.SequenceMatcher(None, wanted, there, autojunk=False).get_opcodes():
        gone, added = wanted[start:end], there[first:last]
        if gone == added:
            continue
        if may_add and not gone:
            added = [line for line in added if FRAMES.search(line) or any(letter.isnumeric() for letter in line)]
        yield from (f"{name}: the files give {line[:SHOWN]!r}." for line in gone)
        yield from (f"{name}: it says {line[:SHOWN]!r}." for line in added)


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")


# --- What machines read: front matter with the model index, and .eval_results/*.yaml ---------------------------------

# The formats: modelcard.md, docs/hub/model-cards-co2.md and docs/hub/eval-results.md of
# https://github.com/huggingface/hub-docs. Values are those of the JSON files, shares and not per cents.


def metadata(facts: dict[str, Any], title: str) -> ModelCardData:
    """The front matter. What names no language, licence or Hub id as the Hub knows them is left out."""
    stated = [code.split("-")[0] for code in facts["config"]["eval_languages"] if isinstance(code, str)]
    languages = list(dict.fromkeys(stated))
    kind = "clip" if facts["model_class"] == values.OWN_CLASS else facts["architecture"].get("model_type", "clip")
    tags = ["capivara", kind, "image-text-retrieval", "zero-shot"]
    tags += ["multilingual"] if len(languages) > 1 else []
    model = facts["origins"].get("model") or {}
    # The base's own id, or those that the card of a local base names.
    base = hub_ids([model["hub_id"]] if model.get("hub_id") else model.get("base_model") or ())
    data = ModelCardData(
        language=[code for code in languages if re.fullmatch(r"[a-z]{2,3}", code)] or None,  # ISO 639-1 or -3
        license=facts["license"],
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base[0] if len(base) == 1 else base or None,
        datasets=hub_ids(origin.get("hub_id") for origin in facts["origins"].get("datasets", ())) or None,
        tags=tags + facts["formats"],
        model_name=title,
        eval_results=[_index_entry(facts, measured) for measured in _published(facts, facts["values"])],
    )
    if used := facts["used"]:
        hardware = used.get("gpu") or used.get("cpu") or facts["run"]["device"]
        emissions = {"emissions": 1000 * used["kg_co2e"], "source": str(used["method"]), "training_type": "fine-tuning"}
        emissions |= {"geographical_location": one_line(used["country"])} if used.get("country") else {}
        data["co2_eq_emissions"] = emissions | {"hardware_used": one_line(hardware)}
    return data


def hub_ids(names: Any) -> list[str]:
    """Those of some names that are Hub ids."""
    return [name for name in names if isinstance(name, str) and values.HUB_ID.fullmatch(name)]


def eval_results(facts: dict[str, Any]) -> dict[str, str]:
    """File in the repository -> its text in the Hub's `.eval_results` format; none for data that are not on the Hub.

    An entry needs a `task_id`, which a benchmark's own `eval.yaml` defines. No figure here comes with one, so it is
    the record's task and direction.
    """
    found: dict[str, list[EvalResultEntry]] = {}
    stands_for_others = [pair["capivara"] for group in facts["groups"] for pair in group["main"] if pair["capivara"]]
    for measured in _published(facts, stands_for_others):
        record, commit = measured.record, revision(facts["run"], measured)
        if not commit:
            continue
        notes = f"{record.metric}, language {record.language or '-'}, split {record.split}, {record.protocol}"
        task = "_".join(filter(None, (record.task, record.direction)))
        entry = EvalResultEntry(record.dataset, task, record.value, dataset_revision=commit, notes=one_line(notes))
        found.setdefault(f".eval_results/{_slug(record.dataset)}.yaml", []).append(entry)
    return {name: yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) for name, entries in found.items()}


def _published(facts: dict[str, Any], figures: list[Any]) -> list[Any]:
    """Of each of CAPIVARA's figures among some the one of the weights in the folder; no gains."""
    of_model = [value for value in figures if value.model == "capivara" and value.metric != GAIN]
    seed = facts["run"]["seed"]
    return [one for value in of_model for one in value.measured if value.seeds == 1 or one.seed == seed]


def _index_entry(facts: dict[str, Any], measured: Any) -> EvalResult:
    """A figure for the model index; huggingface_hub puts those of one task and data set together."""
    record, commit = measured.record, revision(facts["run"], measured)
    kind, task = TASKS[record.task, record.direction]
    arguments = {"protocol": one_line(record.protocol), "precision": one_line(measured.precision)}
    return EvalResult(
        task_type=kind,
        task_name=task,
        dataset_type=record.dataset if commit else _slug(one_line(record.dataset)),
        dataset_name=one_line(facts["titles"].get(record.dataset) or record.dataset),
        dataset_config=one_line(record.language) or None,
        dataset_split=one_line(record.split),
        dataset_revision=commit,
        metric_type=one_line(record.metric),
        metric_name=values.WORDS["en"]["names"].get(record.metric) or re.sub(r"^recall@", "R@", record.metric),
        metric_value=record.value,
        metric_args=arguments if record.seed is None else {**arguments, "seed": record.seed},
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(CardArguments, __doc__, argv)
    if args.check is None:
        path = write_card(args.model, args.repo_id, args.language, args.output, args.license)
        print(f"{path} states what the files of {args.model} say. Verify it with --check {args.model}.")
        return
    if faults := check(args.check):
        sys.exit("\n".join([*faults, f"error: {len(faults)} faults in the card of {args.check}."]))
    if is_older(_read(args.check / CARD)):
        print(
            f"The tables and digests of the card of {args.check} are those of its files. An older template made it, so "
            "its words were not compared."
        )
    else:
        print(f"Every figure of the card of {args.check} is that of its files.")


if __name__ == "__main__":
    run_command(main)
