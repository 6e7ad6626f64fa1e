"""The page itself: gradio's components in Portuguese, wired to `Demo`, and a server that stays on this machine."""

import asyncio
import atexit
import contextlib
import dataclasses
import ipaddress
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import gradio as gr
import PIL.Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hub_upload.space import page
from hub_upload.space.answers import MAX_LABELS, Demo, Refusal
from hub_upload.space.decoder import Decoder
from hub_upload.space.guard import Guard
from hub_upload.space.turns import Turns
from hub_upload.space.uploads import MAX_UPLOAD_BYTES, Uploads

RESULTS = (6, 12, 24, 48)  # pictures that are shown; the second number at first
TIDY_EVERY_S = 60
THREADS = 8  # of gradio, for small work: 40, as it has, cost memory at 200 visitors at once
SESSIONS_KEPT = 8  # by gradio, each with its last answers, some hundred kB; the page needs none of them
QUERIES = ["gato", "um gato sorrindo", "bicicleta", "um dia de chuva", "pizza", "alguém jogando bola"]
LABELS = "gato\ncachorro\npássaro\ncomida\nmeio de transporte\npessoa"
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]
# Without gradio's queue: it keeps a part of every session for ever, and the answers that nobody fetches
EVENT = {"queue": False, "api_visibility": "private", "show_progress": "minimal"}
EMPTY = '<p class="cap-empty">Os resultados aparecem aqui.</p>'


def theme() -> gr.themes.Base:
    """Green of the grass, plain labels, the fonts of the visitor's system: nothing is fetched."""
    plain = {"background_fill": "transparent", "text_color": "*body_text_color", "padding": "0", "text_weight": "600"}
    titles = {f"block_title_{name}": value for name, value in plain.items()}
    titles |= {"block_title_text_color_dark": "*body_text_color", "block_title_background_fill_dark": "transparent"}
    return gr.themes.Soft(
        primary_hue="emerald", secondary_hue="emerald", neutral_hue="stone", font=SYSTEM_FONTS, font_mono=MONO_FONTS
    ).set(
        **titles,
        block_label_background_fill="*background_fill_primary",
        block_label_text_color="*body_text_color_subdued",
        button_primary_background_fill="*primary_700",  # white text on it has a contrast of 5.5, on gradio's 500 of 2.5
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_border_color="*primary_700",
        button_large_text_size="*text_md",
        button_large_padding="*spacing_md *spacing_sm",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        body_text_color_subdued="*neutral_500",
        input_border_color="*neutral_300",
        input_border_width="1px",
        block_border_width="1px",
    )


class InTurn:
    """Questions of the page to a `Demo`, one after another, with uploads by their paths."""

    def __init__(self, demo: Demo, uploads: Uploads):
        self.demo, self._read, self._turns = demo, uploads.read, Turns()

    def handler(self, question: Callable[..., str], of_picture: bool = True) -> Callable[..., Awaitable[str]]:
        """The event handler for a question of the demo, whose first value is the path of an upload, or a text."""

        async def answered(given: str | None, *more: Any) -> str:
            try:
                return await self._turns.ask(lambda: question(self._read(given) if of_picture else given, *more))
            except Refusal as refusal:  # as a part of the page: it shows no message of an error without gradio's queue
                return page.notice(str(refusal))

        answered.__name__ = question.__name__  # by which gradio calls the event
        return answered

    async def random_picture(self) -> PIL.Image.Image | None:
        """A picture of the collection; None where too many questions wait."""
        with contextlib.suppress(Refusal):  # the question that follows says the same
            return await self._turns.ask(self.demo.random_picture)


def build_page(demo: Demo, uploads: Uploads) -> gr.Blocks:
    """All tabs; that of the captions only where the pictures have some."""
    album, asked = demo.album, InTurn(demo, uploads)
    names = [index.embedder.name for index in demo.indexes]
    with gr.Blocks(title="CAPIVARA: busca de imagens em português", analytics_enabled=False) as blocks:
        gr.HTML(page.header(names, len(album.captions) - len(album.skipped), len(album.skipped)))
        with gr.Tabs(overflow_behavior="wrap"):  # on a phone, gradio's other way hides them in a menu
            with gr.Tab("Buscar por texto"):
                _text_tab(asked)
            with gr.Tab("Buscar por imagem"):
                count = _count("Quantas imagens mostrar", render=False)
                _picture_tab(asked, demo.search_by_image, "Buscar", "cap-image", [count])
            with gr.Tab("Classificar"):
                _picture_tab(asked, demo.classify, "Classificar", "cap-label", _label_boxes())
            if album.distinct_captions:
                with gr.Tab("Legendas parecidas"):
                    count = _count("Quantas legendas mostrar", render=False)
                    _picture_tab(asked, demo.similar_captions, "Achar legendas", "cap-caption", [count])
        gr.HTML(page.footer(album.credit))
    return blocks.queue(api_open=False)


