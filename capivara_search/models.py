"""The model of an index: found, fetched once, and quick to answer a text.

Any model of two towers that `capivara_common.hub_cache` takes; one of open_clip is converted when it is fetched.
Nothing heavy is imported before it is needed: texts are embedded by NumPy, as `CapivaraModel` with XLM-RoBERTa and
SigLIP embed them to 1e-5, without torch and transformers, whose imports alone take longer than a search may.
"""

import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from capivara_common.files import read_json
from capivara_common.hub_cache import find_cached_model, is_reachable, resolve_model_folder
from capivara_common.image_encoder_digest import image_encoder_digest, image_processor_settings
from capivara_common.weight_file import WeightFile, read_scalar
from capivara_search.messages import Messages, localized_error, log_message
from capivara_search.model_files.checks_capivara import NOT_FINITE, check_sizes, wrap_tokenizer_errors
from capivara_search.model_files.text_cleaning_capivara import CONTEXT_LENGTH, check_texts, clean_text

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

DEFAULT_MODEL = "hiaac-nlp/CAPIVARA"
MINIATURE_NAME = "miniature"  # as the name of a model
MIN_TORCH_TEXTS = 256  # from here on the import of torch pays
TEXTS_PER_BATCH = 8  # a batch a thread; with threads within its products, they wait for each other on a busy machine
WEIGHT_DTYPES = {"F32", "F16", "BF16"}  # of weights
EMBEDDINGS_PREFIX = "text_model.embeddings."


