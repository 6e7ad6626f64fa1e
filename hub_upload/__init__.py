"""Publish a model: export it for other libraries, write its model card, upload it to the Hub, and build demo pages."""

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401
