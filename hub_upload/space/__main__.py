"""The page as a Space: an index of pictures, the model that searches it, and the program, in a folder.

    python -m hub_upload.space --model runs/mine --pictures pictures.lance --space demo
    python -m hub_upload.space --model runs/mine --static page --library node_modules  # searches visitors' own pictures
    python -m hub_upload.push --model demo --repo_id org/demo --repo_type space --push     # sends either folder

Thumbnails stand for the pictures, whose files stay here, as do their folders' names and the places where they were
taken. To search on this machine: `capivara app`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.environment import require_packages

NPM_COMMAND = "npm install --ignore-scripts @huggingface/transformers"
INDEX = "make the index by `capivara index`, and name it by --pictures"


@dataclass
class SpaceArguments:
    """Arguments of `hub_upload.space`."""

    model: str = flag(..., "Folder or Hub id of a CAPIVARA model.")
    pictures: str | None = flag(None, "Of --space: an index of pictures, as `capivara index` makes it.")
    space: Path | None = flag(None, "Write the folder of the Space here.")
    static: Path | None = flag(
        None,
        "Write a page without a server here instead: it searches the pictures that a visitor chooses, in the visitor's "
        "own browser, and takes none of --pictures. Any file server serves the folder.",
    )
    library: Path | None = flag(None, f"Of --static: the node_modules of `{NPM_COMMAND}`, version 4.3 or later.")
    gone: ClassVar = {
        "compare": "a Space shows one model; make two Spaces",
        **dict.fromkeys(("cache_dir", "device", "batch_size", "image_roots", "max_pixels"), INDEX),
        **dict.fromkeys(("form", "split", "image_column", "caption_column"), INDEX),
        **dict.fromkeys(("repo_id", "push", "private"), "send the folder by `hub_upload.push --repo_type space`"),
    }

    def __post_init__(self) -> None:
        if (self.static is None) == (self.space is None):
            raise ValueError("Say what is made: --space FOLDER, or --static FOLDER alone; `capivara app` searches.")
        if self.space and not self.pictures:
            raise ValueError("--space FOLDER needs --pictures, an index of pictures; `capivara index` makes it.")
        if self.static and not self.library:
            raise ValueError(f"--static FOLDER needs --library, the node_modules of `{NPM_COMMAND}`.")


def main(argv: list[str] | None = None) -> None:
    """Write the Space or the page."""
    args = parse_arguments(SpaceArguments, __doc__, argv)
    require_packages("A Space", "search", "lancedb", "starlette", "uvicorn")
    from hub_upload.space.publish_space import open_index, write_space
    from hub_upload.space.static_page import write_static_page

    folder = args.static or args.space
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is a file or not empty. Choose another one, or remove it.")  # before an hour's work
    if args.static:
        write_static_page(args.model, folder, args.library)
    else:
        write_space(*open_index(args.pictures, args.model), args.model, folder)
    started = "`python -m http.server` there shows it" if args.static else "`python app.py` there starts it"
    print(f"The {'page' if args.static else 'Space'} is in {folder}; {started}, and hub_upload.push sends it.")


if __name__ == "__main__":
    run_command(main, resumable=True)
