"""Write the search page as a folder that can be pushed to the Hub as a Space (web demo).

    python -m hub_upload.space --model runs/mine --pictures pictures.lance --space demo
    python -m hub_upload.space --model runs/mine --static page --library node_modules  # page without a server
    python -m hub_upload.push --model demo --repo_id org/demo --repo_type space --push     # uploads the folder

With --space, users search your pictures. The folder contains a server program, the model and an index of the pictures
with thumbnails. It contains no picture files, no full paths of folders and no GPS coordinates.

With --static, users search the pictures on their own device. The folder contains a page that runs the model in the
browser. To search on this machine only, use `capivara app`.
"""

from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_common.files import check_output_folder_and_clean_leftovers

NPM_COMMAND = "npm install --ignore-scripts @huggingface/transformers"


@dataclass
class SpaceArguments:
    """Command-line arguments of `hub_upload.space`, which writes the picture search page as a web demo."""

    model: str = flag(..., "Folder or Hub id of a CAPIVARA model.")
    pictures: str | None = flag(None, "Index of the pictures, created by `capivara index` (required for --space).")
    space: Path | None = flag(None, "Folder to write a Space to, with a server program, the model and an index.")
    static: Path | None = flag(
        None,
        "Folder to write the page to, as static files that any file server can serve. Users search the pictures of "
        "their own device in the browser. --pictures is not used.",
    )
    library: Path | None = flag(
        None, f"Folder node_modules that `{NPM_COMMAND}` creates, version 4.3 or later. Required for --static."
    )

    def __post_init__(self) -> None:
        if (self.static is None) == (self.space is None):
            raise ValueError(
                "Give either --space FOLDER or --static FOLDER. To search on this machine, use `capivara app`."
            )
        if self.space and not self.pictures:
            raise ValueError("--space needs --pictures, an index of pictures. Create it with `capivara index`.")
        if self.static and not self.library:
            raise ValueError(f"--static needs --library, the folder node_modules that `{NPM_COMMAND}` creates.")


def main(argv: list[str] | None = None) -> None:
    """Run the command: write the search page with a server (--space) or as static files (--static)."""
    args = parse_arguments(SpaceArguments, __doc__, argv)
    require_packages("A Space", "search", "lancedb", "starlette", "uvicorn")
    from hub_upload.space.docker_space import write_space
    from hub_upload.space.static_page import write_static_page

    folder = args.static or args.space
    check_output_folder_and_clean_leftovers(folder)  # called before the export of the model, which may take an hour
    if args.static:
        write_static_page(args.model, folder, args.library)
    else:
        write_space(args.pictures, args.model, folder)
    product, command = ("page", "python -m http.server") if args.static else ("Space", "python app.py")
    print(f"Wrote the {product} to {folder}. To try it, run `{command}` there. To publish it, use hub_upload.push.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
