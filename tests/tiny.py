"""Tiny models with the real architecture and a small XLM-R-like tokenizer, built without downloads."""

import math
from pathlib import Path

import PIL.Image
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_capivara import CapivaraConfig, CapivaraModel, CapivaraProcessor

TINY_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
}  # fmt: skip
TINY_TEXT = {
    "model_type": "xlm-roberta", "vocab_size": 300, "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 82,
}  # fmt: skip
WORDS = "um uma foto de gato cachorro capivara casa carro árvore água são joão pão céu azul verde a o the of cat dog"


def tiny_config(**overrides) -> CapivaraConfig:
    return CapivaraConfig(**{"vision_config": TINY_VISION, "text_config": TINY_TEXT, "projection_dim": 24, **overrides})


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Set every tensor to non-trivial random values, including biases and norms, so that swapped layers are noticed."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict().keys()  # other buffers, such as rotary frequencies, are computed
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name not in saved:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "logit_scale" in name:
            tensor.data.fill_(math.log(1 / 0.07) + 0.3)
        elif "running_var" in name:
            tensor.data.copy_(0.5 + noise.abs())
        elif tensor.ndim <= 1:  # biases around 0, norm weights around 1
            tensor.data.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
        else:
            tensor.data.copy_(noise * 0.7 / math.sqrt(tensor[0].numel()))
    return model


def save_model(
    folder: Path, processor: CapivaraProcessor, seed: int = 0, text_seed: int | None = None, **overrides
) -> Path:
    """Save a tiny model with random weights and its processor; `text_seed` sets other weights of the text tower."""
    model = randomize(CapivaraModel(tiny_config(**overrides)), seed)
    if text_seed is not None:
        randomize(model.text_model, text_seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Replace all plots of runs and evaluations by a dot, because drawing them takes longer than the tests."""
    from eval.records import plots

    def dot(figure: object, path: Path) -> None:
        plots.plt.close(figure)
        PIL.Image.new("RGB", (9, 9)).save(path)

    patch.setattr(plots, "save_png_and_close_figure", dot)
    patch.setattr(plots, "plot_ranked_image_grid", lambda rows, path, *_: dot("all", path))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build an XLM-R-like Unigram tokenizer with less than 300 tokens: all Latin letters and a few words."""
    letters = [chr(c) for c in range(0x21, 0x7F)] + list("áàâãéêíóôõúüçÁÉÍÓÚÇ")
    pieces = [("▁" + w, -5.0) for w in dict.fromkeys(WORDS.split())] + [(c, -9.0) for c in ["▁", *letters]]
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=77,
        model_input_names=["input_ids", "attention_mask"], **special,
    )  # fmt: skip
