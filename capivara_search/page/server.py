"""Serve the search page: search and classification of your own pictures in a browser, by default on this machine only.

Example:
    serve_index(PictureIndex.open("fotos.lance"))  # until Ctrl-C

The page is a small Starlette application of static files and JSON. `PageSite.routes` lists everything that it answers.
"""

import asyncio
import contextlib
import io
import ipaddress
import json
import mimetypes
import os
import re
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

import jinja2
import numpy as np
import PIL.Image
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from capivara_common.image_files import BadImage, open_regular_file
from capivara_search.folder_scan import is_picture_name
from capivara_search.messages import localized_error
from capivara_search.page.answers import PageAnswers, Question
from capivara_search.page.decoder import DecoderProcess
from capivara_search.page.guard import (
    BACKLOG,
    MAX_LARGE_BODIES,
    QUEUE_TIMEOUT_S,
    LimitedHttpProtocol,
    QuestionQueue,
    RequestGuard,
    RequestRefusedError,
    list_allowed_hosts,
    receive_body,
)
from capivara_search.picture_reading import read_bounded

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

PAGE_FOLDER = Path(__file__).parent
LANGUAGES = ("pt", "en")
DEFAULT_PORT = 7860
MODEL_LOAD_TIMEOUT_S = 600  # to import torch and load the model on a slow machine
SHUTDOWN_TIMEOUT_S = 3  # for open connections when the page ends
DOWNLOAD_CHUNK_BYTES = 2**18
VIEW_JPEG_QUALITY = 88  # of the large view of a picture
BROWSER_CACHE_S = 3600  # a browser may keep a picture this long; the address of the picture changes with its file


@dataclass(frozen=True)
class Credit:
    """Source and license of the pictures, shown on a page that is open to other people.

    Attributes:
        name: Name of the dataset.
        license: Identifier of the license, such as "cc-by-sa-4.0"; "" if the dataset states none.
        attribution: Sentence that the license requires; "" if it requires none.
    """

    name: str
    license: str = ""
    attribution: str = ""

    @property
    def license_url(self) -> str:
        """Address of a Creative Commons license that requires a link; "" for other licenses."""
        match = re.fullmatch(r"cc-(by[a-z-]*)-(\d\.\d)", self.license, re.ASCII)
        return f"https://creativecommons.org/licenses/{match[1]}/{match[2]}/" if match else ""