@dataclass
class SearchModel:
    """A model of two towers on this machine.

    Attributes:
        name: for people: the Hub id, or the folder's own name.
        source: what it was asked for by, and can be found by again.
        folder: that holds it.
        device: "cpu", "cuda", …; the GPU where there is one, for images, where None.
    """

    name: str
    source: str
    folder: Path
    device: str | None = None

    def get_notice(self, language: str) -> str | None:
        """What has to be said of it, a line in "en" or "pt"; None where there is nothing."""
        return Messages(language)("miniature") if self.source == MINIATURE_NAME else None

    @cached_property
    def image_digest(self) -> str:
        """Hex digest of all that the embeddings of images depend on; models that share it can share them."""
        with wrap_model_errors(self.name):
            return image_encoder_digest(self.folder)

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        if self._model_type != "siglip":
            return self._check_size("projection_dim", self._model_config.get("projection_dim"))
        text = SiglipTextTower.CONFIG_DEFAULTS | (self._model_config.get("text_config") or {})
        return self._check_size("projection_size", text.get("projection_size", text["hidden_size"]))

    @cached_property
    def image_size(self) -> int:
        """Pixels a side of what the image tower sees. Raises ValueError where the processor is another model's."""
        if self._model_type == "capivara":  # a tower of timm has no size of its own
            return self._check_size("crop_size", (self._processor_settings["crop_size"] or {}).get("height"))
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            path = self.folder / name
            processor = read_json(path).get("processor_class") if path.is_file() else None
            if isinstance(processor, str) and processor.startswith("Siglip") != (self._model_type == "siglip"):
                values = {"folder": self.folder, "processor": processor, "model": self._model_type}
                raise localized_error(ValueError, "other_processor", **values)
        side = self._check_size("image_size", (self._model_config.get("vision_config") or {}).get("image_size", 224))
        given = self._processor_settings["crop_size" if self._processor_settings["do_center_crop"] else "size"]
        if given != {"height": side, "width": side}:
            raise localized_error(ValueError, "other_size", folder=self.folder, given=given, side=side)
        return side

    def _check_size(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            fault = f"{name} must be a whole number from 1, got {value!s:.80}"
            raise localized_error(ValueError, "unusable_model", model=self.folder, reason=fault)
        return value

    @cached_property
    def resize_filter(self) -> int | None:
        """PIL's filter that brings pictures of any shape to a square, as SigLIP sees them; None where they are cut."""
        return self._processor_settings["resample"] if "height" in (self._processor_settings["size"] or {}) else None

    @cached_property
    def _processor_settings(self) -> dict[str, Any]:
        with wrap_model_errors(self.name):
            return image_processor_settings(self.folder)

    @cached_property
    def _model_config(self) -> dict[str, Any]:
        with wrap_model_errors(self.name):
            config = read_json(self.folder / "config.json", model_type=str)
            check_sizes(config, f"{self.folder}/config.json: ")
            return config

    @property
    def _model_type(self) -> str:
        return self._model_config["model_type"]

    @cached_property
    def logit_scale(self) -> float:
        """What multiplies the cosines before a softmax, or SigLIP's sigmoid."""
        return math.exp(self._read_scalar("logit_scale"))

    @cached_property
    def logit_bias(self) -> float | None:
        """What SigLIP's sigmoid adds to the scaled cosines; None of a model that was trained by a softmax."""
        return self._read_scalar("logit_bias")

    def _read_scalar(self, name: str) -> float | None:
        """A weight that is one number; None where there is none of that name. Raises ValueError."""
        with wrap_model_errors(self.name):
            if (number := read_scalar(self.folder, name)) is not None:
                check_sizes({name: number}, f"{self.folder}: ")
            return number

    def scale_scores(self, cosines: np.ndarray) -> np.ndarray:
        """Cosines of texts with pictures; of SigLIP's kind how probable it is that the two belong together, 0 to 1."""
        if self.logit_bias is None:
            return cosines
        return np.exp(-np.logaddexp(0, -(self.logit_scale * cosines + self.logit_bias)))  # the sigmoid

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, in their order: (texts, width), float32, unit length.

        Raises ValueError: a text is not a string, or there is none; the model is damaged.
        """
        texts = check_texts(list(texts))
        if self._model_type != "capivara":  # which repairs its texts by itself
            texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a character stops a tokenizer
        with wrap_model_errors(self.name):
            if "_loaded" not in self.__dict__ and len(texts) <= MIN_TORCH_TEXTS and self._text_tower is not None:
                return self._text_tower.embed(texts)
        loaded = self._loaded
        from modeling_capivara.two_towers import embed_texts

        with wrap_model_errors(self.name):
            return embed_texts(*loaded, texts).numpy()

    def embed_images(self, images: Sequence["Image.Image"], batch_size: int = 32) -> np.ndarray:
        """Embeddings of PIL images, in their order: (images, width), float32, unit length.

        Raises ValueError: the model can't be loaded, its embeddings are not finite, or there is no such device.
        """
        if not len(images):
            return np.empty((0, self.width), np.float32)
        model, processor = self._loaded
        from modeling_capivara.two_towers import embed_images

        with wrap_model_errors(self.name):
            return embed_images(model, processor, images, batch_size).numpy()

    def prepare_images(self) -> None:
        """Import torch and load the model, as the first images would. Raises ValueError as `images`."""
        _ = self._loaded

    @cached_property
    def _text_tower(self) -> "TextTower | None":
        return load_text_tower(self.folder)

    @cached_property
    def _loaded(self) -> tuple["PreTrainedModel", "ProcessorMixin"]:
        log_message("loading", self.name)
        from capivara_common.environment import resolve_device
        from modeling_capivara.loading import load_model, load_processor

        device = resolve_device(self.device)
        with wrap_model_errors(self.name):
            return load_model(self.folder).eval().to(device), load_processor(self.folder)


@contextmanager
def wrap_model_errors(model: str) -> Iterator[None]:
    """Let what is wrong with the files of a model be said with its name, and a code."""
    try:
        yield
    except ValueError as error:
        if hasattr(error, "code"):
            raise
        raise localized_error(ValueError, "unusable_model", model=model, reason=error) from error


def find_model(model: str | None = None, device: str | None = None) -> SearchModel:
    """A model for search, by its name; it is fetched and converted where that has not been done before.

    `model`: folder or Hub id of a model of two towers (`hub_cache.TAKEN`), or of one of open_clip with an XLM-RoBERTa
    text tower; "miniature". Where None: what `CAPIVARA_MODEL` of the environment says, else `DEFAULT_MODEL` where it is
    in the cache or the Hub can be reached, else the miniature. `device`: of images, such as "cuda".
    Raises ValueError: there is no such model, or it is of another kind; the Hub can't be reached. ImportError: a
    package that the miniature is made of is not installed. OSError: no space is left for it.
    """
    model = model or os.environ.get("CAPIVARA_MODEL") or None
    if model is None:
        model = DEFAULT_MODEL if find_cached_model(DEFAULT_MODEL) or is_reachable(DEFAULT_MODEL) else MINIATURE_NAME
    here = Path(model).expanduser()
    if model == MINIATURE_NAME and not here.exists():
        from capivara_search.miniature import get_miniature_folder

        return SearchModel(MINIATURE_NAME, MINIATURE_NAME, get_miniature_folder(), device)
    with wrap_model_errors(model):
        folder = resolve_model_folder(model, convert_with_torch)
    name, source = (here.resolve().name, str(here.resolve())) if here.exists() else (model, model)
    return SearchModel(name, source, folder, device)


def convert_with_torch(source: str, folder: Path, revision: str | None) -> str:
    """`convert_into`; torch is imported where a model has to be converted."""
    from modeling_capivara.convert_open_clip import convert_to_folder

    return convert_to_folder(source, folder, revision)


# --- Texts without torch ---------------------------------------------------------------------------------------------


@dataclass
class TextTower:
    """The text side of a `CapivaraModel`: XLM-RoBERTa, mean pooling and projection."""

    CONFIG_DEFAULTS: ClassVar[dict[str, Any]] = {}  # of `text_config`, what a published config.json leaves out
    # What is known here alone; absent fields have it.
    REQUIRED_CONFIG: ClassVar[dict[str, Any]] = {"model_type": "xlm-roberta", "hidden_act": "gelu", "is_decoder": False}
    OTHER_TENSOR_COUNTS: ClassVar[tuple[int, ...]] = (6, 7)  # beside 16 a layer
    CLEAN_TEXT: ClassVar = staticmethod(clean_text)

    weights: WeightFile
    tokenizer: Tokenizer
    layer_count: int
    head_count: int
    epsilon: np.float32
    pad_token_id: int | None

    @classmethod
    def prepare_tokenizer(
        cls, tokenizer: Tokenizer, settings: dict[str, Any], text: dict[str, Any]
    ) -> Tokenizer | None:
        """As transformers makes it; None where it would take another, or pad otherwise than the tower."""
        is_own = settings.get("tokenizer_class") == "CapivaraTokenizer"
        pad = tokenizer.token_to_id(_token_text(settings["pad_token"]))  # None outside of the vocabulary
        if not is_own or pad is None or pad != text["pad_token_id"]:
            return None
        tokenizer.no_padding()
        tokenizer.enable_truncation(CONTEXT_LENGTH, direction=settings.get("truncation_side", "right"))
        return tokenizer

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, in their order: (texts, width), float32, unit length.

        Raises ValueError: a text has no token at all, or an embedding is not finite.
        """
        with wrap_tokenizer_errors(f"The tokenizer beside {self.weights.path}"):
            ids = [found.ids for found in self.tokenizer.encode_batch_fast([self.CLEAN_TEXT(text) for text in texts])]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        batches = [
            [ids[n] for n in order[start : start + TEXTS_PER_BATCH]] for start in range(0, len(ids), TEXTS_PER_BATCH)
        ]
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count() or 1) as executor:
            embeds = np.concatenate(list(executor.map(self._embed_ids, batches)))[np.argsort(order)]
        if not np.isfinite(embeds).all():
            raise ValueError(NOT_FINITE)
        return embeds / np.maximum(np.linalg.norm(embeds, axis=-1, keepdims=True), 1e-12)

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        tokens = np.full((len(ids), max(map(len, ids))), self.pad_token_id)
        for row, found in zip(tokens, ids, strict=True):
            row[: len(found)] = found
        mask = tokens != self.pad_token_id  # (texts, tokens); also of the padding tokens that a text spells
        if not mask.any(axis=1).all():
            raise ValueError("Every text needs at least one token; the tokenizer gives none for an empty one.")
        positions = np.where(
            mask, mask.cumsum(axis=1) + self.pad_token_id, self.pad_token_id
        )  # XLM-R numbers them from pad + 1
        hidden = self._embed_tokens(f"{EMBEDDINGS_PREFIX}word_embeddings.weight", tokens)
        hidden = hidden + self.weights.array(f"{EMBEDDINGS_PREFIX}token_type_embeddings.weight")[0]
        hidden = hidden + self.weights.array(f"{EMBEDDINGS_PREFIX}position_embeddings.weight")[positions]
        hidden = self._layer_norm(hidden, f"{EMBEDDINGS_PREFIX}LayerNorm.")
        for number in range(self.layer_count):
            name = f"text_model.encoder.layer.{number}."
            names = [f"{name}attention.self.{part}." for part in ("query", "key", "value")]
            attended = self._linear(self._attention(hidden, mask, names), f"{name}attention.output.dense.")
            hidden = self._layer_norm(attended + hidden, f"{name}attention.output.LayerNorm.")
            inner = gelu(self._linear(hidden, f"{name}intermediate.dense."))
            hidden = self._layer_norm(self._linear(inner, f"{name}output.dense.") + hidden, f"{name}output.LayerNorm.")
        kept = mask[..., None].astype(np.float32)
        pooled = (hidden * kept).sum(axis=1) / kept.sum(axis=1)  # (texts, width of the tower)
        if "text_projection.weight" in self.weights.tensors:
            return pooled @ self.weights.array("text_projection.weight").T
        inner = gelu(pooled @ self.weights.array("text_projection.0.weight").T)
        return inner @ self.weights.array("text_projection.2.weight").T

    def _embed_tokens(self, name: str, tokens: np.ndarray) -> np.ndarray:
        distinct, places = np.unique(tokens, return_inverse=True)
        return self.weights.rows(name, distinct)[places.reshape(tokens.shape)]

    def _attention(self, hidden: np.ndarray, mask: np.ndarray, names: list[str]) -> np.ndarray:
        texts, tokens, width = hidden.shape
        query, key, value = (
            self._linear(hidden, name).reshape(texts, tokens, self.head_count, -1).swapaxes(1, 2) for name in names
        )  # (texts, heads, tokens, width of a head)
        scores = query @ key.swapaxes(-1, -2) / np.float32((width // self.head_count) ** 0.5)
        scores = np.where(mask[:, None, None], scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return (shares @ value).swapaxes(1, 2).reshape(hidden.shape)

    def _linear(self, hidden: np.ndarray, name: str) -> np.ndarray:
        flat = hidden.reshape(-1, hidden.shape[-1])  # one product of matrices, not one a text
        result = flat @ self.weights.array(f"{name}weight").T + self.weights.array(f"{name}bias")
        return result.reshape(*hidden.shape[:-1], -1)

    def _layer_norm(self, hidden: np.ndarray, name: str) -> np.ndarray:
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        return normed * self.weights.array(f"{name}weight") + self.weights.array(f"{name}bias")


@dataclass
class SiglipTextTower(TextTower):
    """The text side of a SigLIP with the tokenizer of SigLIP 2."""

    CONFIG_DEFAULTS = {  # of `SiglipTextConfig`
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-6},
        **{"max_position_embeddings": 64},
    }
    REQUIRED_CONFIG = {"hidden_act": "gelu_pytorch_tanh"}
    OTHER_TENSOR_COUNTS = (6,)
    CLEAN_TEXT = str

    @classmethod
    def prepare_tokenizer(
        cls, tokenizer: Tokenizer, settings: dict[str, Any], text: dict[str, Any]
    ) -> Tokenizer | None:
        """As `Siglip2Tokenizer` makes it of the file's pieces, padded to one length; None where it is another."""
        if settings.get("tokenizer_class") not in ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast"):
            return None
        padding = _token_text(settings["pad_token"])
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        length = min(text["max_position_embeddings"], settings.get("model_max_length", math.inf))
        tokenizer.enable_truncation(length, direction=settings.get("truncation_side", "right"))
        side, number = settings.get("padding_side", "left"), tokenizer.token_to_id(padding)
        tokenizer.enable_padding(direction=side, pad_id=number, pad_token=padding, length=length)
        return tokenizer

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        tokens = np.array(ids)
        hidden = self._embed_tokens(f"{EMBEDDINGS_PREFIX}token_embedding.weight", tokens)
        hidden = hidden + self.weights.array(f"{EMBEDDINGS_PREFIX}position_embedding.weight")[: tokens.shape[1]]
        whole = np.ones(tokens.shape, bool)
        for number in range(self.layer_count):
            name = f"text_model.encoder.layers.{number}."
            names = [f"{name}{part}." for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
            attended = self._attention(self._layer_norm(hidden, f"{name}layer_norm1."), whole, names)
            hidden = hidden + self._linear(attended, f"{name}self_attn.out_proj.")
            inner = gelu_tanh(self._linear(self._layer_norm(hidden, f"{name}layer_norm2."), f"{name}mlp.fc1."))
            hidden = hidden + self._linear(inner, f"{name}mlp.fc2.")
        return self._linear(self._layer_norm(hidden[:, -1], "text_model.final_layer_norm."), "text_model.head.")


def load_text_tower(folder: str | Path) -> TextTower | None:
    """The text tower of a model folder; None where it is not exactly of a shape that is known here.

    Adapters, other encoders, other tokenizers, quantised weights and weights in several files are left to the model
    itself. Raises ValueError: the weights or the tokenizer can't be read, or a size is outside of a model's limits.
    """
    paths = [Path(folder, n) for n in ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")]
    if not all(path.is_file() for path in paths) or Path(folder, "adapter_config.json").exists():
        return None
    try:
        config, settings = (json.loads(path.read_text(encoding="utf-8")) for path in paths[:2])
        check_sizes(config, f"{paths[0]}: ")
        kind = {"capivara": TextTower, "siglip": SiglipTextTower}[config["model_type"]]
        text, weights = kind.CONFIG_DEFAULTS | config["text_config"], WeightFile(paths[3])
        layers, heads = (operator.index(text[name]) for name in ("num_hidden_layers", "num_attention_heads"))
        kinds = [place.dtype for name, place in weights.tensors.items() if name.startswith("text_")]
        is_known = all(text.get(name, value) == value for name, value in kind.REQUIRED_CONFIG.items())
        if not (is_known and WEIGHT_DTYPES.issuperset(kinds) and len(kinds) - 16 * layers in kind.OTHER_TENSOR_COUNTS):
            return None
        with wrap_tokenizer_errors(str(paths[2])):
            tokenizer = kind.prepare_tokenizer(Tokenizer.from_file(str(paths[2])), settings, text)
        epsilon = np.float32(text["layer_norm_eps"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError, RecursionError):
        return None  # damaged: transformers says what is wrong
    return tokenizer and kind(weights, tokenizer, layers, heads, epsilon, text.get("pad_token_id"))


def _token_text(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) else value


def gelu(values: np.ndarray) -> np.ndarray:
    """x times the share of the normal distribution below x: the exact GELU, not the one by tanh."""
    return values * np.float32(0.5) * (1 + erf(values * np.float32(0.5**0.5)))


def gelu_tanh(values: np.ndarray) -> np.ndarray:
    """GELU by tanh, as PyTorch's `gelu_pytorch_tanh`."""
    inner = np.float32((2 / np.pi) ** 0.5) * (values + np.float32(0.044715) * values**3)
    return np.float32(0.5) * values * (1 + np.tanh(inner))


def erf(values: np.ndarray) -> np.ndarray:
    """The error function to 6e-7, a few units of float32's last place: Abramowitz and Stegun, formula 7.1.26."""
    size = np.abs(values)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    return np.copysign(1 - series * t * np.exp(-size * size), values)
