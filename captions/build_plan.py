"""The config of a build, checked as a whole before anything runs: which stages, in which order, with which flags."""

import argparse
import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from captions.generate import GenerateArguments
from captions.score import ScoreArguments
from captions.select import SelectArguments
from captions.stages import StageArguments
from captions.translate import TranslateArguments

# In the order of the chain. A section may be left out; of `translate` there may be a list, one translator a time.
STAGES = {
    "generate": GenerateArguments,
    "translate": TranslateArguments,
    "score": ScoreArguments,
    "select": SelectArguments,
}
READ = "read"  # the stage of a split that no other one works on: its rows as they are
CONFIG_KEYS = {
    "dataset": "the images: what every stage takes as --dataset",
    "output": "folder of all that is made",
    "language": "code of the language of the captions",
    "source_language": "of the captions that are translated; en",
    "split": "split that all stages work on; train",
    "evaluation_splits": "splits of the same data set that are translated and no more, such as [validation, test]",
    "image_column": "column of the images; image",
    "rename": "columns that get another name, such as [caption=captions-en]",
    "card": "pretty_name, license and sources of the data set card",
}
CARD_KEYS = ("pretty_name", "description", "license", "license_name", "license_link", "sources", "attribution")
SOURCE_KEYS = ("name", "url", "license")


@dataclass(frozen=True)
class Step:
    """One stage of one split.

    Attributes:
        name: of the stage.
        args: of its command.
        table: a translation that is made elsewhere.
    """

    name: str
    args: StageArguments
    table: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.args.output.parent.name}, {self.args.split}"


@dataclass(frozen=True)
class Plan:
    """A whole build.

    Attributes:
        steps: split -> its stages in order.
        output: folder of all.
        language: of the captions.
        card: facts of the card that only people know.
    """

    steps: dict[str, list[Step]]
    output: Path
    language: str
    card: dict[str, Any]


def read_plan(config: Path, executor: dict[str, Any] | None = None, **given: str | Path | None) -> Plan:
    """The plan of a config file.

    Args:
        config: YAML; `CONFIG_KEYS` and the names of `STAGES` are its keys.
        executor: flags of `ExecutorArguments` for all stages; the section of a stage may have its own.
        given: values of such keys that go before those of the file; None for those that are not given.

    Raises:
        ValueError: a key is unknown or missing, or a value breaks the rule of its stage; all before any work.
    """
    content = _loaded(config)
    content |= {key: str(value) for key, value in given.items() if value is not None}
    for key in content:
        if key not in CONFIG_KEYS and key not in STAGES:
            _reject(key, [*CONFIG_KEYS, *STAGES], str(config))
    for key in ("dataset", "output", "language"):
        if not content.get(key):
            raise ValueError(f"{config} lacks `{key}`, {CONFIG_KEYS[key]}. Write it there, or give --{key}.")
    card = _checked_card(content.get("card"), config)
    sections = _sections(content, config)
    if not sections:
        raise ValueError(f"{config} has none of the stages {', '.join(STAGES)}; there is nothing to do.")
    train, evaluation = content.get("split", "train"), _listed(content.get("evaluation_splits", []))
    if train in evaluation:
        raise ValueError(f"{config}: evaluation_splits has {train!r}, which is the split that all stages work on.")
    output = Path(content["output"])
    steps = {train: _steps(content, sections, train, executor or {}, config)}
    for split in evaluation:
        some = [(number, name, section) for number, name, section in sections if name == "translate"]
        steps[split] = _steps(content, some or [(0, READ, {})], split, executor or {}, config)
    return Plan(steps, output, content["language"], card)


def _loaded(config: Path) -> dict[str, Any]:
    if not config.is_file():
        raise ValueError(f"The config file {config} does not exist.")
    try:
        # BaseLoader leaves every scalar as text, which is converted like a flag's value: `no` is a language.
        content = yaml.load(config.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} must hold `key: value` lines, got a {type(content).__name__}.")
    return {key: value for key, value in content.items() if value not in ("", "~", "null")}


