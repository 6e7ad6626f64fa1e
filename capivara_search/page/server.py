"""Serve the search page, on which a browser searches and classifies the pictures of an index.

Example:
    serve_index(PictureIndex.open("fotos.lance"))  # until Ctrl-C

By default, only this machine can reach the page. The server is a small Starlette application that sends static files
and JSON. `PageSite.routes` lists all of its URL paths.
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

import numpy as np
import PIL.Image
import uvicorn
from jinja2 import Environment, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from capivara_common.image_files import BadImage, open_regular_file_safe_from_link_swaps
from capivara_search.folder_scan import is_picture_name
from capivara_search.messages import make_error_from_code
from capivara_search.page import guard
from capivara_search.page.answers import PageAnswers, Question
from capivara_search.page.decoder import DecoderProcess
from capivara_search.picture_reading import read_bounded

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

PAGE_FOLDER = Path(__file__).parent
LANGUAGES = ("pt", "en")
DEFAULT_PORT = 7860
MODEL_LOAD_TIMEOUT_S = 600  # seconds to import torch and load the model; a slow machine needs minutes
SHUTDOWN_TIMEOUT_S = 3  # seconds in which open connections may finish their responses when the server ends
DOWNLOAD_CHUNK_BYTES = 2**18  # bytes of an original file that are read and sent at a time
VIEW_JPEG_QUALITY = 88  # JPEG quality (0 to 100) of the large view of a picture
# Seconds for which a browser may cache a picture. The URL of a picture in a result contains the modification time of
# its file. So the URL changes when the file changes, and the browser does not show an outdated picture.
BROWSER_CACHE_S = 3600


@dataclass(frozen=True)
class Credit:
    """Source and license of the pictures, shown on a page that is open to other people.

    Attributes:
        name: Name of the dataset.
        license: Identifier of the license, such as "cc-by-sa-4.0"; "" if the dataset states no license.
        attribution: Sentence that names the authors, if the license requires one; otherwise "".
    """

    name: str
    license: str = ""
    attribution: str = ""

    @property
    def license_url(self) -> str:
        """URL of the license text for Creative Commons licenses that require attribution; "" for other licenses."""
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
    """Serve the search page of an index until Ctrl-C. Pictures that are added to the index meanwhile appear, too.

    Args:
        index: Index that the page searches.
        host: Address that the server listens on. If it is not a loopback address, everybody on the network can open the
            page, without a password.
        port: Port of the page. If the default port is taken, a free port is used.
        open_browser: Whether to open the page in a browser of this machine.
        language: Default language of the page, "pt" or "en". The URL parameter `lang` overrides it.
        credit: Source and license of the pictures to show on the page.
        on_open: Function that is called with the URL of the page when the server has started.
        allow_hosts: Host names that are accepted in requests, in addition to those of `list_allowed_hosts`.

    Raises:
        OSError: If the server could not start, for example because the port is taken.
        ValueError: If the language or a host name is invalid, or the model does not match the index.
    """
    server, listening, url = create_page_server(index, host, port, language, credit, allow_hosts)
    # The server gets its own thread, because uvicorn starts an event loop. In a notebook, the current thread already
    # runs an event loop, and a thread can't run two.
    serving = threading.Thread(target=server.run, args=([listening],), daemon=True)
    serving.start()
    try:
        while not server.started:
            if not serving.is_alive():
                raise make_error_from_code(OSError, "no_start", url=url)
            time.sleep(0.01)
        if on_open is not None:
            on_open(url)
        if open_browser and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
            # Without a display, no browser is opened, because a text browser would take over this terminal. The call
            # runs in a thread, because with some browsers it returns only when the browser is closed.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        while serving.is_alive():
            serving.join(1)
    except KeyboardInterrupt:
        pass
    finally:
        server.should_exit = True
        serving.join(SHUTDOWN_TIMEOUT_S + 10)


def create_page_server(
    index: "PictureIndex", host: str, port: int, language: str, credit: Credit | None, allow_hosts: Sequence[str]
) -> tuple[uvicorn.Server, socket.socket, str]:
    """Create the server of the search page without running it.

    Args:
        index: Index that the page searches.
        host: Address that the server listens on.
        port: Port of the page. If the default port is taken, a free port is used.
        language: Default language of the page, "pt" or "en".
        credit: Source and license of the pictures to show on the page.
        allow_hosts: Host names that are accepted in requests, in addition to those of `list_allowed_hosts`.

    Returns:
        Tuple (server, socket, URL of the page). Pass the socket, which is bound to the port, to `server.run`.

    Raises:
        OSError: If the port is taken, or `host` is not an address of this machine.
        ValueError: If the language or a host name is invalid, or the model does not match the index.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}.")
    hosts = guard.list_allowed_hosts(host, allow_hosts)
    if len(index):
        # The result of this search is not used. The search raises an error if the model does not match the index, and
        # the user should see the error now instead of on the page.
        index.search_vector(np.ones(index.model.width, np.float32), k=1)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError:
        if port != DEFAULT_PORT:
            raise
        listening = socket.create_server((host, 0), family=family)
    name = f"[{host}]" if ":" in host else host
    site = PageSite(PageAnswers(index, is_loopback(host)), language, credit)
    middleware = Middleware(guard.RequestGuard, hosts=hosts, behind_proxy=not site.answers.is_local)
    config = uvicorn.Config(
        Starlette(routes=site.routes(), middleware=[middleware], lifespan=site.lifespan),
        http=guard.LimitedHttpProtocol, backlog=guard.BACKLOG, ws="none", lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        log_level="error", access_log=False,  # no line per request, because clients could fill the disk with log lines
        server_header=False, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config), listening, f"http://{name}:{listening.getsockname()[1]}"


