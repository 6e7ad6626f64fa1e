"""Publish a model: export it for other libraries, write its model card, upload it to the Hub, and build demo pages."""

import capivara_common.interrupt  # noqa: F401
