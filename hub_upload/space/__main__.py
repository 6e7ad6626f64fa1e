"""The page as a Space: an index of pictures, the model that searches it, and the program, in a folder or on the Hub.

    python -m hub_upload.space --model runs/mine --pictures ~/Pictures --space demo
    python -m hub_upload.space --model runs/mine --pictures data/openmoji/dataset --repo_id org/demo         # lists it
    python -m hub_upload.space --model runs/mine --pictures data/openmoji/dataset --repo_id org/demo --push  # sends it
    python -m hub_upload.space --model runs/mine --static page   # without a server: visitors search pictures of theirs

Thumbnails stand for the pictures, whose files stay here, as do their folders' names and the places where they were
taken. To search on this machine: `capivara app`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from capivara_common.cli import flag, parse, run_command, user_errors
from capivara_common.environment import require
from capivara_common.image_files import FORM_HELP, ImageFileArguments

PACKAGES = ("lancedb", "starlette", "uvicorn", "datasets")


@dataclass
class SpaceArguments(ImageFileArguments):
    """Arguments of `hub_upload.space`."""

    gone = {
        "compare": "a Space shows one model; make two Spaces",
        **dict.fromkeys(("device", "batch_size"), "make the index by `capivara index`, and name it by --pictures"),
    }

    model: str = flag(..., "Folder or Hub id of a CAPIVARA model.")
    pictures: str = flag(
        "data/openmoji/dataset",
        "Index of pictures, folder of pictures, or data set (saved, parquet, metadata.jsonl, WebDataset tars, Hub id).",
    )
    form: Literal["auto", "images"] = flag("auto", FORM_HELP)
    split: list[str] = flag(["all"], "Splits of a data set that are searched, or all.")
    image_column: str = flag("image", "Column of the pictures, of a data set.")
    caption_column: str | None = flag(
        None, "Column of the captions; captions-pt, caption, captions or text where there."
    )
    cache_dir: str = flag("auto", "Folder of the index; auto = $CAPIVARA_CACHE or ~/.cache/capivara.")
    space: Path | None = flag(None, "Write the folder of the Space here, and list its files.")
    static: Path | None = flag(
        None,
        "Write a page without a server here instead: it searches the pictures that a visitor chooses, in the visitor's "
        "own browser, and takes none of --pictures. Any file server serves the folder.",
    )
    library: Path | None = flag(
        None, "Of --static: a node_modules with @huggingface/transformers; npm fetches it where none is named."
    )
    repo_id: str | None = flag(None, "Space on the Hub, such as org/demo. Without --push its files are only listed.")
    push: bool = flag(False, "Send the Space to --repo_id, with the token of `hf`.")
    private: bool = flag(False, "A new Space is seen by its owner alone.")

    def __post_init__(self) -> None:
        self.check_image_files()
        if self.push and self.repo_id is None:
            raise ValueError("--push needs --repo_id, the Space on the Hub, such as org/demo.")
        if self.static is not None and self.space is not None:
            raise ValueError("--static is a page in a folder of its own; leave --space out.")
        if self.static is None and self.library is not None:
            raise ValueError("--library is of --static FOLDER alone.")
        if self.space is None and self.repo_id is None and self.static is None:
            raise ValueError("Say where the Space goes: --space FOLDER or --repo_id org/demo; `capivara app` searches.")
        if self.cache_dir == "off":
            raise ValueError("The index is kept; cache_dir must be auto or a folder, got 'off'.")


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Write the Space or the page, list it, and send it if that was asked for."""
    args = parse(SpaceArguments, __doc__, argv)
    require("A Space", "app", *PACKAGES)
    from hub_upload.allowed_files import check_repo_id
    from hub_upload.space.publish_space import listing, open_index, push_space, write_space

    folder = args.static or args.space
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is a file or not empty. Choose another one, or remove it.")  # before an hour's work
    if args.repo_id:
        check_repo_id(args.repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        if args.static:
            from hub_upload.space.static_page import write_static_page

            write_static_page(args.model, args.static, args.library)
        else:
            options = {"splits": args.split, "image_column": args.image_column, "caption_column": args.caption_column}
            options |= {"form": args.form, **args.limits()}
            made = open_index(args.pictures, args.model, args.cache_dir, **options)
            folder = folder or Path(temporary) / "space"
            write_space(made[0], args.model, folder, made[1])
        print(listing(folder))
        if args.static or args.space:
            started = "`python -m http.server` there shows it" if args.static else "`python app.py` there starts it"
            print(f"The {'page' if args.static else 'Space'} is in {folder}; {started}.")
        if args.push:
            sdk = "static" if args.static else "docker"
            print(f"Sent: {push_space(folder, args.repo_id, args.private, sdk)}")
        elif args.repo_id:
            print(f"Nothing was sent. With --push, these files go to {args.repo_id}.")


if __name__ == "__main__":
    run_command(main, resumes=True)
