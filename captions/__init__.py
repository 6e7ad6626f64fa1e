"""Build caption datasets: generate, translate, score and select captions."""

import capivara_common.interrupt  # noqa: F401
