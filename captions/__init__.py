"""Builds the caption data set: which captions of an image are used, and which pairs."""

import capivara_common.interrupt  # noqa: F401
