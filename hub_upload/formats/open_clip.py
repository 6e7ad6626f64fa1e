"""Export a CAPIVARA or SigLIP model in the format of open_clip.

For a SigLIP model, this module writes and checks the whole export. For a CAPIVARA model, it only builds the
configuration, and `hub_upload/export.py` writes the weights.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.environment import require_packages
from capivara_common.files import write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES
from capivara_common.model_kinds import KINDS
from capivara_common.privacy import get_publishable_model_or_dataset_name
from hub_upload.formats import check_embedding_difference, save_state_dict
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, convert_open_clip
from modeling_capivara.loading import build_save_only_model_from_tensors, load_model, load_processor
from modeling_capivara.two_towers import compute_image_embeds, compute_text_embeds, pad_batch, random_texts, tokenize

OPEN_CLIP_WEIGHTS_FILE = OPEN_CLIP_WEIGHT_FILES[0]
# Fields of the text tower's configuration that change its output. Other fields concern training and text generation.
TEXT_CONFIG_FIELDS = (
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "layer_norm_eps max_position_embeddings type_vocab_size pad_token_id"
)
# The tokenizer type "xlm-roberta-xl" makes open_clip use tokenizer.json as it is. With "xlm-roberta", open_clip would
# build the tokenizer again without its normalizer, which cleans texts. Without a type, open_clip would read
# config.json, and ask the user on the terminal whether to run the Python code that config.json names.
TOKENIZER_SETTINGS = {"tokenizer_type": "xlm-roberta-xl"}
logger = logging.getLogger("capivara")


def choose_and_check_text_config_id(config: CapivaraConfig, text_config: str | None) -> str | None:
    """Choose the Hub id from which open_clip loads the text tower's configuration, and check the configuration.

    Args:
        config: Configuration of the model.
        text_config: Hub id that the user chose with --text_config. None: XLM-RoBERTa base.

    Returns:
        The Hub id. None if `text_config` is None and the text tower of the model is not XLM-RoBERTa base.

    Raises:
        ValueError: If `text_config` is not the Hub id of a text model, or this configuration differs from the text
            tower's. The message names the fields that differ.
    """
    # The default text tower of a `CapivaraConfig` is XLM-RoBERTa base, so its configuration need not be downloaded.
    base = CapivaraConfig().text_config
    if text_config is None:
        return None if _describe_config_differences(config.text_config, base) else convert_open_clip.BASE_TEXT_MODEL
    try:
        if Path(text_config).is_dir():
            raise ValueError("it is a folder on this machine, which users of the model do not have")
        is_base = text_config in convert_open_clip.BASE_TEXT_NAMES
        hub_config = base if is_base else AutoConfig.from_pretrained(text_config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"text_config must be the Hub id of a text model, got {text_config!r}: {reason}") from error
    # open_clip loads this configuration from the Hub and not from the exported folder. With another configuration than
    # the model's, it would build a wrong text tower.
    if differences := _describe_config_differences(config.text_config, hub_config):
        raise ValueError(f"text_config {text_config} differs from the model's text tower: {'; '.join(differences)}.")
    return text_config


def build_open_clip_config(
    config: CapivaraConfig, image_processor: CapivaraImageProcessor, text_config: str | None, repo_id: str | None
) -> dict[str, Any] | None:
    """Build the content of open_clip_config.json, from which open_clip builds a CAPIVARA model.

    If open_clip is installed, this function also checks that open_clip can build the model.

    Args:
        config: Configuration of the model.
        image_processor: Image processor of the model.
        text_config: Hub id from which open_clip loads the text tower's configuration. None: XLM-RoBERTa base.
        repo_id: Hub id from which open_clip loads the tokenizer. None: the Hub id of the text tower's
            configuration.

    Returns:
        A dict with the keys "model_cfg" and "preprocess_cfg". None if `text_config` is None, but the text tower is not
        XLM-RoBERTa base.

    Raises:
        ValueError: If open_clip can't represent the model, or `text_config` is invalid.
    """
    source = choose_and_check_text_config_id(config, text_config)
    if source is None:
        vocabulary = f" (trimmed to {config.text_config.vocab_size:,} tokens)" if config.trimmed_vocabulary else ""
        logger.info(
            "The format open_clip is skipped: it loads the text tower's configuration from XLM-RoBERTa base, but this "
            "text tower differs%s. Publish its config.json on the Hub and pass the id with --text_config.", vocabulary,
        )  # fmt: skip
        return None
    preprocess_cfg = convert_open_clip.to_preprocess_cfg(image_processor)
    model_cfg = convert_open_clip.to_open_clip_model_cfg(config, source, dict(image_processor.size)["shortest_edge"])
    if find_spec("open_clip"):
        try:
            with torch.device("meta"):  # needs no memory for weights
                theirs = convert_open_clip.new_open_clip_model(config)
                tensors = convert_open_clip.to_capivara_state_dict(theirs.state_dict())
                build_save_only_model_from_tensors(tensors, config, "Its tensors")
        # The names or shapes of the tensors may differ, for example with a few timm image towers whose output has
        # another width in open_clip.
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"open_clip can't build this model: {' '.join(str(error).split())}") from error
    # If a user loads the model by a name that starts with `hf-hub:`, open_clip loads the tokenizer from this Hub id. If
    # the name starts with `local-dir:`, open_clip loads the tokenizer from the local folder.
    tokenizer = model_cfg["text_cfg"]["hf_tokenizer_name"] = repo_id or source
    model_cfg["text_cfg"]["tokenizer_kwargs"] = TOKENIZER_SETTINGS
    logger.info("open_clip: configuration of the text tower from %s, tokenizer from %s.", source, tokenizer)
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def _describe_config_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    """Compare two configurations of text towers in the fields that change the output (`TEXT_CONFIG_FIELDS`).

    Args:
        ours: Configuration of the model's text tower.
        theirs: Configuration that open_clip would load.

    Returns:
        A description of each field that differs, such as "vocab_size is 250002, not 50000": first the value in
        `theirs`, then the value in `ours`.
    """
    pairs = {name: (getattr(ours, name, None), getattr(theirs, name, None)) for name in TEXT_CONFIG_FIELDS.split()}
    return [f"{name} is {theirs!r}, not {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]


# --- SigLIP in the layout of open_clip's ViT-…-SigLIP2 ---------------------------------------------------------------

# Maps the sizes of a SigLIP image tower (width, number of layers, patch size) to the name of this tower in the library
# timm. In timm, the image size is added to the end of the name.
TIMM_TOWERS = {(768, 12, 16): "vit_base_patch16_siglip", (768, 12, 32): "vit_base_patch32_siglip"}
TIMM_TOWERS |= {(1024, 24, 16): "vit_large_patch16_siglip", (1152, 27, 14): "vit_so400m_patch14_siglip"}
TIMM_TOWERS |= {(1152, 27, 16): "vit_so400m_patch16_siglip", (1536, 40, 16): "vit_giantopt_patch16_siglip"}


def check_siglip_supported(config: PreTrainedConfig) -> None:
    """Check that open_clip has an architecture that can load the weights of a SigLIP model.

    Args:
        config: Configuration of the model.

    Raises:
        ValueError: If the model is not a SigLIP model, or open_clip has no SigLIP model of this architecture.
        ImportError: If open_clip is not installed.
    """
    if KINDS[config.model_type].open_clip_layout != "timm_siglip":
        raise ValueError(
            f"open_clip's format supports CAPIVARA and SigLIP only, but this is a {config.model_type} model."
        )
    sizes, text = _tower_sizes(config), config.text_config
    if sizes not in TIMM_TOWERS or text.hidden_size % text.num_attention_heads:
        known = ", ".join(map(str, TIMM_TOWERS))
        raise ValueError(f"open_clip has no SigLIP of (width, layers, patch size) {sizes}, only of {known}.")
    require_packages("open_clip's format", "open-clip", "open_clip")


def _tower_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return the sizes of the image tower that a SigLIP configuration describes.

    Args:
        config: Configuration of the SigLIP model.

    Returns:
        Width of the image tower, number of its layers, and width of a patch in pixels.
    """
    return config.vision_config.hidden_size, config.vision_config.num_hidden_layers, config.vision_config.patch_size


