"""The text side alone, for whoever has pictures embedded with the base: these stay, and better sentences find them.

    config.json, model.safetensors, tokenizer  the text tower, which transformers opens; of SigLIP the whole text side
    modules.json, 1_Pooling/, 2_Dense/, ...    CAPIVARA's: with it the whole text side, for sentence-transformers
    open_clip_text.safetensors                 `text.*`, `logit_scale` and `logit_bias`, under open_clip's names
    onnx/text_model.onnx                       input_ids, CAPIVARA's attention_mask -> text_embeds (texts, width)
    drop_in.json, README.md                    which pictures it is for

Before anything is written it is proved that the model embeds pictures as the base does, to the bit.
"""

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCardData
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.files import read_json, write_json, write_text
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.privacy import short_name
from capivara_common.weight_file import find_weight_files
from hub_upload import formats
from hub_upload.card_values import HUB_LICENSES, MARKDOWN_TEMPLATES, select_code_examples, to_code, to_markdown
from hub_upload.formats import max_text_tokens, onnx, open_clip
from hub_upload.formats.open_clip import check_tensors, compute_tensor_digests, save_state_dict
from modeling_capivara.convert_open_clip import (
    BASE_TEXT_MODEL,
    to_capivara_state_dict,
    to_open_clip_model_cfg,
    to_open_clip_state_dict,
)
from modeling_capivara.loading import (
    WEIGHTS_FILE,
    load_mapped_model,
    load_mapped_tensors,
    load_processor,
    read_card_metadata,
)
from modeling_capivara.two_towers import embedding_width

METADATA_FILE, OPEN_CLIP_TEXT_FILE = "drop_in.json", "open_clip_text.safetensors"
TEXT_ENCODER_PREFIXES = ("text_model.", "text_projection.")
# Names of before version 6, which reads them, too (tried: 3.4, 4.1, 5.0, 5.2, 6.2).
SENTENCE_TRANSFORMERS_MODELS = "sentence_transformers.models"
HIDDEN_ACTIVATION, OUTPUT_ACTIVATION = (
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.linear.Identity",
)  # what follows a matrix
logger = logging.getLogger("capivara")


def write_drop_in(source: Path, folder: Path, config: PreTrainedConfig, base: str, repo_id: str | None = None) -> None:
    """Write the text side of the model in `source`, CAPIVARA's or SigLIP's, into an empty folder.

    Raises ValueError where the model embeds pictures otherwise than the base (the first tensor or setting that differs
    is named), its text side is the base's, too, or one of the two is damaged.
    """
    base_folder = formats.resolve_base_folder(source, base)
    if compute_tensor_digests(_load_text_tensors(source)) == compute_tensor_digests(_load_text_tensors(base_folder)):
        raise ValueError(f"The text side of {source} is that of {base}, to the bit: there is nothing to exchange.")
    model, processor, is_own = (
        load_mapped_model(source, config),
        load_processor(source),
        config.model_type == "capivara",
    )
    about = {"is_own": is_own, "length": max_text_tokens(processor)}
    denses = _write_text_tower(model, folder)
    if is_own:
        _write_sentence_transformers(model, folder, denses)
    about["open_clip"] = _write_open_clip(model, source, base_folder, folder)
    _write_tokenizer(processor.tokenizer, folder, max_text_tokens(processor), is_own)
    del model
    onnx.write_onnx(folder, source, ["text_model"])
    facts = {
        "model": short_name(str(source)),
        "base": short_name(base),
        "image_digest": image_encoder_digest(source),
        "width": embedding_width(config),
        "distance": "cosine",
        "unit_length": True,
    }
    write_json(folder / METADATA_FILE, facts)
    write_text(folder / "README.md", _render_card(source, folder, facts, repo_id, **about))
    if (source / "LICENSE").is_file():
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")


def _load_text_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = load_mapped_tensors(find_weight_files(folder))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT_ENCODER_PREFIXES)}


def _write_text_tower(model: PreTrainedModel, folder: Path) -> list[str]:
    """The tower, and each matrix of the projection in a folder of its own, compared with the model; their names."""
    model.text_model.save_pretrained(folder)
    written = {f"text_model.{name}": tensor for name, tensor in load_mapped_tensors([folder / WEIGHTS_FILE]).items()}
    matrices = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    matrices = {name: part for name, part in matrices.items() if name.startswith("text_projection")}
    denses = [f"{number}_Dense" for number in range(2, 2 + len(matrices))]
    for dense, (name, matrix) in zip(denses, matrices.items(), strict=True):
        settings = {"in_features": matrix.in_features, "out_features": matrix.out_features, "bias": False}
        settings["activation_function"] = OUTPUT_ACTIVATION if dense == denses[-1] else HIDDEN_ACTIVATION
        write_json(folder / dense / "config.json", settings)
        save_state_dict({"linear.weight": matrix.weight}, folder / dense / WEIGHTS_FILE)
        written[f"{name}.weight"] = load_mapped_tensors([folder / dense / WEIGHTS_FILE])["linear.weight"]
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TEXT_ENCODER_PREFIXES)}
    check_tensors(folder / WEIGHTS_FILE, written, compute_tensor_digests(expected))
    return denses