def serve_index(
    index: "PictureIndex",
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    open_browser: bool = True,
    language: str = "pt",
    credit: Credit | None = None,
    on_open: Callable[[str], None] | None = None,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serve the page of an index until Ctrl-C. The index may grow meanwhile.

    Args:
        index: The index.
        host: Address of the page. With any address but one of this machine itself, the page is open to the network,
            without a password.
        port: Port of the page. If the default port is taken, a free port is used.
        open_browser: Open the page in the visitor's browser.
        language: "pt" or "en"; `?lang=` in the address of the page selects the other language.
        credit: Source and license of the pictures, for a page that is open to other people.
        on_open: Called with the address when the page is open.
        allow_hosts: Names that the page answers to, in addition to those of `list_allowed_hosts`.

    Raises:
        OSError: If the port is taken, the host does not exist, or the page did not start.
        ValueError: If the language or a name of `allow_hosts` is invalid, or the model does not match the index.
    """
    server, listening, url = create_page_server(index, host, port, language, credit, allow_hosts)
    # In a thread, because a notebook's event loop may run in this thread already.
    serving = threading.Thread(target=server.run, args=([listening],), daemon=True)
    serving.start()
    try:
        while not server.started:
            if not serving.is_alive():
                raise localized_error(OSError, "no_start", url=url)
            time.sleep(0.01)
        if on_open is not None:
            on_open(url)
        if open_browser and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
            # Not without a display, where a text browser would take over this terminal. In a thread, because some
            # browsers return only when they are closed.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        while serving.is_alive():
            serving.join(1)
    except KeyboardInterrupt:
        pass
    finally:
        server.should_exit = True
        serving.join(SHUTDOWN_TIMEOUT_S + 10)


def create_page_server(
    index: "PictureIndex",
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    language: str = "pt",
    credit: Credit | None = None,
    allow_hosts: Sequence[str] = (),
) -> tuple[uvicorn.Server, socket.socket, str]:
    """Create the server of a page without running it.

    Args:
        index: The index.
        host: Address of the page.
        port: Port of the page. If the default port is taken, a free port is used.
        language: "pt" or "en".
        credit: Source and license of the pictures; None to show none.
        allow_hosts: Names that the page answers to, in addition to those of `list_allowed_hosts`.

    Returns:
        The server, the listening socket to run it with, and the address of the page.

    Raises:
        OSError: If the port is taken or the host does not exist.
        ValueError: If the language or a name of `allow_hosts` is invalid, or the model does not match the index.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    hosts = list_allowed_hosts(host, allow_hosts)
    if len(index):
        index.search_vector(
            np.ones(index.model.width, np.float32), k=1
        )  # raises the error of a model that does not match
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError:
        if port != DEFAULT_PORT:
            raise
        listening = socket.create_server((host, 0), family=family)
    name = f"[{host}]" if ":" in host else host
    site = PageSite(PageAnswers(index), is_loopback(host), language, credit)
    guard = Middleware(RequestGuard, hosts=hosts, behind_proxy=not site.is_local)
    config = uvicorn.Config(
        Starlette(routes=site.routes(), middleware=[guard], lifespan=site.lifespan),
        http=LimitedHttpProtocol, backlog=BACKLOG, ws="none", lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        log_level="error", access_log=False,  # visitors could fill the disk with warnings
        server_header=False, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config), listening, f"http://{name}:{listening.getsockname()[1]}"


class PageSite:
    """The routes of the page.

    Args:
        answers: Answers of the index.
        is_local: Whether only this machine can reach the page.
        language: Default language, "pt" or "en".
        credit: Source and license of the pictures; None to show none.
    """

    def __init__(self, answers: PageAnswers, is_local: bool, language: str, credit: Credit | None):
        self.answers, self.is_local, self.language, self.credit = answers, is_local, language, credit
        self._decoder = DecoderProcess()
        self._question_queue, self._view_queue = QuestionQueue(), QuestionQueue()
        self._body_slots = asyncio.Semaphore(MAX_LARGE_BODIES)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the model when the page starts, and end the decoder process when it ends.

        Args:
            app: The application; not used, but Starlette passes it.
        """
        # In a queue of its own: questions of text do not wait for torch and the image encoder.
        self._loading_model = asyncio.create_task(
            QuestionQueue().ask(self.answers.prepare_images, MODEL_LOAD_TIMEOUT_S)
        )
        embedding_text = asyncio.create_task(
            self._question_queue.ask(lambda: self.answers.index.model.embed_texts(["gato"]))
        )
        for task in (self._loading_model, embedding_text):
            # Retrieve the exception, or asyncio would log it; each question that needs the model raises it again.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        yield
        self._loading_model.cancel()
        embedding_text.cancel()
        self._decoder.close()

    def routes(self) -> list[Route]:
        """Return all routes; nothing else is answered."""
        questions = {name: getattr(self.answers, name) for name in ("search", "classify", "copies", "folders")}
        questions["status"] = lambda question, _: self.answers.status(question) | {"local": self.is_local}
        return [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=PAGE_FOLDER / "static")),
            *(Route(f"/api/{name}", self._make_endpoint(ask), methods=["POST"]) for name, ask in questions.items()),
            Route("/thumbnail", self.thumbnail),
            Route("/picture", self.picture),
            Route("/download", self.download),
        ]

    async def page(self, request: Request) -> Response:
        """Return the HTML page in the language of `?lang=`, or else in the default language."""
        language = request.query_params.get("lang", "")
        html = _render_page(language if language in LANGUAGES else self.language, self.is_local, self.credit)
        return Response(html, media_type="text/html")

    def _make_endpoint(self, ask: Callable[[Question, Any], dict[str, Any]]) -> Callable[[Request], Any]:
        """Return a route that answers questions with `ask(question, image)`."""

        async def answer(request: Request) -> Response:
            async with receive_body(request, self._body_slots) as body:
                # In a thread, so that the event loop answers other visitors meanwhile.
                question, upload = await run_in_threadpool(_parse_body, body)
                image = await self._decode_upload(upload) if upload else None
                return JSONResponse(await self._question_queue.ask(lambda: ask(question, image)))

        return answer

    async def _decode_upload(self, upload: bytearray) -> PIL.Image.Image:
        """Decode a picture of a visitor, in another queue than questions of text, and wait for the model.

        Raises:
            RequestRefusedError: If the picture can't be decoded, or the model is still being loaded.
        """
        try:
            image = await self._view_queue.ask(lambda: self._decoder.decode(upload))
        except BadImage as bad:
            raise RequestRefusedError("too_many_pixels" if bad.reason == "absurd image size" else "no_picture") from bad
        if not (await asyncio.wait([self._loading_model], timeout=QUEUE_TIMEOUT_S))[0]:
            raise RequestRefusedError("busy", 503)
        return image

    async def thumbnail(self, request: Request) -> Response:
        """Return the thumbnail of a picture of the index."""
        return _cached_response(await run_in_threadpool(self._load_thumbnail, _path_parameter(request)), "image/webp")

    async def picture(self, request: Request) -> Response:
        """Return a large view of a picture of the index, or its thumbnail if the file is missing or can't be read."""
        return _cached_response(*await self._view_queue.ask(partial(self._render_view, _path_parameter(request))))

    async def download(self, request: Request) -> Response:
        """Return the original file of a picture of the index."""
        path = _path_parameter(request)
        file, _ = await self._view_queue.ask(lambda: self._open_original(path))
        file.seek(0)
        size, kind = os.fstat(file.fileno()).st_size, mimetypes.guess_type(path)[0] or "application/octet-stream"
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(Path(path).name, safe='')}"}
        return StreamingResponse(
            _iter_chunks(file, size), media_type=kind, headers=headers | {"Content-Length": str(size)}
        )

    # A path of a request is looked up in the index before the disk is touched. All unknown paths get the same answer,
    # so that a visitor can't find out which files exist.

    def _load_thumbnail(self, path: str) -> bytes:
        """Return the thumbnail of a picture in WebP. Raise RequestRefusedError if the picture is not in the index."""
        if path and (thumbnail := self.answers.index.thumbnail(path)):
            return thumbnail
        raise RequestRefusedError("gone", 404)

    def _open_original(self, path: str) -> tuple[BinaryIO, PIL.Image.Image]:
        """Open and decode the file of a picture of the index.

        The file must be below a folder that `add` was given on this machine, because the paths of an index from other
        people may lead anywhere. The open file is returned, so that the file that is sent is the one that was checked.

        Raises:
            RequestRefusedError: If the index does not have the picture, or its file can't be shown.
        """
        if not path or self.answers.index.get_picture(path) is None:
            raise RequestRefusedError("gone", 404)
        with contextlib.ExitStack() as stack, contextlib.suppress(BadImage, OSError, ValueError):
            if is_picture_name(path):
                folders = list(self.answers.index.requested_folders().values())
                file = stack.enter_context(open_regular_file(path, repr(path), folders))
                image = self._decoder.decode(read_bounded(file), path)
                stack.pop_all()  # keeps the file open
                return file, image
        raise RequestRefusedError("no_original", 404)

    def _render_view(self, path: str) -> tuple[bytes, str]:
        """Return a large view as JPEG, or else the thumbnail as WebP, with its media type.

        Raises:
            RequestRefusedError: If the index does not have the picture.
        """
        try:
            file, image = self._open_original(path)
        except RequestRefusedError:
            return self._load_thumbnail(path), "image/webp"
        file.close()
        image.save(view := io.BytesIO(), "JPEG", quality=VIEW_JPEG_QUALITY)
        return view.getvalue(), "image/jpeg"


