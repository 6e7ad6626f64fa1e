"""Publishing: the model card, the export, the upload, and the demo page."""
