"""Make the screenshot of the search page that the README shows.

    pip install -e ".[test]"    # installs playwright; Chromium must be installed on the system
    python -m benchmarks.page_screenshot

The command indexes freely licensed photographs from Python packages, opens the search page in headless Chromium, and
searches for a Portuguese sentence.
"""

import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from benchmarks.documentation_tables import save_small_image
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_search import PictureIndex
from capivara_search.page.server import create_page_server
from examples.real_images import PHOTOGRAPHS, load_example_photo

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class ScreenshotArguments:
    """Command-line arguments of `benchmarks.page_screenshot`, which makes a screenshot of the search page."""

    model: str = flag("miniature", "Folder or Hub id of the model, or miniature: a tiny model that needs no network.")
    sentence: str = flag("uma moto vermelha estacionada em uma garagem", "Sentence to search for.")
    output: Path = flag(Path("docs/search.png"), "PNG file to write.")
    width: int = flag(1280, "Width of the window in pixels.")
    height: int = flag(800, "Height of the window in pixels.")


def _save_page_screenshot(url: str, args: ScreenshotArguments, output: Path) -> None:
    """Save a screenshot of a page as PNG, after all pictures of the page have been loaded.

    Args:
        url: URL of the page.
        args: Command-line arguments, which set the size of the browser window.
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
        # Chromium's sandbox does not work for root, the usual user in containers. Without this flag, Chromium would not
        # start.
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": args.width, "height": args.height})
        page.goto(url)
        page.wait_for_selector("#results .tile")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=output)
        chromium.close()


def main(argv: list[str] | None = None) -> None:
    """Run the command: index example photographs, open the search page in a browser, and save a screenshot."""
    args = parse_arguments(ScreenshotArguments, __doc__, argv)
    require_packages("A screenshot", "test", "playwright")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "fotos"
        pictures.mkdir()
        for name in PHOTOGRAPHS:
            load_example_photo(name).save(pictures / f"{name}.jpg", quality=92)
        index = PictureIndex.open(Path(folder) / "fotos.lance", model=args.model)
        index.add(pictures)
        server, listening, url = create_page_server(index, "127.0.0.1", 0, "pt", None, ())
        serving = threading.Thread(target=server.run, args=([listening],), daemon=True)
        serving.start()
        try:
            _save_page_screenshot(f"{url}/?{urlencode({'text': args.sentence})}", args, Path(folder) / "page.png")
        finally:
            server.should_exit = True
            serving.join()
        save_small_image(Path(folder) / "page.png", args.output)
    print(f"Screenshot: {args.output}. It shows the results for {args.sentence!r}, found by the model {args.model}.")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
