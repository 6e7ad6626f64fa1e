"""Headless Chromium for tests: a page that notes what it should not do."""

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
    """A page of Chromium and what happened in it.

    Attributes:
        page: playwright's.
        errors: messages of the console that are errors, and exceptions of scripts.
        requests: addresses that were asked for, in order.
        refused: those among them that were not local, and got no answer.
        dialogs: texts of alert, confirm and prompt, each dismissed.
    """

    page: "Page"
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def open_file(self, path: Path) -> None:
        self.page.goto(path.resolve().as_uri(), wait_until="load")

    def scrolls_sideways(self) -> bool:
        """Whether the whole page, not a table in it, is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def require_chromium() -> str:
    """Path of Chromium. Skips the test where it or playwright is missing; with CI_REQUIRES_CHROMIUM=1 that fails."""
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    missing = "chromium (apt-get install chromium)" if path is None else ""
    if importlib.util.find_spec("playwright") is None:
        missing = "playwright (pip install playwright)"
    if missing:
        answer = pytest.fail if os.environ.get("CI_REQUIRES_CHROMIUM") == "1" else pytest.skip
        answer(f"{missing} is not installed, so the page can't be opened")
    return path


@contextmanager
def open_browser(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A fresh page of headless Chromium that reaches nothing but files and this machine."""
    executable = require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # No sandbox: Chromium has none for root, and containers run as root.
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            page = chromium.new_page(viewport={"width": width, "height": height})
            browser = Browser(page)
            page.on("console", lambda said: browser.errors.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: browser.errors.append(str(error)))
            page.on("request", lambda request: browser.requests.append(request.url))
            page.on("dialog", lambda dialog: (browser.dialogs.append(dialog.message), dialog.dismiss()))
            page.route("**/*", lambda route: _answer(route, browser))
            yield browser
        finally:
            chromium.close()


def _answer(route: "Route", browser: Browser) -> None:
    parts = urlsplit(route.request.url)
    if parts.scheme in LOCAL_SCHEMES or parts.hostname in LOCAL_HOSTS:
        route.continue_()
    else:
        browser.refused.append(route.request.url)
        route.abort()


@contextmanager
def served_folders(mounts: dict[str, Path], headers: dict[str, str] | None = None) -> Iterator[str]:
    """Address of a plain file server on this machine: folders by the paths that they stand for, such as "/models/"."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            for prefix, folder in mounts.items():
                if path.startswith(prefix):
                    self.directory = str(folder)
                    return super().translate_path("/" + path.removeprefix(prefix))
            return os.devnull + "/none"

        def end_headers(self) -> None:
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
