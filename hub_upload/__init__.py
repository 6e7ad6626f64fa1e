"""Publish a model: export to other libraries, model card, upload to the Hugging Face Hub, and demo pages."""

import capivara_common.interrupt  # noqa: F401
