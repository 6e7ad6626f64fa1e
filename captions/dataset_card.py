"""The data set card of a build: facts out of the stages' JSON, sources and licences out of the config."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from caption_data.columns import CAPTION_COLUMN
from caption_data.stage_folder import StageReport
from common.files import read_json
from common.privacy import hide_paths
from records.tables import escape_markdown

TEMPLATE = Path(__file__).parent / "dataset_card.md.j2"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
NOT_SHOWN = re.compile(
    r"(^|\.)(fingerprint|sha256|generation|prefixes|existing|target)(\.|$)"
)  # digests and long lists of settings
MEANINGS = {
    "image": "picture, as the bytes of its source",
    "captions": "captions in {language}, of the source or translated",
    "generated-captions": "captions in {language} that a model generated, or translations of such",
    "similarities": "cosine of the image and each of its captions in {language}, captions first, then generated ones",
    "quality": "translations into {language} that look wrong, and why",
}


@dataclass(frozen=True)
class StepFacts:
    """What a stage says of itself."""

    name: str
    settings: dict[str, Any]
    rows_in: int
    rows_out: int
    left_out: dict[str, int]
    quality: dict[str, int] | None
    versions: dict[str, str]

    @classmethod
    def of(cls, name: str, record: dict[str, Any], report: StageReport, quality: Path) -> "StepFacts":
        """Of `stage.json`, the parts, and the counts of a translation's quality."""
        counts = None
        if quality.is_file():
            found = read_json(quality)
            counts = {key: found[key] for key in ("captions", "flagged")}
        return cls(
            name,
            hide_paths(record["settings"]),
            record["source"]["rows"],
            report.rows,
            report.skipped,
            counts,
            record["versions"],
        )


@dataclass(frozen=True)
class SplitFacts:
    """A split: rows, captions that are not blank by column, and the stages that it went through."""

    rows: int
    captions: dict[str, int]
    steps: list[StepFacts]


@dataclass(frozen=True)
class DatasetFacts:
    """All that a card says.

    Attributes:
        card: of the config.
        language: of the build.
        splits: name -> facts.
        columns: of all splits.
    """

    card: dict[str, Any]
    language: str
    splits: dict[str, SplitFacts]
    columns: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def languages(self) -> list[str]:
        """Codes of the captions' languages, that of the build first."""
        found = {name.split("captions-", 1)[1] for split in self.splits.values() for name in _filled(split)}
        return sorted(found, key=lambda code: (code != self.language, code))


def dataset_card(facts: DatasetFacts, picture: str | None) -> str:
    """The text of the data set's README.md.

    Args:
        facts: of the build.
        picture: file of the similarities, beside the card.
    """
    card, rows = facts.card, sum(split.rows for split in facts.splits.values())
    is_translated = any(step.name == "translate" for split in facts.splits.values() for step in split.steps)
    data = DatasetCardData(
        # The Hub takes codes of ISO 639 alone: `zh` of `zh-Hant`, `por` of `por_Latn`.
        language=list(dict.fromkeys(re.split(r"[-_]", code)[0].lower() for code in facts.languages)),
        license=card["license"],
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        pretty_name=card.get("pretty_name"),
        size_categories=[next((name for limit, name in SIZES if rows < limit), "n>10M")],
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["capivara", "image-text", *(["translated"] if is_translated else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*"} for name in facts.splits],
            }
        ],
    )
    return (
        str(
            DatasetCard.from_template(
                data,
                template_path=str(TEMPLATE),
                facts=facts,
                title=card.get("pretty_name") or f"Images with captions in {', '.join(facts.languages)}",
                description=card.get("description") or "Images with captions, to train image-text models on.",
                caption_columns=list(dict.fromkeys(name for split in facts.splits.values() for name in _filled(split))),
                stages={step.name for split in facts.splits.values() for step in split.steps},
                picture=picture,
                escape=escape_markdown,  # of all texts of others
                code=_code,
                link=_link,
                meaning=_meaning,
                settings=_settings,
            )
        )
        + "\n"
    )


def _code(name: str) -> str:
    """A name in backticks."""
    return "`" + re.sub(r"[`|\s]", "_", name) + "`"


def _settings(settings: dict[str, Any]) -> str:
    """Settings in words, the model first; digests and long lists are left to build.json."""
    leaves = sorted(_leaves(settings), key=lambda leaf: not leaf[0].endswith("model"))
    shown = [(k, v) for k, v in leaves if v is not None and v is not False and not NOT_SHOWN.search(k)]
    return ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in shown)


def _leaves(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in settings.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def _link(name: str, url: str) -> str:
    return f"[{name}](<{url}>)" if re.fullmatch(r"https?://[^\s<>]+", url) else name


def _meaning(column: str) -> str:
    """What a column holds, in words."""
    kind = next((kind for kind in MEANINGS if column.startswith(kind + "-")), column)
    return MEANINGS.get(kind, "as in the source").format(language=_code(column.removeprefix(kind + "-")))


def _filled(split: SplitFacts) -> list[str]:
    return [name for name, number in split.captions.items() if number and CAPTION_COLUMN.fullmatch(name)]
