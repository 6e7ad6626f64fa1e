"""What open_clip reads of a SigLIP or SigLIP 2 model of fixed resolution: the layout of its own ViT-…-SigLIP2.

That is timm's image tower with attention pooling, and open_clip's own text tower. All tensors have a counterpart;
query, key and value are one tensor there. What is written is loaded by open_clip and compared with transformers.
"""

import re
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.environment import require
from capivara_common.files import write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import image_embeds, pad, random_texts, text_embeds, tokenise

TOLERANCE = 1e-4  # of cosines in float32
# transformers' beginning of a name, and open_clip's; the first that fits counts.
NAMES = {
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.encoder.layers.": "visual.trunk.blocks.",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.head.": "text.text_projection.",
    "logit_": "logit_",
}
# Within a block
BLOCK = {
    "visual": {"layer_norm": "norm", "self_attn.out_proj": "attn.proj"},
    "text": {"layer_norm": "ln_", "self_attn.out_proj": "attn.out_proj", "fc1": "c_fc", "fc2": "c_proj"},
}
# Towers of timm that are these, by width, layers and patch: its name, and pixels a side follow
TIMM = {(768, 12, 16): "vit_base_patch16_siglip", (768, 12, 32): "vit_base_patch32_siglip"}
TIMM |= {(1024, 24, 16): "vit_large_patch16_siglip", (1152, 27, 14): "vit_so400m_patch14_siglip"}


def write_open_clip(source: Path, folder: Path, name: str) -> dict[str, Tensor]:
    """Write open_clip's files of a model that `check_open_clip` lets through; the tokenizer is that of the repository
    `name`. Returns the tensors of open_clip's model. Raises ValueError where its embeddings are others.
    """
    model, processor = load_model(source).eval(), load_processor(source)
    tensors = open_clip_tensors(model)
    save_file(tensors, folder / OPEN_CLIP_WEIGHT_FILES[0], metadata={"format": "pt"})
    settings = {"model_cfg": model_cfg(model, name), "preprocess_cfg": preprocess_cfg(processor)}
    write_json(folder / OPEN_CLIP_CONFIG, settings)
    compare(model, processor, folder)
    return tensors


def check_open_clip(config: PreTrainedConfig) -> None:
    """Raise ValueError where open_clip has no such model, ImportError where it is not installed to be compared with."""
    if config.model_type != "siglip":
        raise ValueError(f"open_clip's layout is written of CAPIVARA and SigLIP alone, not of {config.model_type}.")
    vision, text = config.vision_config, config.text_config
    sizes = vision.hidden_size, vision.num_hidden_layers, vision.patch_size
    if sizes not in TIMM or text.hidden_size % text.num_attention_heads:
        raise ValueError(
            f"open_clip has no SigLIP of width, layers and patch {sizes}; there are {', '.join(map(str, TIMM))}."
        )
    require("open_clip's format", "open_clip", "open_clip")


def open_clip_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of open_clip's model; ValueError for one without a counterpart, by its name."""
    positions, result, state = "vision_model.embeddings.position_embedding.weight", {}, model.state_dict()
    state |= {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias")}
    state[positions] = state[positions][None]
    for name, tensor in state.items():
        if part := re.fullmatch(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)", name):
            if part[2] == "q":
                whole = torch.cat([state[f"{part[1]}{letter}_proj.{part[3]}"] for letter in "qkv"])
                kind = "attn.qkv." if name.startswith("vision_model.") else "attn.in_proj_"
                result[_renamed(part[1]).replace("self_attn.", kind) + part[3]] = whole
        elif name.startswith("vision_model.head.attention.in_proj_"):
            kind, width = name.rpartition("_")[2], len(tensor) // 3
            result[f"visual.trunk.attn_pool.q.{kind}"] = tensor[:width].clone()
            result[f"visual.trunk.attn_pool.kv.{kind}"] = tensor[width:].clone()
        else:
            result[_renamed(name)] = tensor.contiguous()
    return result


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            changed = theirs + name[len(ours) :]
            for old, new in BLOCK[changed.partition(".")[0]].items() if ".layers." in name else ():
                changed = changed.replace(old, new)
            return changed
    raise ValueError(f"The tensor {name} has no counterpart in open_clip.")


def model_cfg(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """open_clip's fields of the architecture, with the tokenizer of the repository `name`; a folder has its own."""
    vision, text = model.config.vision_config, model.config.text_config
    tower = TIMM[vision.hidden_size, vision.num_hidden_layers, vision.patch_size]
    side = {"image_size": vision.image_size, "timm_model_name": f"{tower}_{vision.image_size}"}
    side |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    texts = {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": text.layer_norm_eps}, "act_kwargs": {"approximate": "tanh"},
        "mlp_ratio": text.intermediate_size / text.hidden_size, "hf_tokenizer_name": name,
        "tokenizer_kwargs": {"clean": "whitespace"},  # small letters are the tokenizer's own affair
    }  # fmt: skip
    scale = {"init_logit_bias": model.logit_bias.item(), "custom_text": True}
    return {"embed_dim": text.projection_size, **scale, "vision_cfg": side, "text_cfg": texts}


def preprocess_cfg(processor: ProcessorMixin) -> dict[str, Any]:
    """open_clip's fields of the preprocessing."""
    found = processor.image_processor
    interpolation = Resampling(found.resample).name.lower()
    return {"mean": found.image_mean, "std": found.image_std, "interpolation": interpolation, "resize_mode": "squash"}


@torch.inference_mode()
def compare(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Raise ValueError where open_clip's embeddings, of the same pixels and ids, differ by more than rounding."""
    import open_clip

    try:
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    except RuntimeError as error:  # a size that timm lacks
        raise ValueError(f"open_clip can't build this model: {' '.join(str(error).split())}") from error
    ids = pad(processor, tokenise(processor, random_texts()))["input_ids"]
    side = model.config.vision_config.image_size
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts, images = theirs.eval().encode_text(ids, normalize=True), theirs.encode_image(pixels, normalize=True)
    pairs = (text_embeds(model, ids), texts), (image_embeds(model, pixels), images)
    difference = max((ours - found).abs().max().item() for ours, found in pairs)
    if not difference < TOLERANCE:
        raise ValueError(f"open_clip's embeddings differ by {difference:.1e}, above {TOLERANCE:.0e}; nothing was kept.")
