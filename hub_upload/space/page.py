"""Pieces of the page in HTML. Every text from a user or a data set is escaped here, pictures are in the page itself."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from hub_upload.space.collection import Credit
from hub_upload.space.index import Album, Hit

FOLDER = Path(__file__).parent
STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")
LICENCES = {  # identifier of the Hub -> name and address, of those that ask for a link
    "cc-by-4.0": ("CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/deed.pt-br"),
    "cc-by-sa-4.0": ("CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/deed.pt-br"),
    "cc0-1.0": ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/deed.pt-br"),
}


def escaped(text: str) -> str:
    """Text for HTML, for attributes too."""
    return html.escape(text, quote=True)


def decimal(value: float, digits: int = 3) -> str:
    """A number as it is written in Portuguese: "0,412", "−0,031"."""
    return f"{value:.{digits}f}".replace("-", "−").replace(".", ",")


def thousands(number: int) -> str:
    """A whole number as it is written in Portuguese: "1.575"."""
    return f"{number:,}".replace(",", ".")


def counted(number: int, one: str, many: str) -> str:
    """Such as "1 imagem", "1.575 imagens"."""
    return f"{thousands(number)} {one if number == 1 else many}"


def notice(text: str, kind: str = "erro") -> str:
    """A message instead of, or above, an answer; `kind` is "erro" or "aviso"."""
    return f'<p class="cap-notice cap-{kind}" role="alert">{escaped(text)}</p>'


def picture(album: Album, row: int, alt: str) -> str:
    """The thumbnail of a row, its bytes in the page itself."""
    data = base64.b64encode(album.thumbnail(row)).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{escaped(alt)}">'


def gallery(album: Album, hits: Sequence[Hit]) -> str:
    """Pictures that were found, best first, with title and score."""
    cards = []
    for rank, hit in enumerate(hits, 1):
        title = album.title(hit.row) or f"imagem {hit.row + 1}"
        cards.append(
            f'<li class="cap-card">{picture(album, hit.row, title)}<div class="cap-title">{escaped(title)}</div>'
            f'<div class="cap-score"><span class="cap-place">{rank}º</span>{bar(hit.score)}'
            f"<data>{decimal(hit.score)}</data></div></li>"
        )
    return f'<ol class="cap-gallery">{"".join(cards)}</ol>'


def ranking(lines: Sequence[tuple[str, float]], share: bool = False) -> str:
    """Texts with their scores, best first; `share` writes these in per cent."""
    rows = [
        f'<li><span class="cap-text">{escaped(text)}</span>{bar(score)}'
        f"<data>{decimal(100 * score, 1) + ' %' if share else decimal(score)}</data></li>"
        for text, score in lines
    ]
    return f'<ol class="cap-ranking">{"".join(rows)}</ol>'


def bar(score: float) -> str:
    """A score from 0 to 1 as the length of a bar; below 0 it is empty."""
    return f'<span class="cap-bar"><i style="width:{100 * min(max(score, 0.0), 1.0):.1f}%"></i></span>'


def answer(parts: Sequence[tuple[str, str]], above: str = "", below: str = "") -> str:
    """Answers of one model or of two side by side.

    Args:
        parts: (name of the model, its answer) of each.
        above: notices.
        below: what the numbers mean.
    """
    named = len(parts) > 1
    models = "".join(
        f'<div class="cap-model">{f"<h3>{escaped(name)}</h3>" if named else ""}{content}</div>'
        for name, content in parts
    )
    explained = f'<details class="cap-how"><summary>Como ler os números?</summary><p>{below}</p></details>'
    kind = "cap-two" if named else "cap-one"
    return (
        f'<div class="cap-answer {kind}" aria-live="polite">{above}<div class="cap-models">{models}</div>'
        f"{explained if below else ''}</div>"
    )


def head(limit: int) -> str:
    """Script of the page's head; `limit` is the most megabytes of an upload."""
    return f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8').replace('{limit}', str(limit))}</script>"


def header(names: Sequence[str], pictures: int, skipped: int) -> str:
    """Title, names of the models, how many images are searched and how many could not be read."""
    models = " e ".join(f"<b>{escaped(name)}</b>" for name in names)
    plural = "modelos" if len(names) > 1 else "modelo"
    bad = f" ({counted(skipped, 'arquivo ilegível ficou', 'arquivos ilegíveis ficaram')} de fora)" if skipped else ""
    return (
        '<header class="cap-header"><h1>CAPIVARA</h1>'
        "<p>Encontre e classifique imagens com palavras, em português.</p>"
        f'<p class="cap-facts">{counted(pictures, "imagem", "imagens")}{bad} · {plural}: {models}</p></header>'
    )


def footer(credit: Credit) -> str:
    """Whose pictures they are, and what happens to what a visitor gives."""
    parts = [f"Imagens: <b>{escaped(credit.name)}</b>"]
    if credit.licence:
        name, address = LICENCES.get(credit.licence, (credit.licence, ""))
        link = f'<a href="{address}" target="_blank" rel="noopener noreferrer">{escaped(name)}</a>' if address else ""
        parts.append(f"licença {link or escaped(name)}")
    text = ", ".join(parts) + "."
    if credit.attribution:
        text += f' <span lang="en">{escaped(credit.attribution)}.</span>'
    return (
        f'<footer class="cap-footer"><p>{text}</p><p>O que você digita e envia é processado só por este servidor; '
        "nada é mandado a outros serviços. O modelo aprendeu com textos e imagens da internet e pode repetir os "
        "preconceitos deles.</p></footer>"
    )
