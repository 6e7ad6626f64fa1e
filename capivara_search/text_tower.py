"""Texts to embeddings without torch and transformers, whose imports alone take longer than a search may.

XLM-RoBERTa, mean pooling and projection as `CapivaraModel` has them, and SigLIP's text tower, in NumPy; the embeddings
are equal to 1e-5.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from capivara_common.weight_file import WeightFile
from capivara_search.model_files.checks_capivara import check_sizes, tokenizer_errors
from capivara_search.model_files.text_repair_capivara import CONTEXT_LENGTH, checked_texts, repair_text

WEIGHTS = "model.safetensors"
BATCH_TEXTS = 8  # a batch a thread; with threads within its products, they wait for each other on a busy machine
EMBEDDINGS = "text_model.embeddings."
# Fields of the text tower with one value that is known here; absent ones have it.
KNOWN = {"model_type": "xlm-roberta", "hidden_act": "gelu", "position_embedding_type": "absolute"}
KNOWN |= {"is_decoder": False, "add_cross_attention": False, "quantization_config": None}
KINDS = {"F32", "F16", "BF16"}  # of weights
# Of `SiglipTextConfig`: a published config.json leaves out what has these values.
SIGLIP_DEFAULTS = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"max_position_embeddings": 64, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}
SIGLIP2_TOKENIZERS = ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast")  # as saved, as published
SIGLIP_LAYER = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
)


@dataclass
class TextTower:
    """The text side of a model folder."""

    weights: WeightFile  # its tensors
    config: dict[str, Any]  # its `config.json`
    tokenizer: Tokenizer  # cuts at 77 tokens and does not pad

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, in their order: (texts, projection_dim), float32, unit length.

        Raises ValueError: a text is not a string, or there is none; a text has no token at all.
        """
        ids = self._ids(texts)
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        embeds = np.empty((len(ids), self.width), np.float32)
        batches = [order[start : start + BATCH_TEXTS] for start in range(0, len(order), BATCH_TEXTS)]
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count() or 1) as executor:
            found = executor.map(lambda numbers: self._embed_ids([ids[number] for number in numbers]), batches)
            for numbers, rows in zip(batches, found, strict=True):
                embeds[numbers] = rows
        return embeds / np.maximum(np.linalg.norm(embeds, axis=-1, keepdims=True), 1e-12)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        repaired = [repair_text(text) for text in checked_texts(list(texts))]
        with tokenizer_errors(f"The tokenizer beside {self.weights.path}"):
            return [found.ids for found in self.tokenizer.encode_batch_fast(repaired)]

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.config["projection_dim"]

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        pad = self.config["text_config"]["pad_token_id"]
        tokens = np.full((len(ids), max(map(len, ids))), pad)
        for row, found in zip(tokens, ids, strict=True):
            row[: len(found)] = found
        mask = tokens != pad  # (texts, tokens); also of the padding tokens that a text spells
        if not mask.any(axis=1).all():
            raise ValueError("Every text needs at least one token; the tokenizer gives none for an empty one.")
        hidden = self._embeddings(tokens, mask, pad)
        for number in range(self.config["text_config"]["num_hidden_layers"]):
            hidden = self._layer(hidden, mask, f"text_model.encoder.layer.{number}.")
        kept = mask[..., None].astype(np.float32)
        pooled = (hidden * kept).sum(axis=1) / kept.sum(axis=1)  # (texts, width)
        return self._projected(pooled)

    def _embeddings(self, tokens: np.ndarray, mask: np.ndarray, pad: int) -> np.ndarray:
        distinct, places = np.unique(tokens, return_inverse=True)
        words = self.weights.rows(f"{EMBEDDINGS}word_embeddings.weight", distinct)[places.reshape(tokens.shape)]
        positions = np.where(mask, mask.cumsum(axis=1) + pad, pad)  # XLM-R numbers them from pad + 1
        places = self.weights.array(f"{EMBEDDINGS}position_embeddings.weight")[positions]
        kind = self.weights.array(f"{EMBEDDINGS}token_type_embeddings.weight")[0]
        return self._normed(words + kind + places, f"{EMBEDDINGS}LayerNorm.")

    def _layer(self, hidden: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
        names = [f"{name}attention.self.{part}." for part in ("query", "key", "value")]
        attended = self._attention(hidden, mask, names)
        attended = self._linear(attended, f"{name}attention.output.dense.")
        hidden = self._normed(attended + hidden, f"{name}attention.output.LayerNorm.")
        inner = gelu(self._linear(hidden, f"{name}intermediate.dense."))
        return self._normed(self._linear(inner, f"{name}output.dense.") + hidden, f"{name}output.LayerNorm.")

    def _attention(self, hidden: np.ndarray, mask: np.ndarray, names: list[str]) -> np.ndarray:
        texts, tokens, width = hidden.shape
        heads = self.config["text_config"]["num_attention_heads"]
        query, key, value = (
            self._linear(hidden, name).reshape(texts, tokens, heads, -1).swapaxes(1, 2) for name in names
        )  # (texts, heads, tokens, width of a head)
        scores = query @ key.swapaxes(-1, -2) / np.float32((width // heads) ** 0.5)
        scores = np.where(mask[:, None, None], scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return (shares @ value).swapaxes(1, 2).reshape(hidden.shape)

    def _projected(self, pooled: np.ndarray) -> np.ndarray:
        if self.config["text_projection_type"] == "linear":
            return pooled @ self.weights.array("text_projection.weight").T
        inner = gelu(pooled @ self.weights.array("text_projection.0.weight").T)
        return inner @ self.weights.array("text_projection.2.weight").T

    def _linear(self, hidden: np.ndarray, name: str) -> np.ndarray:
        flat = hidden.reshape(-1, hidden.shape[-1])  # one product of matrices, not one a text
        result = flat @ self.weights.array(f"{name}weight").T + self.weights.array(f"{name}bias")
        return result.reshape(*hidden.shape[:-1], -1)

    def _normed(self, hidden: np.ndarray, name: str) -> np.ndarray:
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt(variance + np.float32(self.config["text_config"]["layer_norm_eps"]))
        return normed * self.weights.array(f"{name}weight") + self.weights.array(f"{name}bias")


@dataclass
class SiglipTextTower(TextTower):
    """The text side of a SigLIP folder; `config` has the defaults filled in, `tokenizer` pads to the length of all."""

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        with tokenizer_errors(f"The tokenizer beside {self.weights.path}"):
            found = self.tokenizer.encode_batch_fast(checked_texts(list(texts)))
        return [one.ids for one in found]

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.weights.places["text_model.head.weight"].shape[0]

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        tokens = np.array(ids)
        distinct, places = np.unique(tokens, return_inverse=True)
        words = self.weights.rows("text_model.embeddings.token_embedding.weight", distinct)
        hidden = words[places.reshape(tokens.shape)]
        hidden = hidden + self.weights.array("text_model.embeddings.position_embedding.weight")[: tokens.shape[1]]
        whole = np.ones(tokens.shape, bool)
        for number in range(self.config["text_config"]["num_hidden_layers"]):
            name = f"text_model.encoder.layers.{number}."
            names = [f"{name}{part}." for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
            attended = self._attention(self._normed(hidden, f"{name}layer_norm1."), whole, names)
            hidden = hidden + self._linear(attended, f"{name}self_attn.out_proj.")
            inner = gelu_tanh(self._linear(self._normed(hidden, f"{name}layer_norm2."), f"{name}mlp.fc1."))
            hidden = hidden + self._linear(inner, f"{name}mlp.fc2.")
        return self._linear(self._normed(hidden[:, -1], "text_model.final_layer_norm."), "text_model.head.")


def open_text_tower(folder: str | Path) -> TextTower | None:
    """The text tower of a model folder; None where it is not exactly of the shape that is known here.

    Adapters, other encoders, other tokenizers, quantised weights and weights in several files are left to
    `CapivaraModel`. Raises ValueError: the weights or the tokenizer can't be read, or a size is outside of the limits
    of a model.
    """
    folder = Path(folder)
    needed = [folder / name for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")]
    if not all(path.is_file() for path in needed) or (folder / "adapter_config.json").exists():
        return None
    try:
        config, settings = (json.loads(path.read_text(encoding="utf-8")) for path in (needed[0], needed[3]))
        check_sizes(config, f"{needed[0]}: ")
        weights = WeightFile(needed[1])
        if config["model_type"] == "siglip":
            return _siglip_tower(needed[2], weights, config, settings)
        if not _is_known(config, weights):
            return None
        tokenizer = _tokenizer(needed[2], settings, config["text_config"]["pad_token_id"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError, RecursionError):
        return None  # damaged: transformers says what is wrong
    return tokenizer and TextTower(weights, config, tokenizer)


def _siglip_tower(
    path: Path, weights: WeightFile, config: dict[str, Any], settings: dict[str, Any]
) -> SiglipTextTower | None:
    """`open_text_tower` of a SigLIP; `path` is its tokenizer.json, `settings` its tokenizer_config.json."""
    text = SIGLIP_DEFAULTS | config["text_config"]
    layers = [f"text_model.encoder.layers.{number}." for number in range(text["num_hidden_layers"])]
    modules = [layer + part for layer in layers for part in SIGLIP_LAYER]
    modules += ["text_model.final_layer_norm", "text_model.head"]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names |= {f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")}
    if text["hidden_act"] != SIGLIP_DEFAULTS["hidden_act"] or text["hidden_size"] % text["num_attention_heads"]:
        return None
    tokenizer = _siglip2_tokenizer(path, settings, text["max_position_embeddings"])
    if tokenizer is None or not _holds(weights, names, "text_model."):
        return None
    return SiglipTextTower(weights, config | {"text_config": text}, tokenizer)


def _holds(weights: WeightFile, names: set[str], *prefixes: str) -> bool:
    """Whether the tensors whose names begin so are these, and of a known kind."""
    own = {name: place.kind for name, place in weights.places.items() if name.startswith(prefixes)}
    return own.keys() == names and KINDS.issuperset(own.values())


def _token(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) else value


def _siglip2_tokenizer(path: Path, settings: dict[str, Any], positions: int) -> Tokenizer | None:
    """The tokenizer of a SigLIP 2 as `Siglip2Tokenizer` makes it of the file's pieces; None where it is another."""
    padding = _token(settings.get("pad_token"))
    if settings.get("tokenizer_class") not in SIGLIP2_TOKENIZERS or padding is None:
        return None
    with tokenizer_errors(str(path)):
        tokenizer = Tokenizer.from_file(str(path))
    model, number = tokenizer.model, tokenizer.token_to_id(padding)
    if number is None or not isinstance(model, models.BPE) or not (model.byte_fallback and model.fuse_unk):
        return None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    length = min(positions, settings.get("model_max_length", positions))
    tokenizer.enable_truncation(length, direction=settings.get("truncation_side", "right"))
    side = settings.get("padding_side", "left")
    tokenizer.enable_padding(direction=side, pad_id=number, pad_token=padding, length=length)
    return tokenizer


def _is_known(config: dict[str, Any], weights: WeightFile) -> bool:
    text = config["text_config"]
    if any(type(text[name]) is not int for name in ("num_hidden_layers", "num_attention_heads", "pad_token_id")):
        return False
    if not isinstance(text["layer_norm_eps"], int | float) or type(config["projection_dim"]) is not int:
        return False
    if config["model_type"] != "capivara" or any(text.get(name, value) != value for name, value in KNOWN.items()):
        return False
    if config.get("quantization_config") or text["hidden_size"] % text["num_attention_heads"]:
        return False
    return _holds(weights, _names(config), "text_model.", "text_projection")


def _names(config: dict[str, Any]) -> set[str]:
    """Of every tensor of the text side."""
    parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
    parts += [f"{part}{kind}" for part in ("attention.output.", "output.") for kind in ("dense", "LayerNorm")]
    layers = [f"text_model.encoder.layer.{number}." for number in range(config["text_config"]["num_hidden_layers"])]
    modules = [f"{EMBEDDINGS}LayerNorm", *(layer + part for layer in layers for part in [*parts, "intermediate.dense"])]
    steps = [""] if config["text_projection_type"] == "linear" else [".0", ".2"]
    return {
        *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")),
        *(f"{EMBEDDINGS}{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
        *(f"text_projection{step}.weight" for step in steps),
    }


def _tokenizer(path: Path, settings: dict[str, Any], pad: int) -> Tokenizer | None:
    """The tokenizer of a folder; None where transformers would take another, or pad otherwise than the tower."""
    if settings.get("tokenizer_class") != "CapivaraTokenizer":
        return None
    with tokenizer_errors(str(path)):
        tokenizer = Tokenizer.from_file(str(path))
    padding, *ends = [_token(settings.get(f"{name}_token")) for name in ("pad", "eos", "sep")]
    if padding is None or tokenizer.token_to_id(padding) != pad or padding in ends:
        return None
    tokenizer.no_padding()
    tokenizer.enable_truncation(CONTEXT_LENGTH, direction=settings.get("truncation_side", "right"))
    return tokenizer


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
