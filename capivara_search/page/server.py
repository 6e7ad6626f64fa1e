"""The page: search and classification of one's own pictures in a browser, served to this machine alone.

    serve_index(PictureIndex.open("fotos.lance"))  # until Ctrl-C

A small Starlette application of files and JSON: every route stands below, nothing else is answered.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
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
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from capivara_search.page.answers import Answers, Question, decoded
from capivara_search.page.decoder import Decoder
from capivara_search.page.guard import (
    BACKLOG,
    WAIT_S,
    Connection,
    Guard,
    Queue,
    Refusal,
    allowed_hosts,
    listening,
)
from capivara_search.page.original_files import OriginalFiles

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

FOLDER = Path(__file__).parent
LANGUAGES = ("pt", "en")
DEFAULT_PORT = 7860
START_S = 30  # for the server to listen
WARM_UP_S = 600  # for torch and the model, on a slow machine
ENDING_S = 3  # for open connections, when the page ends
CHUNK_BYTES = 2**18  # of a file that is downloaded
KEPT_S = 3600  # by a browser, of a picture; its address changes with the file
LICENCES = {  # identifier of the Hub -> name and address, of those that ask for a link
    "cc-by-4.0": ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "cc-by-sa-4.0": ("CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
    "cc0-1.0": ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
}
logger = logging.getLogger("capivara")


@dataclass(frozen=True)
class Credit:
    """Whose pictures they are, as a page says that is open to others."""

    name: str  # of the data set
    licence: str = ""  # identifier, such as "cc-by-sa-4.0"; "" where none is stated
    attribution: str = ""  # the sentence that the licence asks for; "" where it asks for none


class Page:
    """A page that is open at `url`; `close` ends it."""

    def __init__(self, app: Starlette, listening: socket.socket, url: str):
        config = uvicorn.Config(
            app, http=Connection, backlog=BACKLOG, ws="none", lifespan="on", timeout_graceful_shutdown=ENDING_S,
            log_level="error", access_log=False,  # visitors could fill a log with warnings
            server_header=False, proxy_headers=False,
        )  # fmt: skip
        self.url, self._server = url, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        started = time.monotonic()
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() - started > START_S:
                raise OSError(f"The page at {url} did not start.")
            time.sleep(0.01)

    def wait(self) -> None:
        """Return when the page has ended; Ctrl-C raises KeyboardInterrupt."""
        while self._thread.is_alive():
            self._thread.join(1)

    def close(self) -> None:
        """End the page."""
        self._server.should_exit = True
        self._thread.join(ENDING_S + 10)


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
        OSError: the port is taken, or there is no such host.
        ValueError: there is no such language, a name is none, or a model does not fit its index.
    """
    page = open_page(index, host, port, language, credit, allow_hosts)
    try:
        if on_open is not None:
            on_open(page.url)
        if open_browser and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
            webbrowser.open(page.url)  # elsewhere it would be one that fills this terminal
        page.wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close()


def open_page(
    index: "PictureIndex",
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    language: str = "pt",
    credit: Credit | None = None,
    allow_hosts: Sequence[str] = (),
) -> Page:
    """Open the page and return; arguments and errors are those of `serve_index`."""
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    hosts = allowed_hosts(host, allow_hosts)
    if len(index):
        index.search_vector(np.ones(index.model.width, np.float32), k=1)  # says now where the model does not fit
    try:
        taken = listening(host, port)
    except OSError:
        if port != DEFAULT_PORT:
            raise
        taken = listening(host, 0)
    site = Site(Answers(index), is_loopback(host), language, credit)
    app = Starlette(
        routes=site.routes(),
        middleware=[Middleware(Guard, hosts=hosts, behind_proxy=not site.local)],
        lifespan=site.lifespan,
    )
    name = f"[{host}]" if ":" in host else host
    return Page(app, taken, f"http://{name}:{taken.getsockname()[1]}")


