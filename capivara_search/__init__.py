"""Search your own pictures with a sentence.

`PictureIndex` stores an embedding of each picture in your folders. The command `capivara` and a search page for the
browser use it.

Example:
    index = PictureIndex.open("fotos.lance", model="hiaac-nlp/CAPIVARA")
    index.add("~/Fotos")
    paths = [hit.path for hit in index.search("um gato dormindo", k=5)]
"""

from typing import TYPE_CHECKING, Any

from capivara_common.environment import require_packages

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex
    from capivara_search.models import SearchModel, resolve_search_model
    from capivara_search.results import Classification, Hit, IndexReport, IndexStatus, SkippedFile

__all__ = [
    "Classification",
    "Hit",
    "IndexReport",
    "IndexStatus",
    "PictureIndex",
    "SearchModel",
    "SkippedFile",
    "resolve_search_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name of this package on first use, so that `capivara --help` does not wait for slow imports.

    Args:
        name: One of the names in `__all__`.

    Returns:
        The class or function.

    Raises:
        AttributeError: If the name is not in `__all__`.
        ImportError: If a package that the search needs is not installed. The message contains the `pip` command that
            installs the missing packages (the extra `search`).
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_packages(f"capivara_search.{name}", "search", "lancedb")
    from capivara_search import index, models, results

    return next(getattr(module, name) for module in (results, models, index) if hasattr(module, name))
