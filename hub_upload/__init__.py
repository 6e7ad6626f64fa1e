"""Publishing: the model card, the export, the upload, and the demo page."""

import capivara_common.interrupt  # noqa: F401