def _sections(content: dict[str, Any], config: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """(number, stage, its flags) of the chain."""
    sections = []
    for name in STAGES:
        if name not in content:
            continue
        found = content[name] if isinstance(content[name], list) and name == "translate" else [content[name]]
        for section in found:
            if not isinstance(section, dict):
                raise ValueError(f"{config}: `{name}` must hold `key: value` lines, got {section!r}.")
            sections.append((len(sections) + 1, name, section))
    return sections


def _steps(
    content: dict[str, Any],
    sections: list[tuple[int, str, dict[str, Any]]],
    split: str,
    executor: dict[str, Any],
    config: Path,
) -> list[Step]:
    """Every stage reads what the one before it writes."""
    steps: list[Step] = []
    dataset, output = content["dataset"], Path(content["output"])
    for number, name, section in sections:
        folder = output / f"{number}-{name}" / split
        logs = Path(executor.get("logging_dir", output / "logs")) / f"{number}-{name}" / split
        values = {**executor, "dataset": dataset, "output": str(folder), "split": split, "logging_dir": str(logs)}
        if not steps:  # the others read columns of our names
            values |= {key: content[key] for key in ("image_column", "rename") if key in content}
        if name in ("translate", "score", "select"):
            values["language"] = content["language"]
        if name == "translate":
            values["memory"] = str(output / f"{number}-{name}" / "memory")
            values |= {key: content[key] for key in ("source_language",) if key in content}
        values |= {key: _of_split(value, split) for key, value in section.items()}
        args = _parsed(name, values, config)
        table = getattr(args, "import_file", None)
        steps.append(Step(name, args, table))
        dataset = str(folder)
    return steps


def _parsed(name: str, values: dict[str, Any], config: Path) -> StageArguments:
    """The arguments of a stage. Raises ValueError where a key is unknown or a value is of the wrong type."""
    kind = STAGES.get(name, StageArguments)
    flags: list[str] = []
    for key, value in values.items():
        key = "import_file" if key == "import" else key
        if key not in [known.name for known in fields(kind)]:
            _reject(key, [known.name for known in fields(kind)], f"{config}, section {name}")
        if isinstance(value, dict):
            raise ValueError(f"{config}, section {name}: `{key}` must be a value or a list, got a mapping.")
        if value not in ("", "~", "null", []):
            flags += [f"--{key}", *map(str, _listed(value))]
    parser = HfArgumentParser(kind, allow_abbrev=False, exit_on_error=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(flags)
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{config}, section {name}: {error}") from error
    return args


def _checked_card(card: Any, config: Path) -> dict[str, Any]:
    """Licence and sources are nothing that a program could know, and a data set without them must not be published."""
    if not isinstance(card, dict):
        raise ValueError(f"{config} lacks `card`, with {CONFIG_KEYS['card']}: no data set without its sources.")
    for key in card:
        if key not in CARD_KEYS:
            _reject(key, list(CARD_KEYS), f"{config}, section card")
    sources = card.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f"{config}: card.sources must list the sources, each with {', '.join(SOURCE_KEYS)}.")
    for source in sources:
        for key in source:
            if key not in SOURCE_KEYS:
                _reject(key, list(SOURCE_KEYS), f"{config}, card.sources")
        if not source.get("name") or not source.get("license"):
            raise ValueError(f"{config}: every one of card.sources needs a name and a license, got {source}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(card.get("license", ""))):
        raise ValueError(
            f"{config}: card.license must be an identifier of the Hub such as cc-by-sa-4.0, or other (with "
            f"license_name and license_link), got {card.get('license')!r}."
        )
    return card


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_split(value: Any, split: str) -> Any:
    """`{split}` in a value stands for the split's name: tables of translations are of one split."""
    return value.replace("{split}", split) if isinstance(value, str) else value


def _reject(key: str, known: list[str], where: str) -> None:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"{where}: unknown key `{key}`. Did you mean `{nearest}`? Known are {', '.join(known)}.")