def write_open_clip_siglip(source: Path, folder: Path, repo_id: str | None = None) -> dict[str, Tensor]:
    """Write a SigLIP model in open_clip's format, and check that open_clip computes the same embeddings.

    Call `check_siglip_supported` first.

    Args:
        source: Folder of the model.
        folder: Folder to write to.
        repo_id: Hub id from which open_clip loads the tokenizer. None: the configuration names the model's folder
            instead.

    Returns:
        The written weights as a dict {tensor name in open_clip: tensor of the model}.

    Raises:
        ValueError: If open_clip can't build the model, or open_clip's embeddings differ from the model's.
    """
    model, processor = load_model(source).eval(), load_processor(source)
    vision, text = model.config.vision_config, model.config.text_config
    tokenizer_name = repo_id or get_publishable_model_or_dataset_name(str(source))
    timm_name = f"{TIMM_TOWERS[_tower_sizes(model.config)]}_{vision.image_size}"
    vision_cfg = {"image_size": vision.image_size, "timm_model_name": timm_name}
    vision_cfg |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    text_cfg = {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": text.layer_norm_eps}, "act_kwargs": {"approximate": "tanh"},
        "mlp_ratio": text.intermediate_size / text.hidden_size, "hf_tokenizer_name": tokenizer_name,
        # With this setting, open_clip cleans up white space, but does not convert texts to lowercase. If a model needs
        # lowercase texts, its own tokenizer converts them.
        "tokenizer_kwargs": {"clean": "whitespace"},
    }  # fmt: skip
    model_cfg = {"embed_dim": text.projection_size, "init_logit_bias": model.logit_bias.item(), "custom_text": True}
    model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
    state = convert_open_clip.to_open_clip_state_dict(model)
    save_state_dict(state, folder / OPEN_CLIP_WEIGHTS_FILE)
    preprocess_cfg = convert_open_clip.to_preprocess_cfg(processor.image_processor)
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    _check_open_clip_embeddings(model, processor, folder)
    return state


@torch.inference_mode()
def _check_open_clip_embeddings(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Check that open_clip and the model compute the same embeddings from the same pixels and token ids.

    Args:
        model: SigLIP model.
        processor: Processor of the model.
        folder: Folder of the export, from which open_clip loads the model.

    Raises:
        ValueError: If open_clip can't build the model, or a component of an embedding differs by `EMBEDDING_TOLERANCE`
            or more.
    """
    import open_clip

    try:
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    # open_clip raises this error, for example, if the library timm has no tower for the image size of the model.
    except RuntimeError as error:
        raise ValueError(f"open_clip can't build this model: {' '.join(str(error).split())}") from error
    ids = pad_batch(processor, tokenize(processor, random_texts()))["input_ids"]
    image_size = model.config.vision_config.image_size
    pixels = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts, images = theirs.eval().encode_text(ids, normalize=True), theirs.encode_image(pixels, normalize=True)
    pairs = (compute_text_embeds(model, ids), texts), (compute_image_embeds(model, pixels), images)
    check_embedding_difference("open_clip", pairs)
