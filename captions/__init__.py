"""Build caption datasets: generate captions, translate them, score them against their images, and select the best."""

# Imported only for its effect: Ctrl-C during the slow imports of a command prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401
