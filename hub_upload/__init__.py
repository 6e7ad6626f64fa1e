"""Publish a model: export it for other libraries, write its model card, upload it to the Hub, and build demo pages."""

# Imported only for its effect: if the user presses Ctrl-C during the slow imports of a command, one line is printed
# instead of a traceback.
import capivara_common.interrupt  # noqa: F401