class PageSite:
    """Routes (URL paths) of the search page, and the functions that answer the requests to each route.

    Args:
        answers: Object that computes the responses to POST requests.
        language: Default language of the page, "pt" or "en".
        credit: Source and license of the pictures, which are shown on the page; None to show no credit.
    """

    def __init__(self, answers: PageAnswers, language: str, credit: Credit | None):
        self.answers, self.language, self.credit = answers, language, credit
        self._decoder = DecoderProcess()
        self._question_queue, self._view_queue = guard.QuestionQueue(), guard.QuestionQueue()
        self._body_slots = asyncio.Semaphore(guard.MAX_LARGE_BODIES)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the model in the background when the server starts, and end the decoder process when the server ends.

        The decoder process is a child process that decodes pictures.

        Args:
            app: The application. It is not used, but Starlette passes it.
        """
        # The model is loaded in a separate queue. In the queue for questions, text queries would have to wait until
        # torch and the image encoder are loaded, although text queries need neither.
        loading = guard.QuestionQueue().ask(self.answers.prepare_images, MODEL_LOAD_TIMEOUT_S)
        self._loading_model = asyncio.create_task(loading)
        embedding = self._question_queue.ask(lambda: self.answers.index.model.embed_texts(["gato"]))
        embedding_text = asyncio.create_task(embedding)
        for task in (self._loading_model, embedding_text):
            # asyncio would log an exception that nobody has retrieved. It need not be handled here, because each
            # request that needs the model raises it again.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        yield
        self._loading_model.cancel()
        embedding_text.cancel()
        self._decoder.close()

    def routes(self) -> list[Route]:
        """Return all routes of the page: URL paths, each with the function that answers its requests.

        A request to any other path gets the status 404.
        """
        questions = ("search", "classify", "copies", "folders", "status")
        endpoints = {name: partial(self._answer, getattr(self.answers, name)) for name in questions}
        return [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=PAGE_FOLDER / "static")),
            *(Route(f"/api/{name}", endpoint, methods=["POST"]) for name, endpoint in endpoints.items()),
            Route("/thumbnail", self.thumbnail),
            Route("/picture", self.picture),
            Route("/download", self.download),
        ]

    async def page(self, request: Request) -> Response:
        """Return the HTML page in the language of the URL parameter `lang` (default: language of the server)."""
        language = request.query_params.get("lang", "")
        html = _render_page(language if language in LANGUAGES else self.language, self.answers.is_local, self.credit)
        return Response(html, media_type="text/html")

    async def _answer(self, ask: Callable[[Question, Any], dict[str, Any]], request: Request) -> Response:
        """Answer a POST request of the page.

        Args:
            ask: Function `(question, image)` that computes the response. The image is the decoded upload, or None.
            request: The request. Its body is a line of JSON, optionally followed by the bytes of an uploaded picture.

        Returns:
            The result of `ask` as a JSON response.

        Raises:
            RequestRefusedError: If the request is not allowed, its picture can't be decoded, or the server is busy.
        """
        async with guard.receive_request_body_within_limits(request, self._body_slots) as body:
            # The body is parsed in a thread, so that the event loop can answer other clients meanwhile.
            question, upload = await run_in_threadpool(_split_question_and_upload, body)
            image = await self._decode_upload(upload) if upload else None
            return JSONResponse(await self._question_queue.ask(lambda: ask(question, image)))

    async def _decode_upload(self, upload: bytearray) -> PIL.Image.Image:
        """Decode an uploaded picture and wait until the model is loaded.

        The picture is decoded in a separate queue, so that text queries do not wait for it.

        Args:
            upload: Content of the picture file.

        Returns:
            The picture as an RGB image.

        Raises:
            RequestRefusedError: If the picture can't be decoded, or the model is still being loaded.
        """
        try:
            image = await self._view_queue.ask(lambda: self._decoder.decode(upload))
        except BadImage as bad:
            code = "too_many_pixels" if bad.reason == "absurd image size" else "no_picture"
            raise guard.RequestRefusedError(code) from bad
        if not (await asyncio.wait([self._loading_model], timeout=guard.QUEUE_TIMEOUT_S))[0]:
            raise guard.RequestRefusedError("busy", 503)
        return image

    async def thumbnail(self, request: Request) -> Response:
        """Return the thumbnail of the picture whose path is the URL parameter `path`."""
        return _cached_response(await run_in_threadpool(self._load_thumbnail, _path_parameter(request)), "image/webp")

    async def picture(self, request: Request) -> Response:
        """Return a large version of the picture whose path is the URL parameter `path`.

        If the original file is missing or can't be shown, the thumbnail is returned instead.
        """
        return _cached_response(*await self._view_queue.ask(partial(self._render_view, _path_parameter(request))))

    async def download(self, request: Request) -> Response:
        """Return the original file of the picture whose path is the URL parameter `path`."""
        path = _path_parameter(request)
        file, _ = await self._view_queue.ask(lambda: self._open_original(path))
        file.seek(0)
        size, kind = os.fstat(file.fileno()).st_size, mimetypes.guess_type(path)[0] or "application/octet-stream"
        disposition = f"attachment; filename*=utf-8''{quote(Path(path).name, safe='')}"
        headers = {"Content-Disposition": disposition, "Content-Length": str(size)}
        return StreamingResponse(_iter_chunks(file, size), media_type=kind, headers=headers)

    # The next methods look up the path of a request in the index before they open any file. All unknown paths get the
    # same response, so that a client can't find out which files exist on this machine.

    def _load_thumbnail(self, path: str) -> bytes:
        """Return the thumbnail of a picture of the index.

        Args:
            path: Absolute path of the picture.

        Returns:
            Content of a WebP file.

        Raises:
            RequestRefusedError: If the picture is not in the index.
        """
        if path and (thumbnail := self.answers.index.thumbnail(path)):
            return thumbnail
        raise guard.RequestRefusedError("gone", 404)

    def _open_original(self, path: str) -> tuple[BinaryIO, PIL.Image.Image]:
        """Open and decode the file of a picture of the index. It must be in a folder that was added on this machine.

        Args:
            path: Absolute path of the picture.

        Returns:
            Tuple of the open file and the decoded picture.

        Raises:
            RequestRefusedError: If the index does not have the picture, or its file can't be shown.
        """
        if not path or self.answers.index.get_picture(path) is None:
            raise guard.RequestRefusedError("gone", 404)
        with contextlib.ExitStack() as stack, contextlib.suppress(BadImage, OSError, ValueError):
            if is_picture_name(path):
                # An index that comes from other people may contain the path of any file. So only folders that were
                # passed to `PictureIndex.add` on this machine are allowed. The open file is returned, because another
                # file may replace it at this path before the server sends it.
                folders = list(self.answers.index.requested_folders().values())
                file = stack.enter_context(open_regular_file_safe_from_link_swaps(path, repr(path), folders))
                image = self._decoder.decode(read_bounded(file), path)
                stack.pop_all()  # keeps the returned file open; otherwise the end of the `with` block would close it
                return file, image
        raise guard.RequestRefusedError("no_original", 404)

    def _render_view(self, path: str) -> tuple[bytes, str]:
        """Return a large view of a picture, or its thumbnail if the original file can't be shown.

        Args:
            path: Absolute path of the picture.

        Returns:
            Tuple of the file content and its media type: "image/jpeg" for the large view, "image/webp" for the
            thumbnail.

        Raises:
            RequestRefusedError: If the index does not have the picture.
        """
        try:
            file, image = self._open_original(path)
        except guard.RequestRefusedError:
            return self._load_thumbnail(path), "image/webp"
        file.close()
        image.save(view := io.BytesIO(), "JPEG", quality=VIEW_JPEG_QUALITY)
        return view.getvalue(), "image/jpeg"


def _split_question_and_upload(body: bytearray) -> tuple[Question, bytearray]:
    """Split the body of a POST request into a checked `Question` and the content of the uploaded picture.

    Args:
        body: A line of JSON, followed by the content of a picture file or by nothing.

    Returns:
        Tuple of the checked values and the content of the picture file. The content is empty if no picture was
        uploaded.

    Raises:
        RequestRefusedError: If the first line is not valid JSON, or not a valid question.
    """
    line, _, upload = body.partition(b"\n")
    try:
        # Python also accepts NaN and Infinity, which are not valid JSON. `parse_constant` is called for them, and `int`
        # then raises ValueError.
        values = json.loads(line, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise guard.RequestRefusedError("bad_question") from error
    return Question.parse(values), upload


def _iter_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the content of a file in chunks, and close the file at the end.

    Args:
        file: Open file.
        size: Maximum number of bytes. It is the size that the response has stated, even if the file grows meanwhile.

    Yields:
        Chunks of at most `DOWNLOAD_CHUNK_BYTES` bytes.
    """
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
    return render_page_template(messages, here=here, there=there, privacy=privacy, credit=credit)


