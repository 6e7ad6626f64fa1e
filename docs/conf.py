"""Settings of the documentation site, built by `make docs`."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from modeling_capivara import __version__
from site_pages import site_text

project, author, release = "CAPIVARA", "The CAPIVARA developers", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["package.md"]  # the description on the package index
html_theme = "furo"
smartquotes = False  # would make a dash of the two hyphens of a flag
html_title = f"CAPIVARA {release}"
html_copy_source = html_show_sourcelink = html_show_copyright = False
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
default_role = "code"  # single backticks in docstrings are code
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# Every link and anchor must lead somewhere, except types of other libraries in signatures.
nitpicky, nitpick_ignore_regex = True, [("py:.*", ".*")]


def replace_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the text of a page by the text for the site (a callback of Sphinx)."""
    source[0] = site_text(page, source[0])


def setup(app: Sphinx) -> None:
    """Register the callback that generates parts of the pages."""
    app.connect("source-read", replace_source)
