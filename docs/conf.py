"""Sphinx configuration of the documentation site. `make docs` builds the site."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from modeling_capivara import __version__
from site_pages import insert_generated_parts_and_rewrite_links

project, author, release = "CAPIVARA", "The CAPIVARA developers", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["package.md"]  # the project description for PyPI, which is not a page of this site
html_theme = "furo"
smartquotes = False  # True would replace the two hyphens of a flag such as --model by a dash
html_title = f"CAPIVARA {release}"
html_copy_source = html_show_sourcelink = html_show_copyright = False
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
default_role = "code"  # text between single backticks in docstrings is shown as code
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# Sphinx warns about links and anchors without a target. References to Python objects are not checked, because
# signatures contain types of other libraries, which this site does not document.
nitpicky, nitpick_ignore_regex = True, [("py:.*", ".*")]


def _replace_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the text of a page by its text for the site. Sphinx calls this function after it has read the page.

    Args:
        app: The Sphinx application.
        page: Name of the page, such as "how-to/search".
        source: List with the text of the page as its only element, which is replaced.
    """
    source[0] = insert_generated_parts_and_rewrite_links(page, source[0])


def setup(app: Sphinx) -> None:
    """Register the function that prepares the text of each page for the site: `_replace_source`.

    It inserts generated text, such as a list of all commands, and changes links so that they work on the site. Sphinx
    calls this function when it loads the configuration.

    Args:
        app: The Sphinx application.
    """
    app.connect("source-read", _replace_source)
