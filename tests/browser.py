"""Headless Chromium for tests, which records errors, external requests and dialogs of a page."""

import http.server
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
LOCAL_SCHEMES, LOCAL_HOSTS = ("file", "data", "blob", "about"), ("127.0.0.1", "localhost", "::1")


@dataclass
class Browser:
    """A page in Chromium, and what happened in it.

    Attributes:
        page: Page object of playwright.
        errors: Error messages of the console, and exceptions of scripts.
        requests: Requested URLs, in order.
        refused: Requested URLs that are not local; these requests are blocked.
        dialogs: Texts of alert, confirm and prompt dialogs, all dismissed.
    """

    page: "Page"
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def open_file(self, path: Path) -> None:
        self.page.goto(path.resolve().as_uri(), wait_until="load")

    def scrolls_sideways(self) -> bool:
        """Return whether the page as a whole is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def require_chromium() -> str:
    """Return the path of Chromium. Skip the test, or fail if CI_REQUIRES_CHROMIUM=1, without Chromium or playwright."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    missing = "chromium (apt-get install chromium)" if path is None else ""
    if importlib.util.find_spec("playwright") is None:
        missing = "playwright (pip install playwright)"
    if missing:
        skip = pytest.fail if os.environ.get("CI_REQUIRES_CHROMIUM") == "1" else pytest.skip
        skip(f"{missing} is not installed, so the page can't be opened")
    return path


@contextmanager
def open_browser(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Open a new page in headless Chromium that can load only files and URLs of this machine."""
    executable = require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, and containers run as root.
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            page = chromium.new_page(viewport={"width": width, "height": height})
            browser = Browser(page)
            page.on("console", lambda message: browser.errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: browser.errors.append(str(error)))
            page.on("request", lambda request: browser.requests.append(request.url))
            page.on("dialog", lambda dialog: (browser.dialogs.append(dialog.message), dialog.dismiss()))
            page.route("**/*", lambda route: _answer(route, browser))
            yield browser
        finally:
            chromium.close()


def _answer(route: "Route", browser: Browser) -> None:
    """Let local requests through; block and record all others."""
    parts = urlsplit(route.request.url)
    if parts.scheme in LOCAL_SCHEMES or parts.hostname in LOCAL_HOSTS:
        route.continue_()
    else:
        browser.refused.append(route.request.url)
        route.abort()


@contextmanager
def served_folders(mounts: dict[str, Path], headers: dict[str, str] | None = None) -> Iterator[str]:
    """Start a file server on this machine and yield its URL. `mounts`: URL prefix, such as "/models/", -> folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            for prefix, folder in mounts.items():
                if path.startswith(prefix):
                    self.directory = str(folder)
                    return super().translate_path("/" + path.removeprefix(prefix))
            return os.devnull + "/none"

        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
