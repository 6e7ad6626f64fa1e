"""Read titles and licenses from the cards (README.md) of a model's base model and training datasets."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from capivara_common.privacy import get_publishable_model_or_dataset_name
from hub_upload.licenses import as_texts, infer_license
from modeling_capivara.loading import read_card_metadata


def read_origin_cards_and_infer_license(model: str, datasets: Sequence[str], evaluation_dataset: str) -> dict[str, Any]:
    """Read the cards (README.md) of a base model and its datasets, and infer the license of the trained model.

    Args:
        model: Folder or Hub id of the base model.
        datasets: Training datasets: folders, file patterns or Hub ids.
        evaluation_dataset: Dataset of the evaluation: a folder, file pattern or Hub id.

    Returns:
        The value of "origins" in run.json, a dict with these keys:

        - "license": Hub identifier of the inferred license, or None.
        - "model", "evaluation_dataset": metadata from `read_origin_card_metadata`.
        - "datasets": list with the metadata of each training dataset.
    """
    base = read_origin_card_metadata(model, "model")
    data = [read_origin_card_metadata(name, "dataset") for name in datasets]
    return {
        "license": infer_license([origin["licenses"] for origin in (base, *data)]),
        "model": base,
        "datasets": data,
        "evaluation_dataset": read_origin_card_metadata(evaluation_dataset, "dataset"),
    }


def read_origin_card_metadata(name: str, repo_type: str) -> dict[str, Any]:
    """Read the metadata of a base model or dataset from its card (README.md), locally or from the Hub.

    Args:
        name: Folder, file, file pattern or Hub id.
        repo_type: "model" or "dataset".

    Returns:
        A dict with these keys. Values that are not stated are None or empty.

        - "name": `name`, with a shortened path.
        - "title": title on the card, or otherwise `name` or its last part.
        - "hub_id", "revision": Hub id and commit of a card on the Hub.
        - "base_model": Hub ids of base models.
        - "licenses": license identifiers.
        - "attribution": sentence that credits the authors.
        - "translations": dict {language code: "human" or "machine"}, who translated a dataset's captions.
    """
    is_on_hub = not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    is_file_or_pattern = not Path(name).is_dir() and "/" in name
    folder = Path(name).parent if is_file_or_pattern else Path(name)
    path = _fetch_card(name, repo_type) if is_on_hub else folder / "README.md"
    card = read_card_metadata(path) if path else {}
    default_title = name if is_on_hub else _read_card_title(path) or PurePosixPath(name).name
    translations = card.get("translations")
    translators = translations if isinstance(translations, dict) else {}
    return {
        "name": get_publishable_model_or_dataset_name(name),
        "title": str(card.get("pretty_name") or default_title),
        "hub_id": name if path and is_on_hub else None,
        "revision": path.parent.name if path and is_on_hub else None,
        "base_model": as_texts(card.get("base_model")),
        "licenses": as_texts(card.get("license")),
        "attribution": str(card["attribution"]) if card.get("attribution") else None,
        "translations": {str(code): str(translator) for code, translator in translators.items()},
    }


@cache  # training and evaluation often use the same dataset, whose card is then fetched once
def _fetch_card(name: str, repo_type: str) -> Path | None:
    """Return the local path of a card on the Hub. If the card is not in the Hub's local cache, it is downloaded.

    Args:
        name: Hub id.
        repo_type: "model" or "dataset".

    Returns:
        Path of README.md in the Hub's cache. None if there is no card or the Hub can't be reached.
    """
    try:
        # The local cache is tried first: it has the card of the commit that was loaded for training, which may be older
        # than the card on the Hub.
        cached = try_to_load_from_cache(name, "README.md", repo_type=repo_type)
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "README.md", repo_type=repo_type))
    except (OSError, ValueError):
        return None


def _read_card_title(card: Path) -> str | None:
    """Read the title of a card: the text of the first level-1 heading (`# Title`).

    Args:
        card: Markdown file, which need not exist.

    Returns:
        The title, or None if there is no file or no such heading.
    """
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    heading = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return heading[1].strip() if heading else None
