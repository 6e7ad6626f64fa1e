"""Answers of the page: from the input of a visitor to HTML, refusals in Portuguese."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import PIL.Image
import torch

from capivara_search.common.image_files import IMAGE_FORMATS, BadImage, decode_image
from hub_upload.space import page
from hub_upload.space.index import Album, Index
from hub_upload.space.uploads import MAX_UPLOAD_BYTES
from modeling_capivara.embedder import CapivaraEmbedder
from modeling_capivara.processing_capivara import CONTEXT_LENGTH, repair_text

Decode = Callable[[bytes], PIL.Image.Image]
MAX_LETTERS = 2_000  # of a text; 77 tokens are at most some 400 letters, and the repair of a book takes minutes
MAX_LABELS, MIN_LABELS = 50, 2
COSINE = (
    "O número é a <b>similaridade de cosseno</b>: o modelo transforma textos e imagens em pontos de um mesmo espaço e "
    "mede se apontam para a mesma direção. Vai de −1 (opostos) a 1 (iguais). Cada modelo usa uma faixa própria de "
    "valores: o que importa é a <b>ordem</b>, e números de modelos diferentes não são comparáveis entre si."
)
SHARES = (
    "Cada rótulo é posto na frase-modelo e comparado com a imagem. A porcentagem reparte 100 % <b>entre os rótulos "
    "dados</b>: se nenhum servir, algum ganha assim mesmo. Rótulos claros e bem diferentes ajudam."
)


class Refusal(ValueError):
    """What a visitor gave can't be used; the message says why, in Portuguese."""


def _with_refusals(answer: Callable[..., str]) -> Callable[..., str]:
    """An answer whose refusal becomes a notice on the page."""

    @wraps(answer)
    def answered(*given: Any) -> str:
        try:
            return answer(*given)
        except Refusal as refusal:
            return page.notice(str(refusal))

    return answered


@dataclass(frozen=True)
class Demo:
    """All questions that the page asks.

    Attributes:
        indexes: one, or two of the same pictures with different models.
        decode: from the file of an upload to its image; raises BadImage.
    """

    indexes: list[Index]
    decode: Decode = lambda upload: decode_image({"bytes": upload, "path": None})

    @property
    def album(self) -> Album:
        """The pictures that all indexes share."""
        return self.indexes[0].album

    @_with_refusals
    def search_by_text(self, text: str, count: int) -> str:
        """Pictures for a text."""
        short, cut = _checked_text(text, self.indexes[0].embedder)
        return self._each(lambda index: page.gallery(self.album, index.search(index.embed_text(short), count)), cut)

    @_with_refusals
    def search_by_image(self, upload: bytes | None, count: int) -> str:
        """Pictures for a picture."""
        image = _checked_image(upload, self.decode)
        return self._each(lambda index: page.gallery(self.album, index.search(index.embed_image(image), count)))

    @_with_refusals
    def similar_captions(self, upload: bytes | None, count: int) -> str:
        """Captions of the collection for a picture."""
        image = _checked_image(upload, self.decode)
        if not self.album.distinct_captions:
            raise Refusal("Este acervo não tem legendas.")
        return self._each(lambda index: page.ranking(index.similar_captions(index.embed_image(image), count)))

    @_with_refusals
    def classify(self, upload: bytes | None, labels: str, template: str) -> str:
        """Shares of the visitor's labels for a picture."""
        image = _checked_image(upload, self.decode)
        names = _checked_labels(labels)
        prompts = [_checked_template(template).replace("{}", name) for name in names]

        def shares(index: Index) -> str:
            probabilities = index.classify(index.embed_image(image), prompts).tolist()
            lines = sorted(zip(names, probabilities, strict=True), key=lambda line: -line[1])
            return page.ranking(lines, share=True)

        return self._each(shares, below=SHARES)

    def random_picture(self) -> PIL.Image.Image:
        """A picture of the collection, for a visitor who has none at hand."""
        row = random.choice(self.indexes[0].rows).item()
        return decode_image({"bytes": self.album.thumbnail(row)})

    def _each(self, answer: Callable[[Index], str], cut: str = "", below: str = COSINE) -> str:
        """The answer of every model, side by side."""
        with torch.inference_mode():
            parts = [(index.embedder.name, answer(index)) for index in self.indexes]
        return page.answer(parts, page.notice(cut, "aviso") if cut else "", below)


def _checked_text(text: str | None, embedder: CapivaraEmbedder) -> tuple[str, str]:
    """A text that can be embedded, and a notice where only its beginning is read."""
    if not isinstance(text, str) or not text.strip():
        raise Refusal("Escreva o que você procura, por exemplo “um gato dormindo”.")
    short = repair_text(text[:MAX_LETTERS])
    if not short:
        raise Refusal("O texto só tem espaços ou sinais invisíveis. Escreva o que você procura.")
    tokens = len(embedder.processor.tokenizer(short, truncation=False, verbose=False)["input_ids"])
    if len(text) <= MAX_LETTERS and tokens <= CONTEXT_LENGTH:
        return short, ""
    return short, (
        f"O texto é longo demais: o modelo lê só os primeiros {CONTEXT_LENGTH} tokens (cerca de 50 palavras), e o "
        "resto foi ignorado. Frases curtas funcionam melhor."
    )


def _checked_image(upload: bytes | None, decode: Decode) -> PIL.Image.Image:
    """The picture of an upload, within the limits of `caption_data.rows`."""
    if not upload:
        raise Refusal("Envie uma imagem (de novo, se já faz tempo) ou sorteie uma do acervo.")
    if len(upload) > MAX_UPLOAD_BYTES:
        raise Refusal(f"O arquivo é grande demais: o limite é de {MAX_UPLOAD_BYTES // 1_000_000} MB.")
    try:
        return decode(upload)
    except BadImage as bad:
        if bad.reason == "absurd image size":
            raise Refusal("A imagem tem pixels demais, ou é uma tira fina demais. Envie uma versão menor.") from bad
        formats = ", ".join(IMAGE_FORMATS[:5])
        raise Refusal(
            f"Não foi possível ler este arquivo como imagem. Ele pode estar corrompido; use {formats} ou semelhante."
        ) from bad


def _checked_labels(labels: str | None) -> list[str]:
    """Labels, a line or comma each, without repetitions."""
    found = [repair_text(label) for label in re.split(r"[\n,;]", (labels or "")[: MAX_LETTERS * 2])]
    names = list(dict.fromkeys(name for name in found if name))
    if len(names) < MIN_LABELS:
        raise Refusal("Escreva pelo menos dois rótulos diferentes, um por linha ou separados por vírgulas.")
    if len(names) > MAX_LABELS:
        raise Refusal(f"São rótulos demais: {len(names)}. O limite é de {MAX_LABELS}.")
    return names


def _checked_template(template: str | None) -> str:
    text = repair_text((template or "").strip()[:MAX_LETTERS]) or "{}"
    if text.count("{}") != 1:
        raise Refusal("A frase-modelo precisa ter {} uma única vez, no lugar do rótulo: “uma imagem de {}”.")
    return text
