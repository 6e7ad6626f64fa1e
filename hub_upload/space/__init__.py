"""The demo page: search, classification and captions with a CAPIVARA model, in a browser."""

import os

# Read when gradio and huggingface_hub are imported, so they are set before anything here imports them.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
