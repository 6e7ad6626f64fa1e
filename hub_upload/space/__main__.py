"""A page to try a CAPIVARA model: search pictures by text or picture, classify, find captions, compare two models.

    python -m hub_upload.space --model data/openmoji/base
    python -m hub_upload.space --model runs/mine --compare data/openmoji/base --pictures data/openmoji/dataset
    python -m hub_upload.space --model runs/mine --pictures ~/Pictures --port 8000
    python -m hub_upload.space --model runs/mine --repo_id org/demo         # lists what a Space would get
    python -m hub_upload.space --model runs/mine --repo_id org/demo --push  # and sends it

The page opens on this machine alone, at http://127.0.0.1:7860, and asks nothing of the network; Ctrl-C ends it. The
index of the pictures is built once, with progress, and kept in $CAPIVARA_CACHE or ~/.cache/capivara.
"""

from capivara_search.common.start import start_command

if __name__ == "__main__":
    start_command()

import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from capivara_search.common.cli import flag, parse, run_command, user_errors
from capivara_search.common.environment import require
from capivara_search.common.image_files import FORM_HELP, ImageFileArguments
from capivara_search.common.privacy import short_name

if TYPE_CHECKING:
    from hub_upload.space.answers import Demo

PACKAGES = ("gradio", "accelerate", "datasets")  # of the extra `app`


@dataclass
class SpaceArguments(ImageFileArguments):
    """Arguments of `hub_upload.space`."""

    model: str = flag(..., "Folder or Hub id of a CAPIVARA model.")
    compare: str | None = flag(None, "A second model, whose answers are shown beside the first's.")
    pictures: str = flag(
        "data/openmoji/dataset",
        "Folder of pictures, data set (saved, parquet, metadata.jsonl, WebDataset tars, Hub id), or an "
        "index that was kept.",
    )
    form: Literal["auto", "images"] = flag("auto", FORM_HELP)
    split: list[str] = flag(["all"], "Splits of a data set that are searched, or all.")
    image_column: str = flag("image", "Column of the pictures, of a data set.")
    caption_column: str | None = flag(
        None, "Column of the captions; captions-pt, caption, captions or text where there."
    )
    host: str = flag("127.0.0.1", "Address of the page. Any other is open to the network around you.")
    port: int = flag(7860, "Port of the page, 1 to 65535.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")
    batch_size: int = flag(32, "Pictures that are embedded at once.")
    cache_dir: str = flag("auto", "Folder of the index; auto = $CAPIVARA_CACHE or ~/.cache/capivara.")
    space: Path | None = flag(None, "Write the folder of a Space here, and list its files; opens no page.")
    repo_id: str | None = flag(
        None, "Space on the Hub, such as org/demo. Without --push its files are only listed; no page."
    )
    push: bool = flag(False, "Send the Space to --repo_id, with the token of `hf`.")
    private: bool = flag(False, "A new Space is seen by its owner alone.")

    def __post_init__(self) -> None:
        self.check_image_files()
        if not 1 <= self.port <= 65535 or self.batch_size < 1:
            raise ValueError(f"port must be 1 to 65535, batch_size at least 1, got {self.port}, {self.batch_size}.")
        if self.push and self.repo_id is None:
            raise ValueError("--push needs --repo_id, the Space on the Hub, such as org/demo.")
        if self.cache_dir == "off":
            raise ValueError("The index is kept; cache_dir must be auto or a folder, got 'off'.")


def load_demo(args: SpaceArguments) -> "Demo":
    """The index of every model that is asked for, built where it is not kept."""
    from caption_data.embedding_cache import cache_folder
    from hub_upload.space.answers import Demo
    from hub_upload.space.collection import open_pictures
    from hub_upload.space.index import build_index, is_album, open_album, read_album
    from modeling_capivara.embedder import load_embedder

    cache, kept = cache_folder(args.cache_dir), is_album(Path(args.pictures))
    options = (args.split, args.image_column, args.caption_column, args.form)
    # Before the models, for its errors.
    pictures = None if kept else open_pictures(args.pictures, *options, **args.limits())
    embedders = [load_embedder(model, args.device) for model in (args.model, args.compare) if model]
    for embedder in embedders:
        embedder.name = short_name(embedder.name)
    album = read_album(Path(args.pictures)) if kept else open_album(pictures, cache)
    return Demo([build_index(album, embedder, cache, args.batch_size) for embedder in embedders])


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(SpaceArguments, __doc__, argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes where the index was.", file=sys.stderr)
        sys.exit(130)


def run(args: SpaceArguments) -> None:
    """Build the index, then write a Space, or serve the page until Ctrl-C."""
    check_before_work(args)
    demo = load_demo(args)
    album = demo.album
    print(f"{len(album.captions) - len(album.skipped)} pictures, index in {album.folder}.")
    for row, reason in list(album.skipped.items())[:5]:
        print(f"Left out, row {row}: {reason}")
    if len(album.skipped) > 5:
        print(f"Left out as well: {len(album.skipped) - 5} more; {album.folder / 'index.json'} lists them.")
    if args.space or args.repo_id:
        publish(demo, args)
        return
    from hub_upload.space.app import is_loopback, serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what visitors have sent is removed
    blocks = serve(demo, args.host, args.port)
    whom = "this machine alone" if is_loopback(args.host) else "everybody who reaches this machine"
    print(f"http://{args.host}:{args.port} is open, to {whom}; Ctrl-C ends it.", flush=True)
    blocks.block_thread()


def check_before_work(args: SpaceArguments) -> None:
    """What would be noticed only after the index is built, which can take an hour.

    Raises:
        ImportError: a package of the page is missing.
        ValueError: the Space has no name of the Hub, its folder holds something, or two models have one name.
    """
    require("The page", "app", *PACKAGES)
    if args.space or args.repo_id:
        from hub_upload.space.publish_space import check_target

        check_target([args.model, args.compare or ""], args.space, args.repo_id)


def publish(demo: "Demo", args: SpaceArguments) -> None:
    """Write the folder of the Space, list it, and send it if that was asked for."""
    from hub_upload.space.publish_space import listing, push_space, write_space

    models = [model for model in (args.model, args.compare) if model]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.space or Path(temporary) / "space"
        print(listing(folder, write_space(demo, models, folder)))
        if args.space:
            print(f"The Space is in {folder}; `python app.py` there starts it.")
        if args.push:
            print(f"Sent: {push_space(folder, args.repo_id, args.private)}")
        elif args.repo_id:
            print(f"Nothing was sent. With --push, these files go to {args.repo_id}.")


if __name__ == "__main__":
    run_command(main)