def load_page_messages(language: str, is_static: bool = False) -> dict[str, Any]:
    """Load the texts that the search page shows, in one language.

    Args:
        language: "pt" or "en".
        is_static: True: texts for the page that works without a server (`hub_upload.space`). False: texts for the page
            with a server.

    Returns:
        Dictionary from key to text. Only the value of the key "errors" is a dictionary, from error code to text.
    """
    messages = json.loads((PAGE_FOLDER / "words" / f"{language}.json").read_text(encoding="utf-8"))
    static_messages = messages.pop("static")  # texts that replace others on the page without a server
    if not is_static:
        return messages
    return messages | static_messages | {"errors": messages["errors"] | static_messages["errors"]}


def render_page_template(messages: dict[str, Any], is_static: bool = False, **values: object) -> str:
    """Render the HTML of the search page.

    Args:
        messages: Texts of the page (`load_page_messages`).
        is_static: Whether the page works without a server.
        **values: Further variables of the template `page.html`:

            - `here` and `there`: URL of the page in the language of `messages`, and in the other language.
            - `privacy`: sentence about privacy.
            - `credit`: source of the pictures (`Credit`), or None.
            - `model`: only for the page without a server.

    Returns:
        HTML of the whole page.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = environment.from_string((PAGE_FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.render({"t": messages, "is_static": is_static, "credit": None, **values})


def is_loopback(host: str) -> bool:
    """Return whether a host name or address belongs to the loopback interface, which only this machine can reach.

    Args:
        host: Host name, IPv4 address or IPv6 address.

    Returns:
        True for "localhost" and for loopback addresses; False for all other names and addresses.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
