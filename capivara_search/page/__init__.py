"""The search page for a browser. `serve_index(PictureIndex.open("fotos.lance"))` serves the page until Ctrl-C."""

from capivara_search.page.server import Credit, serve_index

__all__ = ["Credit", "serve_index"]