def _write_sentence_transformers(model: PreTrainedModel, folder: Path, dense_folders: list[str]) -> None:
    """What sentence-transformers makes of CAPIVARA's tower and matrices; of SigLIP's tower it makes nothing."""
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {"word_embedding_dimension": model.config.text_config.hidden_size}
    pooling |= {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
    write_json(folder / "1_Pooling/config.json", pooling)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", **dict.fromkeys(dense_folders, "Dense")}
    kinds[f"{len(kinds)}_Normalize"] = "Normalize"
    open_clip.write_sentence_modules(
        folder, [(path, f"{SENTENCE_TRANSFORMERS_MODELS}.{kind}") for path, kind in kinds.items()]
    )
    # transformers' own encoders come with a pooler that mean pooling leaves unused, and would draw one at random.
    kwargs = {"model_args": {"add_pooling_layer": False}} if hasattr(model.text_model, "pooler") else {}
    settings = {"max_seq_length": formats.CONTEXT_LENGTH, "do_lower_case": False} | kwargs
    write_json(folder / "sentence_bert_config.json", settings)


def _write_open_clip(model: PreTrainedModel, source: Path, base: Path, folder: Path) -> bool:
    """The text side for open_clip's model of the base, compared with the model; False where it does not fit there."""
    try:
        load_mapped_model(base, model.config)  # as without the same tensors no state dict can be exchanged
        if is_own := model.config.model_type == "capivara":
            to_open_clip_model_cfg(model.config, BASE_TEXT_MODEL)
            state = to_open_clip_state_dict(model)
        else:
            open_clip.check_siglip_supported(model.config)
            with TemporaryDirectory(dir=folder) as place:  # the whole model, with which it is compared
                state = open_clip.write_open_clip_siglip(source, Path(place), short_name(str(source)))
    except (ValueError, ImportError) as error:
        logger.info("open_clip is left out: %s", error)
        return False
    ours = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    save_state_dict(ours, folder / OPEN_CLIP_TEXT_FILE)
    if is_own:
        written = to_capivara_state_dict(state | load_mapped_tensors([folder / OPEN_CLIP_TEXT_FILE]))
        check_tensors(folder / OPEN_CLIP_TEXT_FILE, written, compute_tensor_digests(model.state_dict()))
    return True


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, length: int, is_capivara: bool) -> None:
    """The tokenizer for texts alone; CAPIVARA's with its code, without which curly quotation marks are plain, too."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)
    settings = formats.save_tokenizer(tokenizer, folder)
    settings.pop("processor_class", None)
    if is_capivara:
        formats.write_tokenizer_json(folder, read_json(folder / "tokenizer.json"), is_capivara)
        settings["auto_map"] = {"AutoTokenizer": settings["auto_map"]["AutoTokenizer"]}
    write_json(folder / "tokenizer_config.json", settings)


def _render_card(source: Path, folder: Path, metadata: dict[str, Any], repo_id: str | None, **values: Any) -> str:
    """README.md: for which indexes it holds, and how each program opens it. Its figures have been measured just now."""
    known, language = (
        read_card_metadata(source / "README.md"),
        "pt",
    )  # of a model that doesn't say in which it was trained
    if (source / "run.json").is_file():
        language = read_json(source / "run.json", config=dict)["config"]["language"]
    library, *tags = ["sentence-transformers", "clip"] if values["is_own"] else ["transformers", "siglip"]
    tags += ["sentence-transformers"] * values["is_own"] + ["onnx"] + ["open_clip"] * values["open_clip"]
    licence = known["license"] if known.get("license") in HUB_LICENSES else None
    about = {"library_name": library, "license": licence, "tags": ["capivara", *tags]}
    texts = [f"{number} text in {to_markdown(language)}" for number in ("a", "another")]
    return MARKDOWN_TEMPLATES.get_template("drop_in.md.j2").render(
        **metadata | {name: to_code(metadata[name]) for name in ("model", "base", "image_digest")},
        **values,
        metadata=ModelCardData(pipeline_tag="feature-extraction", **about),
        repo_id=repo_id,
        examples=select_code_examples(language, texts)["texts"],
    )
