"""Text encoders in NumPy, so that a search need not import torch and transformers, which would take too long.

The embeddings differ by less than 1e-5 from the embeddings that `CapivaraModel` (with XLM-RoBERTa as text encoder),
SigLIP and MetaCLIP 2 compute in PyTorch.
"""

import base64
import json
import math
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from capivara_common.model_kinds import KINDS
from capivara_common.weight_file import WeightFile
from capivara_search.model_files.checks_capivara import NOT_FINITE_MESSAGE, check_config_ranges, wrap_tokenizer_errors
from capivara_search.model_files.text_cleaning_capivara import CONTEXT_LENGTH, clean_text

# Number of texts per batch. Each thread computes its own batches. If several threads shared one matrix product instead,
# they would wait for each other on a busy machine.
TEXTS_PER_BATCH = 8
WEIGHT_DTYPES = {"F32", "F16", "BF16"}  # supported types of weights, as safetensors names them
EMBEDDINGS_PREFIX = "text_model.embeddings."  # prefix of the names of all embedding tensors


@dataclass
class TextTower:
    """The text encoder of a `CapivaraModel` in NumPy: XLM-RoBERTa, mean pooling and projection.

    Subclasses implement other architectures. They override the class attributes (in capitals).

    Attributes:
        REQUIRED_CONFIG: Supported values of `text_config`: `{key: the only supported value}`.
        OTHER_TENSOR_COUNTS: Supported numbers of tensors outside of the transformer layers.
        CLEAN_TEXT: Function that cleans a text before tokenization.
        weights: Memory-mapped weights of the model, from `model.safetensors`.
        tokenizer: Tokenizer that truncates texts, and pads them if the encoder needs texts of fixed length.
        layer_count: Number of transformer layers.
        head_count: Number of attention heads of each layer.
        epsilon: Small number that the layer norms add to the variance.
        text_config: `text_config` of the model, with default values for missing keys.
    """

    # A key that is missing in `text_config` counts as supported.
    REQUIRED_CONFIG: ClassVar[dict[str, Any]] = {"model_type": "xlm-roberta", "hidden_act": "gelu", "is_decoder": False}
    # Each transformer layer has 16 tensors. With another number of other tensors, a text encoder has parts that this
    # class does not compute.
    OTHER_TENSOR_COUNTS: ClassVar[tuple[int, ...]] = (6, 7)
    CLEAN_TEXT: ClassVar = staticmethod(clean_text)

    weights: WeightFile
    tokenizer: Tokenizer
    layer_count: int
    head_count: int
    epsilon: np.float32
    text_config: dict[str, Any]

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Tokenizer, settings: dict[str, Any], text_config: dict[str, Any]) -> bool:
        """Configure a tokenizer so that it encodes texts like the tokenizer that transformers would load.

        Args:
            tokenizer: Tokenizer of `tokenizer.json`. It is changed in place.
            settings: Content of `tokenizer_config.json`.
            text_config: `text_config` of the model.

        Returns:
            True if the tokenizer was configured. False if it is not a `CapivaraTokenizer`, or its padding token differs
            from the model's.
        """
        is_capivara = settings.get("tokenizer_class") == "CapivaraTokenizer"
        # The id of the padding token, or None if the vocabulary does not have it.
        pad = tokenizer.token_to_id(_token_text(settings["pad_token"]))
        if not is_capivara or pad is None or pad != text_config["pad_token_id"]:
            return False
        tokenizer.no_padding()
        tokenizer.enable_truncation(CONTEXT_LENGTH, direction=settings.get("truncation_side", "right"))
        return True

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Clean, tokenize and embed texts, in batches of texts of similar length.

        Args:
            texts: Texts, at least one.

        Returns:
            Embeddings (texts, width) in float32, of unit length.

        Raises:
            ValueError: If a text has no token, or an embedding is not finite.
        """
        with wrap_tokenizer_errors(f"The tokenizer in the folder of {self.weights.path}"):
            encodings = self.tokenizer.encode_batch_fast([self.CLEAN_TEXT(text) for text in texts])
            ids = [encoding.ids for encoding in encodings]
        # Texts of similar length are put into the same batch, so that a batch needs little padding.
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        ordered = [ids[number] for number in order]
        batches = [ordered[start : start + TEXTS_PER_BATCH] for start in range(0, len(ids), TEXTS_PER_BATCH)]
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count() or 1) as executor:
            embeds = np.concatenate(list(executor.map(self._embed_ids, batches)))[np.argsort(order)]
        if not np.isfinite(embeds).all():
            raise ValueError(NOT_FINITE_MESSAGE)
        return embeds / np.maximum(np.linalg.norm(embeds, axis=-1, keepdims=True), 1e-12)

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        """Encode texts that are given as token ids.

        Args:
            ids: Token ids of each text, without padding.

        Returns:
            Embeddings (texts, width) that are not normalized.

        Raises:
            ValueError: If a text has no token except padding tokens.
        """
        pad_id = self.text_config["pad_token_id"]
        tokens = _pad_ids(ids, pad_id)
        # Shape (texts, tokens): False for padding. It is also False if a text itself contains the padding token.
        mask = tokens != pad_id
        if not mask.any(axis=1).all():
            raise ValueError("Every text needs at least one token, but the tokenizer found none in one of the texts.")
        # In XLM-RoBERTa, positions of tokens begin at `pad_token_id` + 1, and padding has the position `pad_token_id`.
        positions = np.where(mask, mask.cumsum(axis=1) + pad_id, pad_id)
        hidden = self._embed_tokens(f"{EMBEDDINGS_PREFIX}word_embeddings.weight", tokens)
        hidden = hidden + self.weights.array(f"{EMBEDDINGS_PREFIX}token_type_embeddings.weight")[0]
        hidden = hidden + self.weights.array(f"{EMBEDDINGS_PREFIX}position_embeddings.weight")[positions]
        hidden = self._layer_norm(hidden, f"{EMBEDDINGS_PREFIX}LayerNorm.")
        for number in range(self.layer_count):
            name = f"text_model.encoder.layer.{number}."
            names = [f"{name}attention.self.{part}." for part in ("query", "key", "value")]
            attended = self._attention(hidden, mask[:, None, None], names)
            attended = self._linear(attended, f"{name}attention.output.dense.")
            hidden = self._layer_norm(attended + hidden, f"{name}attention.output.LayerNorm.")
            inner = _gelu(self._linear(hidden, f"{name}intermediate.dense."))
            hidden = self._layer_norm(self._linear(inner, f"{name}output.dense.") + hidden, f"{name}output.LayerNorm.")
        token_weights = mask[..., None].astype(np.float32)
        # Mean over the tokens: (texts, hidden size).
        pooled = (hidden * token_weights).sum(axis=1) / token_weights.sum(axis=1)
        if "text_projection.weight" in self.weights.tensors:
            return pooled @ self.weights.array("text_projection.weight").T
        inner = _gelu(pooled @ self.weights.array("text_projection.0.weight").T)
        return inner @ self.weights.array("text_projection.2.weight").T

    def _embed_tokens(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Look up token embeddings. Each row of the embedding matrix is read from the file only once.

        Args:
            name: Name of the embedding matrix.
            tokens: Token ids (texts, tokens).

        Returns:
            Embeddings (texts, tokens, hidden size).
        """
        distinct, inverse = np.unique(tokens, return_inverse=True)
        return self.weights.rows(name, distinct)[inverse.reshape(tokens.shape)]

    def _attention(self, hidden: np.ndarray, mask: np.ndarray, names: list[str]) -> np.ndarray:
        """Apply multi-head self-attention without the output projection.

        Args:
            hidden: Hidden states (texts, tokens, hidden size).
            mask: Boolean array that can be broadcast to (texts, heads, tokens, attended tokens). True if a token
                attends to another.
            names: Prefixes of the tensor names of the query, key and value layers, in this order.

        Returns:
            Attended values (texts, tokens, hidden size).
        """
        texts, tokens, width = hidden.shape
        parts = [self._linear(hidden, name).reshape(texts, tokens, self.head_count, -1) for name in names]
        query, key, value = (part.swapaxes(1, 2) for part in parts)  # (texts, heads, tokens, width of a head)
        scores = query @ key.swapaxes(-1, -2) / np.float32((width // self.head_count) ** 0.5)
        scores = np.where(mask, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return (shares @ value).swapaxes(1, 2).reshape(hidden.shape)

    def _linear(self, hidden: np.ndarray, name: str) -> np.ndarray:
        # The tokens of all texts become the rows of one matrix, because NumPy computes a single large matrix product
        # faster than one product per text.
        flat = hidden.reshape(-1, hidden.shape[-1])
        result = flat @ self.weights.array(f"{name}weight").T + self.weights.array(f"{name}bias")
        return result.reshape(*hidden.shape[:-1], -1)

    def _layer_norm(self, hidden: np.ndarray, name: str) -> np.ndarray:
        centered = hidden - hidden.mean(axis=-1, keepdims=True)
        normalized = centered / np.sqrt(np.square(centered).mean(axis=-1, keepdims=True) + self.epsilon)
        return normalized * self.weights.array(f"{name}weight") + self.weights.array(f"{name}bias")


@dataclass
class ClipTextTower(TextTower):
    """The text encoder of a model like CLIP in NumPy: layer norms before each block, causal attention, pooling at EOS.

    The only supported tokenizer is the tokenizer of XLM-RoBERTa and XLM-V, which MetaCLIP 2 uses.
    """

    REQUIRED_CONFIG = {}
    OTHER_TENSOR_COUNTS = (5,)
    CLEAN_TEXT = str

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Tokenizer, settings: dict[str, Any], text_config: dict[str, Any]) -> bool:
        """Configure a tokenizer like `XLMRobertaTokenizer` of transformers, which splits texts at white space first.

        Args:
            tokenizer: Tokenizer of `tokenizer.json`. It is changed in place.
            settings: Content of `tokenizer_config.json`.
            text_config: `text_config` of the model.

        Returns:
            True if the tokenizer was configured. False if its class, its padding side, or the activation of the model
            is not supported.
        """
        is_xlm_roberta = settings.get("tokenizer_class") in ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast")
        pads_right = settings.get("padding_side", "right") == "right"
        if not is_xlm_roberta or not pads_right or text_config["hidden_act"] not in ACTIVATIONS:
            return False
        # Only the step "Precompiled" of the normalizer in tokenizer.json is kept, because `XLMRobertaTokenizer` of
        # transformers ignores the other steps, and both must produce the same tokens.
        state = json.loads(tokenizer.normalizer.__getstate__()) if tokenizer.normalizer else {}
        steps = [step for step in state.get("normalizers", [state]) if step.get("type") == "Precompiled"]
        charsmaps = [base64.b64decode(step["precompiled_charsmap"]) for step in steps[:1]]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap) for charsmap in charsmaps])
        splitters = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
        length = min(text_config["max_position_embeddings"], settings.get("model_max_length", math.inf))
        tokenizer.no_padding()
        tokenizer.enable_truncation(length, direction=settings.get("truncation_side", "right"))
        return True

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        """Encode texts that are given as token ids. The embedding is the projected hidden state of the first EOS token.

        Args:
            ids: Token ids of each text, without padding.

        Returns:
            Embeddings (texts, width) that are not normalized.
        """
        eos_id = self.text_config["eos_token_id"]
        # The padding does not change the result: with causal attention, a token does not attend to padding after it.
        tokens = _pad_ids(ids, eos_id)
        hidden = self._run_layers(tokens, np.tri(tokens.shape[1], dtype=bool))
        pooled = hidden[np.arange(len(tokens)), (tokens == eos_id).argmax(axis=1)]
        return self._layer_norm(pooled, "text_model.final_layer_norm.") @ self.weights.array("text_projection.weight").T

    def _run_layers(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Compute the hidden states after the last transformer layer.

        Args:
            tokens: Token ids (texts, tokens).
            mask: Boolean array that can be broadcast to (texts, heads, tokens, attended tokens). True if a token
                attends to another.

        Returns:
            Hidden states (texts, tokens, hidden size), before the final layer norm.
        """
        activation = ACTIVATIONS[self.text_config["hidden_act"]]
        hidden = self._embed_tokens(f"{EMBEDDINGS_PREFIX}token_embedding.weight", tokens)
        hidden = hidden + self.weights.array(f"{EMBEDDINGS_PREFIX}position_embedding.weight")[: tokens.shape[1]]
        for number in range(self.layer_count):
            name = f"text_model.encoder.layers.{number}."
            names = [f"{name}{part}." for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
            attended = self._attention(self._layer_norm(hidden, f"{name}layer_norm1."), mask, names)
            hidden = hidden + self._linear(attended, f"{name}self_attn.out_proj.")
            inner = activation(self._linear(self._layer_norm(hidden, f"{name}layer_norm2."), f"{name}mlp.fc1."))
            hidden = hidden + self._linear(inner, f"{name}mlp.fc2.")
        return hidden


@dataclass
class SiglipTextTower(ClipTextTower):
    """The text encoder of a SigLIP model in NumPy, for models with the tokenizer of SigLIP 2."""

    REQUIRED_CONFIG = {"hidden_act": "gelu_pytorch_tanh"}
    OTHER_TENSOR_COUNTS = (6,)

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Tokenizer, settings: dict[str, Any], text_config: dict[str, Any]) -> bool:
        """Configure a tokenizer like `Siglip2Tokenizer` of transformers: lowercase texts, padded to a fixed length.

        Args:
            tokenizer: Tokenizer of `tokenizer.json`. It is changed in place.
            settings: Content of `tokenizer_config.json`.
            text_config: `text_config` of the model.

        Returns:
            True if the tokenizer was configured. False if it is neither a `Siglip2Tokenizer` nor a `GemmaTokenizer`.
        """
        if settings.get("tokenizer_class") not in ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast"):
            return False
        padding = _token_text(settings["pad_token"])
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        length = min(text_config["max_position_embeddings"], settings.get("model_max_length", math.inf))
        tokenizer.enable_truncation(length, direction=settings.get("truncation_side", "right"))
        side, pad_id = settings.get("padding_side", "left"), tokenizer.token_to_id(padding)
        tokenizer.enable_padding(direction=side, pad_id=pad_id, pad_token=padding, length=length)
        return True

    def _embed_ids(self, ids: list[list[int]]) -> np.ndarray:
        """Encode texts that are given as token ids. The embedding is the projected hidden state of the last token.

        Args:
            ids: Token ids of each text, padded to the same length. Padding is attended to like any other token.

        Returns:
            Embeddings (texts, width) that are not normalized.
        """
        hidden = self._run_layers(np.array(ids), np.array(True))
        return self._linear(self._layer_norm(hidden[:, -1], "text_model.final_layer_norm."), "text_model.head.")


TEXT_TOWERS = {tower.__name__: tower for tower in (TextTower, ClipTextTower, SiglipTextTower)}


def load_numpy_text_tower_or_none(folder: str | Path) -> TextTower | None:
    """Load the text encoder of a model in NumPy, or return None if it is not implemented in NumPy.

    Adapters, other architectures and tokenizers, quantized weights, and weights in several files are not implemented.

    Args:
        folder: Folder of the model, with `config.json`, `model.safetensors` and the tokenizer files.

    Returns:
        The text encoder. If None, load the model with transformers, which takes longer.

    Raises:
        ValueError: If the weights or the tokenizer can't be read, or a size in `config.json` is out of range.
    """
    names = ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
    config_file, settings_file, tokenizer_file, weights_file = paths = [Path(folder, name) for name in names]
    if not all(path.is_file() for path in paths) or Path(folder, "adapter_config.json").exists():
        return None
    try:
        config, settings = (json.loads(path.read_text(encoding="utf-8")) for path in (config_file, settings_file))
        check_config_ranges(config, f"{config_file}: ")
        kind = KINDS[config["model_type"]]
        tower_class = TEXT_TOWERS[kind.numpy_text_tower]
        text_config, weights = {**kind.text_defaults, **config["text_config"]}, WeightFile(weights_file)
        layers, heads = (operator.index(text_config[name]) for name in ("num_hidden_layers", "num_attention_heads"))
        dtypes = [tensor.dtype for name, tensor in weights.tensors.items() if name.startswith("text_")]
        required_config = tower_class.REQUIRED_CONFIG
        has_known_config = all(text_config.get(name, value) == value for name, value in required_config.items())
        has_known_tensors = len(dtypes) - 16 * layers in tower_class.OTHER_TENSOR_COUNTS
        if not (has_known_config and has_known_tensors and WEIGHT_DTYPES.issuperset(dtypes)):
            return None
        with wrap_tokenizer_errors(str(tokenizer_file)):
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
            if not tower_class.prepare_tokenizer(tokenizer, settings, text_config):
                return None
        epsilon = np.float32(text_config["layer_norm_eps"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError, RecursionError):
        return None  # a file is damaged: transformers loads the model and reports the error
    return tower_class(weights, tokenizer, layers, heads, epsilon, text_config)


def _token_text(token: Any) -> Any:
    """Return the text of a special token of `tokenizer_config.json`.

    Args:
        token: The text, or a dictionary that has the text under the key "content".

    Returns:
        The text.
    """
    return token["content"] if isinstance(token, dict) else token


def _pad_ids(ids: list[list[int]], pad_id: int) -> np.ndarray:
    """Pad token ids of texts at the right to the length of the longest text.

    Args:
        ids: Token ids of each text.
        pad_id: Token id of padding.

    Returns:
        Token ids (texts, tokens).
    """
    # `zip_longest` pads all texts to the same length. It yields the first tokens of all texts, then the second tokens,
    # and so on, so the array is transposed.
    return np.array([*zip_longest(*ids, fillvalue=pad_id)], int).T.reshape(len(ids), -1)


def _gelu(values: np.ndarray) -> np.ndarray:
    """Compute the exact GELU activation of each element: x * P(X <= x), where X is a standard normal variable."""
    return values * np.float32(0.5) * (1 + _erf(values * np.float32(0.5**0.5)))


def _gelu_tanh(values: np.ndarray) -> np.ndarray:
    """Compute GELU of each element in its tanh approximation, like `gelu_pytorch_tanh` of transformers."""
    inner = np.float32((2 / np.pi) ** 0.5) * (values + np.float32(0.044715) * values**3)
    return np.float32(0.5) * values * (1 + np.tanh(inner))


def _quick_gelu(values: np.ndarray) -> np.ndarray:
    """Compute the activation x * sigmoid(1.702 x) of each element x, like `quick_gelu` of transformers."""
    return values / (1 + np.exp(np.float32(-1.702) * values))


def _erf(values: np.ndarray) -> np.ndarray:
    """Compute the Gauss error function of each element, with an error of at most 6e-7.

    This error is about five times the machine epsilon of float32. The approximation is formula 7.1.26 of Abramowitz and
    Stegun, Handbook of Mathematical Functions.
    """
    size = np.abs(values)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    return np.copysign(1 - series * t * np.exp(-size * size), values)


# {name of the activation function in transformers: function that computes it in NumPy}
ACTIVATIONS = {"gelu": _gelu, "gelu_pytorch_tanh": _gelu_tanh, "quick_gelu": _quick_gelu}