class Site:
    """What is answered at each address."""

    def __init__(self, answers: Answers, local: bool, language: str, credit: Credit | None):
        self.answers, self.local, self.language, self.credit = answers, local, language, credit
        self._questions, self._views = Queue(), Queue()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Keep a process for pictures, and load the model before it is asked."""
        self._decoder = Decoder()
        self._files = OriginalFiles(self.answers.index, self._decoder)
        self._warming = asyncio.create_task(self._warm_up())
        preparing = asyncio.create_task(self._prepare())
        yield
        self._warming.cancel()
        preparing.cancel()
        self._decoder.close()

    async def _prepare(self) -> None:
        with contextlib.suppress(Exception):  # each question says so
            await self._questions.ask(lambda: self.answers.index.model.texts(["gato"]))

    async def _warm_up(self) -> None:
        """Import torch and load the image tower, in no turn: words wait for neither, and pictures are not given up."""
        try:
            await Queue().ask(self.answers.prepare_images, WARM_UP_S)
        except Refusal:
            pass
        except Exception:  # each question with a picture says so
            logger.exception("No pictures can be searched with.")

    def routes(self) -> list[Route]:
        """All that is answered."""
        asked = {name: getattr(self.answers, name) for name in ("search", "classify", "copies", "folders")}
        asked["status"] = lambda question, _: self.answers.status(question) | {"local": self.local}
        return [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
            *(Route(f"/api/{name}", self._asked(ask), methods=["POST"]) for name, ask in asked.items()),
            Route("/api/about", self.about, methods=["POST"]),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/thumbnail", self.thumbnail),
            Route("/picture", self.picture),
            Route("/download", self.download),
        ]

    async def page(self, request: Request) -> Response:
        """The page itself, in the language that its address names."""
        language = request.query_params.get("lang", "")
        html = _page(language if language in LANGUAGES else self.language, self.local, self.credit)
        return Response(html, media_type="text/html")

    def _asked(self, ask: Callable[[Question, Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            question, upload = await _read(request)
            image = None
            if upload:  # in another turn: one that takes long keeps no question of words waiting
                image = await self._views.ask(lambda: decoded(upload, self._decoder.image))
                if not (await asyncio.wait([self._warming], timeout=WAIT_S))[0]:
                    raise Refusal("busy", 503)
            return JSONResponse(await self._questions.ask(lambda: ask(question, image)))

        return answer

    async def about(self, request: Request) -> Response:
        """Whether the file of a picture is there."""
        question, _ = await _read(request)
        return JSONResponse({"original": await run_in_threadpool(self._files.is_there, question.like)})

    async def show(self, request: Request) -> Response:
        """Open the folder of a picture, for a visitor who sits at this machine, and only from the page itself."""
        if not self.local or "origin" not in request.headers:  # a foreign origin was refused before
            raise Refusal("not_here", 403)
        question, _ = await _read(request)
        await run_in_threadpool(self._files.show, question.like)
        return JSONResponse({})

    async def thumbnail(self, request: Request) -> Response:
        """The thumbnail of a row."""
        return _kept(await run_in_threadpool(self._files.thumbnail, _path(request)), "image/webp")

    async def picture(self, request: Request) -> Response:
        """A row's picture, large."""
        return _kept(*await self._views.ask(partial(self._files.view, _path(request))))

    async def download(self, request: Request) -> Response:
        """A row's file as it is."""
        path = _path(request)
        file, size, kind = await self._views.ask(lambda: self._files.file(path))
        name = quote(Path(path).name, safe="")
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{name}", "Content-Length": str(size)}
        return StreamingResponse(_chunks(file, size), media_type=kind, headers=headers)


async def _read(request: Request) -> tuple[Question, bytes]:
    """A question, and the picture that came with it. Raises Refusal."""
    line, _, upload = (await request.body()).partition(b"\n")
    try:
        values = json.loads(line, parse_constant=int)  # which raises ValueError for NaN and Infinity, that are no JSON
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_question") from error
    return Question.read(values), upload


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """A file in parts, as long as it was when it was opened."""
    with file:
        while size > 0 and (chunk := file.read(min(CHUNK_BYTES, size))):
            size -= len(chunk)
            yield chunk


def _path(request: Request) -> str:
    return request.query_params.get("path", "")


def _kept(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"Cache-Control": f"private, max-age={KEPT_S}"})


@cache
def _page(language: str, local: bool, credit: Credit | None) -> str:
    words = words_of(language)
    licence = LICENCES.get(credit.licence, (credit.licence, "")) if credit else None
    here, there = (f"?lang={one}" for one in (language, words["other"]))
    privacy = words["privacy_here" if local else "privacy_there"]
    return page_html(words, own=False, here=here, there=there, privacy=privacy, credit=credit, licence=licence)


def words_of(language: str) -> dict[str, Any]:
    """What the page says, "pt" or "en"."""
    return json.loads((FOLDER / "words" / f"{language}.json").read_text(encoding="utf-8"))


def page_html(words: dict[str, Any], own: bool, **values: object) -> str:
    """The page in the words of a language, or, with `own`, that of `hub_upload.space`, which has no server."""
    strict = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    strict.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = strict.from_string((FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.render({"t": words, "own": own, "credit": None, **values})


def is_loopback(host: str) -> bool:
    """Whether an address or name is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