def serve(demo: Demo, host: str, port: int) -> gr.Blocks:
    """Open the page on `host` and `port`; `block_thread` of the result waits for Ctrl-C.

    Raises:
        OSError: the port is taken.
    """
    temporary = os.environ.get("GRADIO_TEMP_DIR")  # gradio's own is shared by all pages of a machine
    if temporary:
        os.makedirs(temporary, exist_ok=True)
    uploads, decoder = Uploads(Path(tempfile.mkdtemp(prefix="capivara-page-", dir=temporary))), Decoder()
    guards = [Middleware(Guard, uploads, lambda *asked: _fits(blocks, *asked), behind_proxy=not is_loopback(host))]
    if is_loopback(host):  # a page of another name that resolves to this machine must not read the pictures
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host]))

    def close() -> None:
        atexit.unregister(close)
        decoder.close()
        shutil.rmtree(uploads.folder, ignore_errors=True)
        os.environ.pop("GRADIO_TEMP_DIR")
        if temporary:
            os.environ["GRADIO_TEMP_DIR"] = temporary

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # gradio puts its own middleware, which answers preflights of any origin, before that of `app_kwargs`
        app.user_middleware[:0] = guards
        app.middleware_stack = app.build_middleware_stack()
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        tidying = asyncio.create_task(_tidy(uploads, blocks))
        yield
        tidying.cancel()
        close()

    # The end of the server calls `close`; one that a second signal or an open connection cuts short does not.
    atexit.register(close)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)  # read while the page is built, and at every question
    try:
        blocks = build_page(dataclasses.replace(demo, decode=decoder), uploads)
        _launch(blocks, host, port, {"lifespan": lifespan, "docs_url": None, "redoc_url": None, "openapi_url": None})
    except BaseException:
        close()
        raise
    return blocks


def _fits(blocks: gr.Blocks, number: int, values: list) -> bool:
    """Whether the page has a question of this number, with such values."""
    inputs = blocks.fns[number].inputs if number in blocks.fns else None
    return inputs is not None and len(inputs) == len(values) and all(map(_sends, inputs, values))


def _sends(block: gr.components.Component, value: object) -> bool:
    """Whether this part of the page sends such values. The guard has made all objects uploads, or empty."""
    match block:
        case gr.Textbox():
            return value is None or isinstance(value, str)
        case gr.Image():
            return value is None or (isinstance(value, dict) and "data" not in value)
        case gr.Radio():
            return type(value) is int and value in RESULTS
        case gr.Dataset():  # the examples
            return type(value) is int and 0 <= value < len(block.samples)
    return False


def _launch(blocks: gr.Blocks, host: str, port: int, app_kwargs: dict[str, Any]) -> None:
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_threads=THREADS,
        state_session_capacity=SESSIONS_KEPT,
        max_file_size=MAX_UPLOAD_BYTES,
        enable_monitoring=False,
        strict_cors=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=page.STYLE,
        head=page.head(MAX_UPLOAD_BYTES // 1_000_000),
        app_kwargs=app_kwargs,
    )


async def _tidy(uploads: Uploads, blocks: gr.Blocks) -> None:
    while True:
        await asyncio.sleep(TIDY_EVERY_S)
        await asyncio.to_thread(uploads.tidy)
        for known in blocks.temp_file_sets:  # gradio's own notes of files to remove; they only grow
            known.clear()


def _text_tab(asked: InTurn) -> None:
    with gr.Row(elem_classes="cap-ask"):
        text = gr.Textbox(
            label="O que você procura?",
            placeholder="Por exemplo: um gato dormindo",
            lines=1,
            max_lines=4,
            scale=5,
            min_width=220,
            elem_id="cap-query",
        )
        button = gr.Button("Buscar", variant="primary", scale=1, min_width=110, elem_id="cap-search")
    gr.Examples(
        [[query] for query in QUERIES], text, label="Experimente", cache_examples=False, api_visibility="private"
    )
    count = _count("Quantas imagens mostrar")
    result = gr.HTML(EMPTY, elem_id="cap-text-result")
    answer = asked.handler(asked.demo.search_by_text, of_picture=False)
    gr.on([button.click, text.submit], answer, [text, count], result, **EVENT)


def _picture_tab(
    asked: InTurn, question: Callable[..., str], action: str, name: str, more: list[gr.components.Component]
) -> None:
    """A tab that asks about a picture, when one is given or drawn, or the button is pressed.

    Args:
        asked: takes the questions.
        question: method of the demo.
        action: label of the button.
        name: start of the elements' ids.
        more: further inputs of the question, not rendered yet.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            upload = gr.Image(
                label="Sua imagem",
                sources=["upload", "clipboard"],
                type="filepath",
                image_mode=None,
                format="png",
                height=260,
                placeholder="Solte uma imagem aqui\nou toque para escolher",
                buttons=[],
                elem_id=f"{name}-upload",
            )
            upload.preprocess = lambda given: given and given.path  # gradio's own decodes with PIL, without our limits
            with gr.Row():
                random = gr.Button("Sortear imagem", min_width=120, elem_id=f"{name}-random")
                button = gr.Button(action, variant="primary", min_width=140, elem_id=f"{name}-ask")
            for component in more:
                component.render()
        with gr.Column(scale=2, min_width=320):
            result = gr.HTML(EMPTY, elem_id=f"{name}-result")
    inputs, answer = [upload, *more], asked.handler(question)
    gr.on([upload.upload, button.click], answer, inputs, result, **EVENT)
    random.click(asked.random_picture, None, upload, **EVENT).then(answer, inputs, result, **EVENT)
    upload.clear(lambda: EMPTY, None, result, **EVENT)


def _label_boxes() -> list[gr.components.Component]:
    labels, template = f"Um por linha, de 2 a {MAX_LABELS}.", "Cada rótulo entra no lugar de {}."
    return [
        gr.Textbox(LABELS, label="Seus rótulos", info=labels, lines=5, elem_id="cap-labels", render=False),
        gr.Textbox("uma imagem de {}", label="Frase-modelo", info=template, elem_id="cap-template", render=False),
    ]


def _count(label: str, render: bool = True) -> gr.Radio:
    return gr.Radio(list(RESULTS), value=RESULTS[1], label=label, elem_classes="cap-count", render=render)


def is_loopback(host: str) -> bool:
    """Whether an address or name is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
