"""The search page in a browser: `serve_index(PictureIndex.open("fotos.lance"))` serves it until Ctrl-C."""

from capivara_search.page.server import Credit, serve_index

__all__ = ["Credit", "serve_index"]
