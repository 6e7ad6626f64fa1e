"""Build caption datasets: generate captions, translate them, score them against their images, and select the best."""

import capivara_common.interrupt  # noqa: F401
