"""The first card of a converted model: where it comes from, and the licence that its source states."""

import html
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import yaml_dump

KEPT = ("license", "license_name", "license_link", "language", "attribution")  # of the source's own card
CARD = """---
{metadata}---

# {title}

Converted to transformers by `python -m modeling_capivara.convert_open_clip`, with the weights as they were. What the
model is, how it was trained and under which licence it may be used is said where it comes from.
"""


def origin_card(folder: Path, repo_id: str | None = None) -> str | None:
    """Text of README.md; None where nothing is known of the source.

    Args:
        folder: of the open_clip model; its README.md, if there is one, states the licence.
        repo_id: where on the Hub it was fetched from, which is the base of what is made from it; where None, the base
            is the one that the source's card names.
    """
    stated = {key: value for key, value in card_metadata(folder / "README.md").items() if _is_text(value)}
    known = {"base_model": repo_id or stated.get("base_model"), **{key: stated.get(key) for key in KEPT}}
    known = {key: value for key, value in known.items() if value}
    if not known:
        return None
    about = {**known, "library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
    return CARD.format(metadata=yaml_dump(about, sort_keys=False), title=html.escape(repo_id or folder.resolve().name))


def card_metadata(card: Path) -> dict[str, Any]:
    """The metadata of a model's or data set's card; empty where it has none, or none that can be read."""
    try:
        return (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
