"""The page as a Space: an index of pictures, the model that searches it, and the program, in a folder.

    python -m hub_upload.space --model runs/mine --pictures ~/Pictures --space demo
    python -m hub_upload.space --model runs/mine --static page   # without a server: visitors search pictures of theirs
    python -m hub_upload.push --model demo --repo-id org/demo --repo-type space --push     # sends either folder

Thumbnails stand for the pictures, whose files stay here, as do their folders' names and the places where they were
taken. To search on this machine: `capivara app`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from capivara_common.cli import flag, parse, run_command
from capivara_common.environment import require

DATA_SET = "--pictures is an index or a folder of pictures; save those of a data set as files in one"


@dataclass
class SpaceArguments:
    """Arguments of `hub_upload.space`."""

    model: str = flag(..., "Folder or Hub id of a CAPIVARA model.")
    pictures: str | None = flag(None, "Of --space: an index of pictures, or a folder of them.")
    cache_dir: str = flag("auto", "Folder of the index; auto = $CAPIVARA_CACHE or ~/.cache/capivara.")
    space: Path | None = flag(None, "Write the folder of the Space here.")
    static: Path | None = flag(
        None,
        "Write a page without a server here instead: it searches the pictures that a visitor chooses, in the visitor's "
        "own browser, and takes none of --pictures. Any file server serves the folder.",
    )
    library: Path | None = flag(
        None, "Of --static: a node_modules with @huggingface/transformers; npm fetches it where none is named."
    )
    gone: ClassVar = {
        "compare": "a Space shows one model; make two Spaces",
        **dict.fromkeys(("device", "batch_size"), "make the index by `capivara index`, and name it by --pictures"),
        **dict.fromkeys(("repo_id", "push", "private"), "send the folder by `hub_upload.push --repo-type space`"),
        **dict.fromkeys(("form", "split", "image_column", "caption_column", "image_roots", "max_pixels"), DATA_SET),
    }

    def __post_init__(self) -> None:
        if (self.static is None) == (self.space is None):
            raise ValueError("Say what is made: --space FOLDER, or --static FOLDER alone; `capivara app` searches.")
        if self.static is None and self.library is not None:
            raise ValueError("--library is of --static FOLDER alone.")
        if self.static is None and self.pictures is None:
            raise ValueError("--space FOLDER needs --pictures, an index or a folder of pictures.")
        if self.cache_dir == "off":
            raise ValueError("The index is kept; cache_dir must be auto or a folder, got 'off'.")


def main(argv: list[str] | None = None) -> None:
    """Write the Space or the page."""
    args = parse(SpaceArguments, __doc__, argv)
    require("A Space", "search", "lancedb", "starlette", "uvicorn")
    from hub_upload.space.publish_space import open_index, write_space
    from hub_upload.space.static_page import write_static_page

    folder = args.static or args.space
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is a file or not empty. Choose another one, or remove it.")  # before an hour's work
    if args.static:
        write_static_page(args.model, folder, args.library)
    else:
        index, credit = open_index(args.pictures, args.model, args.cache_dir)
        write_space(index, args.model, folder, credit)
    started = "`python -m http.server` there shows it" if args.static else "`python app.py` there starts it"
    print(f"The {'page' if args.static else 'Space'} is in {folder}; {started}, and hub_upload.push sends it.")


if __name__ == "__main__":
    run_command(main, resumes=True)
