"""Where a model comes from: what the cards of its base and data say, and the licence that it inherits."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from capivara_common.privacy import short_name
from modeling_capivara.loading import read_card_metadata

# Licences that let what is made of several works carry the licence of the other ones, their notices kept.
PERMISSIVE_LICENSES = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc", "mit", "ncsa", "pddl"}
PERMISSIVE_LICENSES |= {"postgresql", "unlicense", "zlib"}


def read_origins(model: str, datasets: Sequence[str], evaluation_dataset: str) -> dict[str, Any]:
    """What the base and the data sets say of themselves on their own cards, as `origin` has it.

    Under "license" is what the model inherits from all of them, as `infer_license` has it.
    """
    base, data = read_origin(model, "model"), [read_origin(name, "dataset") for name in datasets]
    return {
        "license": infer_license([work["licenses"] for work in (base, *data)]),
        "model": base,
        "datasets": data,
        "evaluation_dataset": read_origin(evaluation_dataset, "dataset"),
    }


def infer_license(stated_licenses: list[list[str]]) -> str | None:
    """The one licence that binds a model made from works of the `stated` licences each; None where one states none, or
    several bind it."""
    if not all(stated_licenses):
        return None
    named = {licence for licences in stated_licenses for licence in licences}
    binding = named - PERMISSIVE_LICENSES or named
    return binding.pop() if len(binding) == 1 else None


def read_origin(name: str, repo_type: str) -> dict[str, Any]:
    """What the card of a model or data set states; `name` is a folder, a pattern of files, or a Hub id.

    Returns its `short_name`, `title`, `hub_id` and `revision` (of one that was loaded from the Hub), `base_model` (Hub
    ids), `licenses`, `attribution`, `translations` (language -> human or machine, of captions that `captions.build` had
    translated); None or an empty list or dictionary for what it does not state.
    """
    of_hub = not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    is_of_files = not Path(name).is_dir() and "/" in name  # one file, or a pattern: its card lies beside it
    folder = Path(name).parent if is_of_files else Path(name)
    path = _fetch_card(name, repo_type) if of_hub else folder / "README.md"
    card = read_card_metadata(path) if path else {}
    stated = card.get("translations")
    return {
        "name": short_name(name),
        "title": str(card.get("pretty_name") or (name if of_hub else _read_heading(path) or PurePosixPath(name).name)),
        "hub_id": name if path and of_hub else None,
        "revision": path.parent.name if path and of_hub else None,
        "base_model": _as_texts(card.get("base_model")),
        "licenses": _as_texts(card.get("license")),
        "attribution": str(card["attribution"]) if card.get("attribution") else None,
        "translations": {str(code): str(who) for code, who in stated.items()} if isinstance(stated, dict) else {},
    }


@cache  # a data set that is trained on is often measured on, too
def _fetch_card(name: str, repo_type: str) -> Path | None:
    """The card of what was loaded from the Hub before; None where it has none, or the Hub can't be reached."""
    try:
        cached = try_to_load_from_cache(name, "README.md", repo_type=repo_type)  # of the commit that was loaded
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "README.md", repo_type=repo_type))
    except (OSError, ValueError):
        return None


def _as_texts(value: Any) -> list[str]:
    return [str(text) for text in (value if isinstance(value, list) else [value]) if text]


def _read_heading(card: Path) -> str | None:
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None
