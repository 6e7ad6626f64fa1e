"""The page: search and classification of one's own pictures in a browser, served to this machine alone.

    serve_index(PictureIndex.open("fotos.lance"))  # until Ctrl-C

A small Starlette application of files and JSON: every route stands below, nothing else is answered.
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
MODEL_LOAD_TIMEOUT_S = 600  # for torch and the model, on a slow machine
SHUTDOWN_TIMEOUT_S = 3  # for open connections, when the page ends
DOWNLOAD_CHUNK_BYTES = 2**18  # of a file that is downloaded
VIEW_JPEG_QUALITY = 88  # of the JPEG of a large picture
BROWSER_CACHE_S = 3600  # by a browser, of a picture; its address changes with the file


@dataclass(frozen=True)
class Credit:
    """Whose pictures they are, as a page says that is open to others."""

    name: str  # of the data set
    license: str = ""  # identifier, such as "cc-by-sa-4.0"; "" where none is stated
    attribution: str = ""  # the sentence that the licence asks for; "" where it asks for none

    @property
    def license_url(self) -> str:
        """Address of a Creative Commons licence that asks to be linked to; "" of others."""
        known = re.fullmatch(r"cc-(by[a-z-]*)-(\d\.\d)", self.license, re.ASCII)
        return f"https://creativecommons.org/licenses/{known[1]}/{known[2]}/" if known else ""


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
    """Serve the page of an index, which may grow meanwhile, until Ctrl-C.

    Args:
        host: address of the page; any but that of this machine itself opens it, without a login, to a network.
        port: of the page. Where the default one is taken, a free one is.
        open_browser: whether the visitor's browser is opened.
        language: "pt" or "en"; `?lang=` in the address of the page chooses the other one.
        credit: whose pictures they are, for a page that is open to others.
        on_open: is called with the address when the page is open.
        allow_hosts: names that the page answers to, beside those of `allowed_hosts`.

    Raises:
        OSError: the port is taken, there is no such host, or the page did not open.
        ValueError: there is no such language, a name is none, or a model does not fit its index.
    """
    server, listening, url = create_page_server(index, host, port, language, credit, allow_hosts)
    serving = threading.Thread(target=server.run, args=([listening],), daemon=True)  # here a notebook's loop may run
    serving.start()
    try:
        while not server.started:
            if not serving.is_alive():
                raise localized_error(OSError, "no_start", url=url)
            time.sleep(0.01)
        if on_open is not None:
            on_open(url)
        if open_browser and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
            # Elsewhere it would be one that fills this terminal. Some return when they are closed.
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
    """What serves the page when it is run, the socket for it, and its address; arguments, errors: `serve_index`."""
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    hosts = list_allowed_hosts(host, allow_hosts)
    if len(index):
        index.search_vector(np.ones(index.model.width, np.float32), k=1)  # says now where the model does not fit
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
        http=LimitedHttpProtocol, backlog=BACKLOG, ws="none", lifespan="on", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        log_level="error", access_log=False,  # visitors could fill a log with warnings
        server_header=False, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config), listening, f"http://{name}:{listening.getsockname()[1]}"


class PageSite:
    """What is answered at each address."""

    def __init__(self, answers: PageAnswers, local: bool, language: str, credit: Credit | None):
        self.answers, self.is_local, self.language, self.credit = answers, local, language, credit
        self._decoder = DecoderProcess()
        self._question_queue, self._view_queue, self._body_slots = (
            QuestionQueue(),
            QuestionQueue(),
            asyncio.Semaphore(MAX_LARGE_BODIES),
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the model before it is asked; end the process for pictures."""
        # In no turn: words wait for neither torch nor the image tower, and a picture is not given up for them.
        self._loading_model = asyncio.create_task(
            QuestionQueue().ask(self.answers.prepare_images, MODEL_LOAD_TIMEOUT_S)
        )
        preparing = asyncio.create_task(
            self._question_queue.ask(lambda: self.answers.index.model.embed_texts(["gato"]))
        )
        for task in (self._loading_model, preparing):
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # each question says so
        yield
        self._loading_model.cancel()
        preparing.cancel()
        self._decoder.close()

    def routes(self) -> list[Route]:
        """All that is answered."""
        asked = {name: getattr(self.answers, name) for name in ("search", "classify", "copies", "folders")}
        asked["status"] = lambda question, _: self.answers.status(question) | {"local": self.is_local}
        return [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=PAGE_FOLDER / "static")),
            *(Route(f"/api/{name}", self._make_endpoint(ask), methods=["POST"]) for name, ask in asked.items()),
            Route("/thumbnail", self.thumbnail),
            Route("/picture", self.picture),
            Route("/download", self.download),
        ]

    async def page(self, request: Request) -> Response:
        """The page itself, in the language that its address names."""
        language = request.query_params.get("lang", "")
        html = _render_page(language if language in LANGUAGES else self.language, self.is_local, self.credit)
        return Response(html, media_type="text/html")

    def _make_endpoint(self, ask: Callable[[Question, Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            async with receive_body(request, self._body_slots) as body:
                question, upload = await run_in_threadpool(_parse_body, body)  # the loop answers others meanwhile
                image = await self._decode_upload(upload) if upload else None
                return JSONResponse(await self._question_queue.ask(lambda: ask(question, image)))

        return answer

    async def _decode_upload(self, upload: bytearray) -> PIL.Image.Image:
        """A picture of a visitor, in a turn of its own, for which no question of words waits. Raises Refusal."""
        try:
            image = await self._view_queue.ask(lambda: self._decoder.decode(upload))
        except BadImage as bad:
            raise RequestRefusedError("too_many_pixels" if bad.reason == "absurd image size" else "no_picture") from bad
        if not (await asyncio.wait([self._loading_model], timeout=QUEUE_TIMEOUT_S))[0]:
            raise RequestRefusedError("busy", 503)
        return image

    async def thumbnail(self, request: Request) -> Response:
        """The thumbnail of a row."""
        return _cached_response(await run_in_threadpool(self._load_thumbnail, _path_parameter(request)), "image/webp")

    async def picture(self, request: Request) -> Response:
        """A row's picture, large; its thumbnail where the file is not there, or can't be read."""
        return _cached_response(*await self._view_queue.ask(partial(self._render_view, _path_parameter(request))))

    async def download(self, request: Request) -> Response:
        """A row's file as it is."""
        path = _path_parameter(request)
        file, _ = await self._view_queue.ask(lambda: self._open_original(path))
        file.seek(0)
        size, kind = os.fstat(file.fileno()).st_size, mimetypes.guess_type(path)[0] or "application/octet-stream"
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(Path(path).name, safe='')}"}
        return StreamingResponse(
            _iter_chunks(file, size), media_type=kind, headers=headers | {"Content-Length": str(size)}
        )

    # Of the disk: every path is looked up first, and one that is no row gets one answer.

    def _load_thumbnail(self, path: str) -> bytes:
        """WebP. Raises Refusal where there is no such row."""
        if path and (found := self.answers.index.thumbnail(path)):
            return found
        raise RequestRefusedError("gone", 404)

    def _open_original(self, path: str) -> tuple[BinaryIO, PIL.Image.Image]:
        """The open file of a row, below a folder that `add` was told of on this machine, and its image.

        Raises Refusal where it can't be shown: what is decoded and what is sent are one open file.
        """
        if not path or self.answers.index.get_picture(path) is None:
            raise RequestRefusedError("gone", 404)
        with contextlib.ExitStack() as opened, contextlib.suppress(BadImage, OSError, ValueError):
            if is_picture_name(path):  # the rows of an index of others may name any file
                folders = list(self.answers.index.requested_folders().values())
                file = opened.enter_context(open_regular_file(path, repr(path), folders))
                image = self._decoder.decode(read_bounded(file), path)
                opened.pop_all()
                return file, image
        raise RequestRefusedError("no_original", 404)

    def _render_view(self, path: str) -> tuple[bytes, str]:
        """A JPEG, or WebP of the thumbnail, and its media type. Raises Refusal where there is no such row."""
        try:
            file, image = self._open_original(path)
        except RequestRefusedError:
            return self._load_thumbnail(path), "image/webp"
        file.close()
        image.save(view := io.BytesIO(), "JPEG", quality=VIEW_JPEG_QUALITY)
        return view.getvalue(), "image/jpeg"


def _parse_body(body: bytearray) -> tuple[Question, bytearray]:
    """A question, and the picture that came with it. Raises Refusal."""
    line, _, upload = body.partition(b"\n")
    try:
        values = json.loads(line, parse_constant=int)  # which raises ValueError for NaN and Infinity, that are no JSON
    except (ValueError, RecursionError) as error:
        raise RequestRefusedError("bad_question") from error
    return Question.parse(values), upload


def _iter_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """A file in parts, as long as it was when it was opened."""
    with file:
        while size > 0 and (chunk := file.read(min(DOWNLOAD_CHUNK_BYTES, size))):
            size -= len(chunk)
            yield chunk


def _path_parameter(request: Request) -> str:
    return request.query_params.get("path", "")


def _cached_response(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"Cache-Control": f"private, max-age={BROWSER_CACHE_S}"})


@cache
def _render_page(language: str, local: bool, credit: Credit | None) -> str:
    words = load_page_messages(language)
    here, there = (f"?lang={one}" for one in (language, words["other"]))
    privacy = words["privacy_here" if local else "privacy_there"]
    return render_page_html(words, here=here, there=there, privacy=privacy, credit=credit)


def load_page_messages(language: str, is_static: bool = False) -> dict[str, Any]:
    """What the page says, "pt" or "en", or, with `own`, that of `hub_upload.space`, which has no server."""
    words = json.loads((PAGE_FOLDER / "words" / f"{language}.json").read_text(encoding="utf-8"))
    ours = words.pop("own")
    return words | ours | {"errors": words["errors"] | ours["errors"]} if is_static else words


def render_page_html(messages: dict[str, Any], is_static: bool = False, **values: object) -> str:
    """The page in the words of a language, with a server or, `own`, without."""
    strict = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    strict.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = strict.from_string((PAGE_FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.render({"t": messages, "own": is_static, "credit": None, **values})


def is_loopback(host: str) -> bool:
    """Whether an address or name is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
