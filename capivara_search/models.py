"""The model of an index: found, fetched once, and quick to answer a text.

Any model of two towers that `capivara_common.hub_cache` takes; one of open_clip is converted when it is fetched.
Nothing heavy is imported before it is needed.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capivara_common.files import read_json
from capivara_common.hub_cache import Converter, cached_folder, is_reachable, model_folder
from capivara_common.image_side_digest import image_side_digest, image_steps
from capivara_common.weight_file import WeightFile, weight_files
from capivara_search.model_files.checks_capivara import check_sizes
from capivara_search.model_files.text_repair_capivara import checked_texts
from capivara_search.text_tower import SIGLIP_DEFAULTS, TextTower, open_text_tower
from capivara_search.words import Words, failure, note

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

DEFAULT_MODEL = "hiaac-nlp/CAPIVARA"
MINIATURE = "miniature"  # as the name of a model
MODEL_VARIABLE = "CAPIVARA_MODEL"  # of the environment; what None stands for
MANY_TEXTS = 256  # from here on the import of torch pays


@dataclass
class SearchModel:
    """A model of two towers on this machine.

    Attributes:
        name: for people: the Hub id, or the folder's own name.
        source: what it was asked for by, and can be found by again.
        folder: that holds it.
        note: what has to be said of it, a line in English and one in Portuguese; None where there is nothing.
        device: "cpu", "cuda", …; the GPU where there is one, for images, where None.
    """

    name: str
    source: str
    folder: Path
    note: str | None = None
    device: str | None = None

    def note_in(self, language: str) -> str | None:
        """The line of `note` in a language, "en" or "pt"."""
        return self.note and self.note.splitlines()[language == "pt"]

    @cached_property
    def image_digest(self) -> str:
        """Hex digest of all that the embeddings of images depend on; models that share it can share them."""
        return image_side_digest(self.folder)

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        path = self.folder / "config.json"
        if self._kind != "siglip":
            return _size(path, "projection_dim")
        text = SIGLIP_DEFAULTS | read_json(path, text_config=dict)["text_config"]
        return _size(path, "text_config", "projection_size", default=text["hidden_size"])

    @cached_property
    def side(self) -> int:
        """Pixels a side of what the image tower sees. Raises ValueError where the processor is another model's."""
        if self._kind == "capivara":  # a tower of timm has no size of its own
            return _size(self.folder / "processor_config.json", "image_processor", "crop_size", "height")
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            path = self.folder / name
            processor = read_json(path).get("processor_class") if path.is_file() else None
            if isinstance(processor, str) and processor.startswith("Siglip") != (self._kind == "siglip"):
                values = {"folder": self.folder, "processor": processor, "model": self._kind}
                raise failure(ValueError, "other_processor", **values)
        side = _size(self.folder / "config.json", "vision_config", "image_size", default=224)
        given = self._steps["crop_size" if self._steps["do_center_crop"] else "size"]
        if given != {"height": side, "width": side}:
            raise failure(ValueError, "other_size", folder=self.folder, given=given, side=side)
        return side

    @cached_property
    def squash(self) -> int | None:
        """PIL's filter that brings pictures of any shape to a square, as SigLIP sees them; None where they are cut."""
        return self._steps["resample"] if "height" in (self._steps["size"] or {}) else None

    @cached_property
    def _steps(self) -> dict[str, Any]:
        return image_steps(self.folder)

    @cached_property
    def _kind(self) -> str:
        return read_json(self.folder / "config.json", model_type=str)["model_type"]

    @cached_property
    def logit_scale(self) -> float:
        """What multiplies the cosines before a softmax, or SigLIP's sigmoid."""
        if (scale := self._number("logit_scale")) is None:
            raise ValueError(f"The weights of {self.folder} hold no logit_scale.")
        return math.exp(scale)

    @cached_property
    def logit_bias(self) -> float | None:
        """What SigLIP's sigmoid adds to the scaled cosines; None of a model that was trained by a softmax."""
        return self._number("logit_bias")

    def _number(self, name: str) -> float | None:
        """A weight that is one number; None where there is none of that name. Raises ValueError."""
        for path in weight_files(self.folder):
            weights = WeightFile(path)
            if name in weights.places:
                found = weights.array(name)
                if found.size != 1:
                    raise ValueError(f"{name} of {path} must be one number, it has {found.size}.")
                check_sizes({name: found.item()}, f"{path}: ")
                return found.item()
        return None

    def on_own_scale(self, cosines: np.ndarray) -> np.ndarray:
        """Cosines of texts with pictures as the model was trained to mean them, in their shape and order.

        Of SigLIP's kind: how probable it is that the two belong together, 0 to 1. Of others, the cosines themselves: a
        softmax says nothing of one pair.
        """
        if self.logit_bias is None:
            return cosines
        return np.exp(-np.logaddexp(0, -(self.logit_scale * cosines + self.logit_bias)))  # the sigmoid

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, in their order: (texts, width), float32, unit length.

        Few texts are answered without torch where the model's shape allows; see `text_tower.py`. Raises ValueError: a
        text is not a string, or there is none; the model is damaged.
        """
        texts = checked_texts(list(texts))
        if self._kind != "capivara":  # which repairs its texts by itself
            texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a character stops a tokenizer
        if "_loaded" not in self.__dict__ and len(texts) <= MANY_TEXTS and self._text_tower is not None:
            return self._text_tower.embed(texts)
        from modeling_capivara.two_towers import embed_texts

        return embed_texts(*self._loaded, texts).numpy()

    def images(self, images: Sequence["Image.Image"], batch_size: int = 32) -> np.ndarray:
        """Embeddings of PIL images, in their order: (images, width), float32, unit length.

        The first call imports torch and loads the model. Raises ValueError: the model can't be loaded, or there is no
        such device.
        """
        if not len(images):
            return np.empty((0, self.width), np.float32)
        model, processor = self._loaded
        from modeling_capivara.two_towers import embed_images

        return embed_images(model, processor, images, batch_size).numpy()

    def prepare_images(self) -> None:
        """Import torch and load the model, as the first images would. Raises ValueError as `images`."""
        _ = self._loaded

    @cached_property
    def _text_tower(self) -> TextTower | None:
        return open_text_tower(self.folder)

    @cached_property
    def _loaded(self) -> tuple["PreTrainedModel", "ProcessorMixin"]:
        note("loading" if "torch" in sys.modules else "loading_torch", self.name)  # whose import takes seconds
        from capivara_common.environment import torch_device
        from capivara_common.progress import no_bars_of_transformers
        from modeling_capivara.loading import load_model, load_processor

        device = torch_device(self.device)
        try:
            with no_bars_of_transformers():
                return load_model(self.folder).eval().to(device), load_processor(self.folder)
        except ValueError as error:
            if hasattr(error, "code"):
                raise
            raise failure(ValueError, "unusable_model", model=self.name, reason=error) from error


def find_model(model: str | None = None, device: str | None = None) -> SearchModel:
    """A model for search, by its name; it is fetched and converted where that has not been done before.

    Args:
        model: folder or Hub id of a model of two towers (`hub_cache.TAKEN`), or of one of open_clip with an XLM-RoBERTa
            text tower; "miniature". Where None: what `CAPIVARA_MODEL` of the environment says, else `DEFAULT_MODEL`
            where it is in the cache or the Hub can be reached, else the miniature.
        device: of the images' side, such as "cuda"; the GPU where there is one.

    Raises ValueError: there is no such model, or it is of another kind; the Hub can't be reached. ImportError: a
    package that the miniature is made of is not installed. OSError: no space is left for it.
    """
    model = model or os.environ.get(MODEL_VARIABLE) or None
    if model is None:
        model = DEFAULT_MODEL if cached_folder(DEFAULT_MODEL) or is_reachable(DEFAULT_MODEL) else MINIATURE
    if model == MINIATURE and not Path(model).exists():
        from capivara_search.miniature import miniature_folder

        lines = (Words(language)("miniature") for language in ("en", "pt"))
        return SearchModel(MINIATURE, MINIATURE, miniature_folder(), "\n".join(lines), device)
    folder = model_folder(model, CONVERTER)
    here = Path(model).expanduser()
    if here.exists():
        return SearchModel(here.resolve().name, str(here.resolve()), folder, None, device)
    return SearchModel(model, model, folder, None, device)


def _size(path: Path, *fields: str, default: int | None = None) -> int:
    """A number of a JSON file of the model, by the names of the fields that lead to it. Raises ValueError."""
    value: Any = read_json(path, **{fields[0]: dict if fields[1:] else int})
    check_sizes(value, f"{path}: ")
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{'.'.join(fields)} of {path} must be a whole number from 1, got {str(value)[:80]}.")
    return value


def _convert(source: str, folder: Path, revision: str | None) -> str:
    from modeling_capivara.convert_open_clip import CONVERTER as converter

    return converter.convert(source, folder, revision)


def _explain(folder: str) -> None:
    from modeling_capivara.convert_open_clip import CONVERTER as converter

    converter.explain(folder)


CONVERTER = Converter(_convert, _explain)  # which imports torch only where something is converted
