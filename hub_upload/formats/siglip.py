"""What open_clip and sentence-transformers read of a SigLIP or SigLIP 2 model of fixed resolution.

    python -m hub_upload.formats.siglip runs/siglip2          # writes beside the files of transformers
    open_clip.create_model_from_pretrained("local-dir:runs/siglip2")

open_clip's layout is that of its own ViT-…-SigLIP2: timm's image tower with attention pooling, its own text tower. All
tensors have a counterpart; query, key and value are one tensor there. What was written is loaded by open_clip and
compared with transformers before the command ends.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from capivara_common.cli import flag, parse, run_command, user_errors
from capivara_common.environment import require
from capivara_common.files import write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES
from hub_upload.formats.open_clip import write_sentence_transformers
from modeling_capivara.embedder import random_texts
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import image_embeds, pad, text_embeds, tokenise

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


@dataclass
class SiglipArguments:
    """Arguments of `hub_upload.formats.siglip`."""

    model: Path = flag(..., "Folder of a SigLIP model, such as that of a run, to write into.", positional=True)
    repo_id: str | None = flag(
        None, "Where it will be on the Hub: open_clip's `hf-hub:` takes the tokenizer from there."
    )


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(SiglipArguments, __doc__, argv)
    require("open_clip's format", "open_clip", "open_clip")
    model, processor = load_model(args.model).eval(), load_processor(args.model)
    if model.config.model_type != "siglip":
        raise ValueError(f"{args.model} is a {type(model).__name__}; these files are of a SigLIP.")
    settings = model_cfg(model, args.repo_id or args.model.resolve().name)
    length = settings["text_cfg"]["context_length"]
    with tempfile.TemporaryDirectory(dir=args.model) as place:  # nothing is kept where open_clip gives other numbers
        folder = Path(place)
        processor.save_pretrained(folder)
        own = {path.name for path in folder.iterdir()}
        save_file(open_clip_tensors(model), folder / OPEN_CLIP_WEIGHT_FILES[0])
        write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": settings, "preprocess_cfg": preprocess_cfg(processor)})
        write_sentence_transformers(folder, {"padding": "max_length", "max_length": length})
        difference = compare(model, processor, folder)
        for path in folder.iterdir():
            if path.name not in own:
                shutil.rmtree(args.model / path.name, ignore_errors=True)
                path.replace(args.model / path.name)
    print(f"Written into {args.model}; open_clip's embeddings differ by at most {difference:.1e}.")


def open_clip_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of open_clip's model; ValueError for one without a counterpart, by its name."""
    result, state = {}, model.state_dict()
    for name, tensor in state.items():
        if part := re.fullmatch(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)", name):
            if part[2] == "q":
                whole = torch.cat([state[f"{part[1]}{letter}_proj.{part[3]}"] for letter in "qkv"])
                prefix, visual = _renamed(part[1]), name.startswith("vision_model.")
                result[prefix.replace("self_attn.", f"attn.{'qkv.' if visual else 'in_proj_'}{part[3]}")] = whole
        elif name.startswith("vision_model.head.attention.in_proj_"):
            kind, width = name.rpartition("_")[2], len(tensor) // 3
            result[f"visual.trunk.attn_pool.q.{kind}"] = tensor[:width].clone()
            result[f"visual.trunk.attn_pool.kv.{kind}"] = tensor[width:].clone()
        else:
            shape = {
                "logit_scale": (),
                "logit_bias": (),
                "vision_model.embeddings.position_embedding.weight": (1, *tensor.shape),
            }
            result[_renamed(name)] = tensor.reshape(shape.get(name, tensor.shape)).contiguous()
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
    """open_clip's fields of the architecture, with the tokenizer of the repository `name`; a folder has its own.

    Raises ValueError where timm has no such image tower.
    """
    vision, text = model.config.vision_config, model.config.text_config
    sizes = vision.hidden_size, vision.num_hidden_layers, vision.patch_size
    if sizes not in TIMM or text.hidden_size % text.num_attention_heads:
        raise ValueError(
            f"open_clip has no SigLIP of width, layers and patch {sizes}; there are {', '.join(map(str, TIMM))}."
        )
    side = {"image_size": vision.image_size, "timm_model_name": f"{TIMM[sizes]}_{vision.image_size}"}
    side |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    texts = {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": text.layer_norm_eps}, "act_kwargs": {"approximate": "tanh"},
        "mlp_ratio": text.intermediate_size / text.hidden_size, "hf_tokenizer_name": name,
        "tokenizer_kwargs": {"clean": "lower"},
    }  # fmt: skip
    scale = {"init_logit_bias": model.logit_bias.item(), "custom_text": True}
    return {"embed_dim": text.projection_size, **scale, "vision_cfg": side, "text_cfg": texts}


def preprocess_cfg(processor: ProcessorMixin) -> dict[str, Any]:
    """open_clip's fields of the preprocessing."""
    found = processor.image_processor
    interpolation = Resampling(found.resample).name.lower()
    return {"mean": found.image_mean, "std": found.image_std, "interpolation": interpolation, "resize_mode": "squash"}


@torch.inference_mode()
def compare(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> float:
    """The largest difference of embeddings, of the same pixels and ids. Raises ValueError where it is no rounding."""
    import open_clip

    try:
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    except RuntimeError as error:  # a size that timm lacks
        raise ValueError(f"open_clip can't build this model: {' '.join(str(error).split())}") from error
    ids = pad(processor, tokenise(processor, random_texts()))["input_ids"]
    side = model.config.vision_config.image_size
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = (text_embeds(model, ids), theirs.eval().encode_text(ids, normalize=True)), (
        image_embeds(model, pixels), theirs.encode_image(pixels, normalize=True)
    )  # fmt: skip
    difference = max((ours - found).abs().max().item() for ours, found in pairs)
    if not difference < TOLERANCE:
        raise ValueError(f"open_clip's embeddings of {folder} differ by {difference:.1e}, above {TOLERANCE:.0e}.")
    return difference


if __name__ == "__main__":
    run_command(main)
