"""Build caption datasets: generate captions, translate them, score them against their images, and select the best."""

# This import comes before those of large libraries, so that Ctrl-C during their import prints one line, no traceback.
import capivara_common.interrupt  # noqa: F401
