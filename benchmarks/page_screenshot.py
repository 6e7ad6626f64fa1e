"""Make the picture of the search page in the README.

    pip install -e ".[test]"    # playwright, and Chromium of the system
    python -m benchmarks.page_screenshot

Indexes the photographs that scikit-image, scikit-learn and matplotlib contain (all freely licensed), opens the search
page in headless Chromium, and saves what it answers to a Portuguese sentence.
"""

import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from benchmarks.readme import save_small_image
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_search import PictureIndex
from capivara_search.page.server import create_page_server
from examples.real_images import PHOTOGRAPHS, load_photo

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class ScreenshotArguments:
    """Command-line flags of `python -m benchmarks.page_screenshot`."""

    model: str = flag("miniature", "Model of the index: a folder, a Hub id, or the miniature.")
    sentence: str = flag("uma moto vermelha estacionada em uma garagem", "Sentence that the page answers.")
    output: Path = flag(Path("docs/search.png"), "PNG file to write.")
    width: int = flag(1280, "Width of the window in pixels.")
    height: int = flag(800, "Height of the window in pixels.")


def take_screenshot(url: str, args: ScreenshotArguments, output: Path) -> None:
    """Save a PNG of the page at a URL, after all its pictures have been loaded.

    Args:
        url: Address of the page.
        args: Flags with the size of the window.
        output: PNG file to write.

    Raises:
        ValueError: If Chromium is not installed.
    """
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        raise ValueError(
            "Chromium is required for the screenshot. Install it, for example by `apt-get install chromium`."
        )
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, and containers run as root.
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": args.width, "height": args.height})
        page.goto(url)
        page.wait_for_selector("#results .tile")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=output)
        chromium.close()


def main(argv: list[str] | None = None) -> None:
    """Run the command: index the photographs, serve the page, and save the screenshot."""
    args = parse_arguments(ScreenshotArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "fotos"
        pictures.mkdir()
        for name in PHOTOGRAPHS:
            load_photo(name).save(pictures / f"{name}.jpg", quality=92)
        index = PictureIndex.open(Path(folder) / "fotos.lance", model=args.model)
        index.add(pictures)
        server, listening, url = create_page_server(index, port=0, language="pt")
        serving = threading.Thread(target=server.run, args=([listening],), daemon=True)
        serving.start()
        try:
            take_screenshot(f"{url}/?{urlencode({'text': args.sentence})}", args, Path(folder) / "page.png")
        finally:
            server.should_exit = True
            serving.join()
        save_small_image(Path(folder) / "page.png", args.output)
    print(f"{args.output}: {args.sentence!r}, answered by {args.model}")


if __name__ == "__main__":
    run_command(main)
