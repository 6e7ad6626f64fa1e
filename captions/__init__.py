"""Build caption datasets: generate captions, translate them, score them against their images, and select the best."""

# Imported only for its side effect: Ctrl-C during the slow imports of a command then prints one line, not a traceback.
import capivara_common.interrupt  # noqa: F401
