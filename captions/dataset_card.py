"""The data set card of a build: facts out of the stages' JSON, sources and licences out of the config."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from caption_data.rows import CAPTION_COLUMN
from captions.stage_folder import flat
from eval.records.tables import escape_markdown

TEMPLATE = Path(__file__).parent / "dataset_card.md.j2"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Digests and long lists of settings.
NOT_SHOWN = re.compile(r"(^|\.)(fingerprint|sha256|generation|prefixes|existing|target)(\.|$)")
MEANINGS = {
    "image": "picture, as the bytes of its source",
    "captions": "captions in {language}, of the source or translated",
    "generated-captions": "captions in {language} that a model generated, or translations of such",
    "similarities": "cosine of the image and each of its captions in {language}, captions first, then generated ones",
    "quality": "translations into {language} that look wrong, and why",
}


def dataset_card(facts: dict[str, Any], picture: str | None) -> str:
    """The data set's README.md, of the facts of build.json and the file with the similarities beside it."""
    card, language, splits = facts["card"], facts["language"], facts["splits"].values()
    rows, stages = sum(split["rows"] for split in splits), {step["name"] for split in splits for step in split["steps"]}
    filled = [name for split in splits for name, n in split["captions"].items() if n and CAPTION_COLUMN.fullmatch(name)]
    languages = sorted({name.split("captions-", 1)[1] for name in filled}, key=lambda code: (code != language, code))
    data = DatasetCardData(
        # The Hub takes codes of ISO 639 alone: `zh` of `zh-Hant`, `por` of `por_Latn`.
        language=list(dict.fromkeys(re.split(r"[-_]", code)[0].lower() for code in languages)),
        **{key: card.get(key) for key in ("license", "license_name", "license_link", "pretty_name")},
        size_categories=[next((name for limit, name in SIZES if rows < limit), "n>10M")],
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["capivara", "image-text", *(["translated"] if "translate" in stages else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*"} for name in facts["splits"]],
            }
        ],
    )
    text = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        title=card.get("pretty_name") or f"Images with captions in {', '.join(languages)}",
        description=card.get("description") or "Images with captions, to train image-text models on.",
        caption_columns=list(dict.fromkeys(filled)),
        stages=stages,
        picture=picture,
        escape=escape_markdown,  # of all texts of others
        code=_code,
        link=lambda name, url: f"[{name}](<{url}>)" if re.fullmatch(r"https?://[^\s<>]+", url) else name,
        meaning=_meaning,
        settings=_settings,
    )
    return f"{text}\n"


def _code(name: str) -> str:
    """A name in backticks."""
    return "`" + re.sub(r"[`|\s]", "_", name) + "`"


def _settings(settings: dict[str, Any]) -> str:
    """Settings in words, the model first; digests and long lists are left to build.json."""
    leaves = sorted(flat(settings).items(), key=lambda leaf: not leaf[0].endswith("model"))
    shown = [(k, v) for k, v in leaves if v is not None and v is not False and not NOT_SHOWN.search(k)]
    return ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in shown)


def _meaning(column: str) -> str:
    """What a column holds, in words."""
    kind = next((kind for kind in MEANINGS if column.startswith(kind + "-")), column)
    return MEANINGS.get(kind, "as in the source").format(language=_code(column.removeprefix(kind + "-")))
