"""Read the cards of a model's base and training data, and infer the license that the model inherits."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from capivara_common.privacy import short_name
from modeling_capivara.loading import read_card_metadata

# Licenses that allow derived works to carry another license, as long as their notices are kept.
PERMISSIVE_LICENSES = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc", "mit", "ncsa", "pddl"}
PERMISSIVE_LICENSES |= {"postgresql", "unlicense", "zlib"}


def read_origins(model: str, datasets: Sequence[str], evaluation_dataset: str) -> dict[str, Any]:
    """Read the cards of the base model and the datasets.

    Args:
        model: Folder or Hub id of the base model.
        datasets: Training datasets: folders, file patterns or Hub ids.
        evaluation_dataset: Dataset of the evaluation.

    Returns:
        "license", the license that the model inherits (see `infer_license`), and the metadata from `read_origin`
        under "model", "datasets" (a list) and "evaluation_dataset".
    """
    base, data = read_origin(model, "model"), [read_origin(name, "dataset") for name in datasets]
    return {
        "license": infer_license([origin["licenses"] for origin in (base, *data)]),
        "model": base,
        "datasets": data,
        "evaluation_dataset": read_origin(evaluation_dataset, "dataset"),
    }


def infer_license(stated_licenses: list[list[str]]) -> str | None:
    """Return the license of a model that is derived from several works.

    Permissive licenses give way to others, for example mit and cc-by-4.0 result in cc-by-4.0.

    Args:
        stated_licenses: Licenses of each work.

    Returns:
        The license, or None if a work states no license or if more than one license remains.
    """
    if not all(stated_licenses):
        return None
    all_licenses = {license for licenses in stated_licenses for license in licenses}
    binding = all_licenses - PERMISSIVE_LICENSES or all_licenses
    return binding.pop() if len(binding) == 1 else None


def read_origin(name: str, repo_type: str) -> dict[str, Any]:
    """Read the metadata of a model or dataset from its card.

    Args:
        name: Folder, file, file pattern or Hub id.
        repo_type: "model" or "dataset".

    Returns:
        "name" (short name), "title", "hub_id" and "revision" (if loaded from the Hub), "base_model" (Hub ids),
        "licenses", "attribution", and "translations" (language -> "human" or "machine", for captions translated by
        `captions.build`). Values that the card does not state are None or empty.
    """
    is_on_hub = not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    is_file_or_pattern = not Path(name).is_dir() and "/" in name
    folder = Path(name).parent if is_file_or_pattern else Path(name)
    path = _fetch_card(name, repo_type) if is_on_hub else folder / "README.md"
    card = read_card_metadata(path) if path else {}
    default_title = name if is_on_hub else _read_heading(path) or PurePosixPath(name).name
    translations = card.get("translations")
    translators = translations if isinstance(translations, dict) else {}
    return {
        "name": short_name(name),
        "title": str(card.get("pretty_name") or default_title),
        "hub_id": name if path and is_on_hub else None,
        "revision": path.parent.name if path and is_on_hub else None,
        "base_model": _as_texts(card.get("base_model")),
        "licenses": _as_texts(card.get("license")),
        "attribution": str(card["attribution"]) if card.get("attribution") else None,
        "translations": {str(code): str(translator) for code, translator in translators.items()},
    }


@cache  # training and evaluation often use the same dataset
def _fetch_card(name: str, repo_type: str) -> Path | None:
    """Return the path of a card from the Hub. None if there is no card or the Hub can't be reached."""
    try:
        # The cache is first, because it has the card of the commit that was loaded.
        cached = try_to_load_from_cache(name, "README.md", repo_type=repo_type)
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "README.md", repo_type=repo_type))
    except (OSError, ValueError):
        return None


def _as_texts(value: Any) -> list[str]:
    """Return a value or list from YAML as a list of texts, without empty ones."""
    return [str(text) for text in (value if isinstance(value, list) else [value]) if text]


def _read_heading(card: Path) -> str | None:
    """Return the first heading of level 1 in a card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    heading = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return heading[1].strip() if heading else None