def _parse_body(body: bytearray) -> tuple[Question, bytearray]:
    """Split a body into the question and the picture that follows it (may be empty).

    Raises:
        RequestRefusedError: If the first line is not valid JSON, or not a valid question.
    """
    line, _, upload = body.partition(b"\n")
    try:
        # `int` raises ValueError for NaN and Infinity, which Python accepts although JSON does not have them.
        values = json.loads(line, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise RequestRefusedError("bad_question") from error
    return Question.parse(values), upload


def _iter_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield a file in chunks, up to the size that it had when it was opened."""
    with file:
        while size > 0 and (chunk := file.read(min(DOWNLOAD_CHUNK_BYTES, size))):
            size -= len(chunk)
            yield chunk


def _path_parameter(request: Request) -> str:
    return request.query_params.get("path", "")


def _cached_response(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"Cache-Control": f"private, max-age={BROWSER_CACHE_S}"})


@cache
def _render_page(language: str, is_local: bool, credit: Credit | None) -> str:
    messages = load_page_messages(language)
    here, there = f"?lang={language}", f"?lang={messages['other']}"
    privacy = messages["privacy_here" if is_local else "privacy_there"]
    return render_page_html(messages, here=here, there=there, privacy=privacy, credit=credit)


def load_page_messages(language: str, is_static: bool = False) -> dict[str, Any]:
    """Load the texts of the page.

    Args:
        language: "pt" or "en".
        is_static: Return the texts of the page without a server (`hub_upload.space`): those of the section `static`
            replace those of the page with a server.

    Returns:
        Texts by key; `errors` holds the texts of errors by code.
    """
    messages = json.loads((PAGE_FOLDER / "words" / f"{language}.json").read_text(encoding="utf-8"))
    static_messages = messages.pop("static")
    if not is_static:
        return messages
    return messages | static_messages | {"errors": messages["errors"] | static_messages["errors"]}


def render_page_html(messages: dict[str, Any], is_static: bool = False, **values: object) -> str:
    """Render the HTML of the page.

    Args:
        messages: Texts of the page (`load_page_messages`).
        is_static: Render the page without a server.
        **values: Further variables of the template `page.html`: `here` and `there` (addresses of the page in this and
            in the other language), `privacy`, `credit`, and `model` for the page without a server.

    Returns:
        The HTML.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = environment.from_string((PAGE_FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.render({"t": messages, "is_static": is_static, "credit": None, **values})


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
