"""The config of a build, checked as a whole before anything runs: which stages, in which order, with which flags."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import as_flags, parse, read_config, unknown
from captions.stage_arguments import (
    GenerateArguments,
    ScoreArguments,
    SelectArguments,
    StageArguments,
    TranslateArguments,
)

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
    """One stage of one split."""

    name: str  # of the stage
    args: StageArguments  # of its command

    @property
    def title(self) -> str:
        """Stage and split, for messages."""
        return f"{self.args.output.parent.name}, {self.args.split}"

    @property
    def table(self) -> Path | None:
        """A translation that is made elsewhere."""
        return getattr(self.args, "import_file", None)


@dataclass(frozen=True)
class Plan:
    """A whole build."""

    steps: dict[str, list[Step]]  # split -> its stages in order
    output: Path  # folder of all
    language: str  # of the captions
    card: dict[str, Any]  # facts of the card that only people know

    def all_steps(self) -> list[Step]:
        """The steps of all splits, in the order in which they run."""
        return [step for steps in self.steps.values() for step in steps]


def read_plan(config: Path, executor: dict[str, Any] | None = None, **given: str | Path | None) -> Plan:
    """The plan of a config file.

    Args:
        config: YAML; `CONFIG_KEYS` and the names of `STAGES` are its keys.
        executor: flags of `ExecutorArguments` for all stages; the section of a stage may have its own.
        given: values of such keys that go before those of the file; None for those that are not given.

    Raises:
        ValueError: a key is unknown or missing, or a value breaks the rule of its stage; all before any work.
    """
    content = {key: value for key, value in read_config(config).items() if value not in ("", "~", "null")}
    content |= {key: str(value) for key, value in given.items() if value is not None}
    _check_keys(content, [*CONFIG_KEYS, *STAGES], str(config))
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
    steps = {train: _steps(content, sections, train, executor or {}, config)}
    some = [section for section in sections if section[1] == "translate"] or [(0, READ, {})]
    steps |= {split: _steps(content, some, split, executor or {}, config) for split in evaluation}
    return Plan(steps, Path(content["output"]), content["language"], card)


def _sections(content: dict[str, Any], config: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """(number, stage, its flags) of the chain."""
    found = [
        (name, section)
        for name in STAGES
        if name in content
        for section in (_listed(content[name]) if name == "translate" else [content[name]])
    ]
    for name, section in found:
        if not isinstance(section, dict):
            raise ValueError(f"{config}: `{name}` must hold `key: value` lines, got {section!r}.")
    return [(number, name, section) for number, (name, section) in enumerate(found, 1)]


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
        # `{split}` in a value stands for the split's name: tables of translations are of one split.
        values |= {k: v.replace("{split}", split) if isinstance(v, str) else v for k, v in section.items()}
        steps.append(Step(name, _parsed(name, values, f"{config}, section {name}")))
        dataset = str(folder)
    return steps


def _parsed(name: str, values: dict[str, Any], where: str) -> StageArguments:
    """The arguments of a stage. Raises ValueError where a key is unknown or a value is of the wrong type."""
    kind = STAGES.get(name, StageArguments)
    values = {"import_file" if key == "import" else key: value for key, value in values.items()}
    flags = as_flags(values, kind, where)
    try:
        return parse(kind, None, flags)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _checked_card(card: Any, config: Path) -> dict[str, Any]:
    """Licence and sources are nothing that a program could know, and a data set without them must not be published."""
    if not isinstance(card, dict):
        raise ValueError(f"{config} lacks `card`, with {CONFIG_KEYS['card']}: no data set without its sources.")
    _check_keys(card, CARD_KEYS, f"{config}, section card")
    sources = card.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f"{config}: card.sources must list the sources, each with {', '.join(SOURCE_KEYS)}.")
    for source in sources:
        _check_keys(source, SOURCE_KEYS, f"{config}, section card, sources")
        if not (source.get("name") and source.get("license")):
            raise ValueError(f"{config}: every one of card.sources needs a name and a license, got {source}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(card.get("license", ""))):
        raise ValueError(
            f"{config}: card.license must be an identifier of the Hub such as cc-by-sa-4.0, or other (with "
            f"license_name and license_link), got {card.get('license')!r}."
        )
    return card


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_keys(content: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(unknown(str(key), f"key in {where}", list(known), f"Known are {', '.join(known)}."))
