"""The miniature: a small model that is put together on this machine, where no network is."""

from pathlib import Path

NOTE = "This is a miniature."


def miniature_folder() -> Path:
    """The folder of the miniature."""
    raise ValueError("The miniature is not there yet; name a model.")
