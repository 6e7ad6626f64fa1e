"""The text side alone, for whoever has pictures embedded with the base: these stay, and better sentences find them.

    config.json, model.safetensors, tokenizer  the text tower, which transformers opens
    modules.json, 1_Pooling/, 2_Dense/, ...    with it the whole text side, which sentence-transformers opens
    open_clip_text.safetensors                 `text.*` and `logit_scale`, under open_clip's names
    onnx/text_model.onnx                       input_ids, attention_mask (texts, tokens) -> text_embeds (texts, width)
    drop_in.json, README.md                    which pictures it is for

`hub_upload.export` calls it. Before anything is written it proves that the model embeds pictures as the base does, to
the bit: the same tensors `vision_model.*` and `visual_projection.*`, and the same preprocessing.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from safetensors.torch import save_file
from torch import nn

from capivara_common.environment import require
from capivara_common.files import read_json, write_json, write_text
from capivara_common.image_side_digest import image_side_digest
from capivara_common.privacy import hide_paths, short_name
from capivara_common.weight_file import weight_files
from hub_upload.card_facts import LICENCES
from hub_upload.card_values import MARKDOWN_TEMPLATES, code, code_examples, escaped
from hub_upload.formats import (
    base_of,
    check_tensors,
    onnx,
    open_clip,
    read_config,
    tensor_digests,
    write_plain_tokenizer,
)
from modeling_capivara import CapivaraModel
from modeling_capivara.convert_open_clip import (
    BASE_TEXT_MODEL,
    capivara_state_dict,
    open_clip_model_cfg,
    open_clip_state_dict,
)
from modeling_capivara.loading import WEIGHTS, card_metadata, load_processor, mapped_model, mapped_tensors
from modeling_capivara.processing_capivara import CONTEXT_LENGTH

FACTS, OPEN_CLIP_TEXT = "drop_in.json", "open_clip_text.safetensors"
TEXT_SIDE = ("text_model.", "text_projection.")
# Names of before version 6, which reads them, too (tried: 3.4, 4.1, 5.0, 5.2, 6.2).
MODULES = "sentence_transformers.models"
BETWEEN, LAST = "torch.nn.modules.activation.GELU", "torch.nn.modules.linear.Identity"  # what follows a matrix
logger = logging.getLogger("capivara")


def write(source: Path, folder: Path, base: str, repo_id: str | None = None) -> None:
    """Write the text side of a model into an empty folder.

    Raises:
        ValueError: the model embeds pictures otherwise than the base (the first tensor or setting that differs is
            named), its text side is the base's, too, or one of the two is damaged.
        ImportError: a package of ONNX is missing.
        OSError: the disk is full.
    """
    require("--formats drop_in", "onnx", *onnx.ONNX_PACKAGES)
    config, base_folder = read_config(source, "drop_in"), base_of(source, base)
    if _text_digests(source) == _text_digests(base_folder):
        raise ValueError(f"The text side of {source} is that of {base}, to the bit: there is nothing to exchange.")
    model = mapped_model(source, config)
    denses = _write_sentence_transformers(model, folder)
    has_open_clip = _write_open_clip(model, base_folder, folder)
    del model
    _write_tokenizer(source, folder)
    onnx.write_onnx(folder, source, ["text_model"])
    facts = {
        "model": short_name(str(source)),
        "base": short_name(base),
        "image_digest": image_side_digest(source),
        "width": config.projection_dim,
        "distance": "cosine",
        "unit_length": True,
    }
    write_json(folder / FACTS, facts)
    write_text(folder / "README.md", _card(source, folder, facts, denses, has_open_clip, repo_id))
    if (source / "LICENSE").is_file():
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")


def _text_digests(folder: Path) -> dict[str, str]:
    tensors = mapped_tensors(weight_files(folder))
    return tensor_digests({name: tensor for name, tensor in tensors.items() if name.startswith(TEXT_SIDE)})


def _write_sentence_transformers(model: CapivaraModel, folder: Path) -> list[str]:
    """The tower, and each matrix of the projection as a module of its own; returns the names of their folders.

    The written tensors are compared with the model's.
    """
    model.text_model.save_pretrained(folder)
    written = {f"text_model.{name}": tensor for name, tensor in mapped_tensors([folder / WEIGHTS]).items()}
    matrices = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    matrices = {name: part for name, part in matrices.items() if name.startswith("text_projection")}
    denses = [f"{number}_Dense" for number in range(2, 2 + len(matrices))]
    for dense, (name, matrix) in zip(denses, matrices.items(), strict=True):
        settings = {"in_features": matrix.in_features, "out_features": matrix.out_features, "bias": False}
        settings["activation_function"] = LAST if dense == denses[-1] else BETWEEN
        write_json(folder / dense / "config.json", settings)
        save_file({"linear.weight": matrix.weight.detach()}, folder / dense / WEIGHTS, metadata={"format": "pt"})
        written[f"{name}.weight"] = mapped_tensors([folder / dense / WEIGHTS])["linear.weight"]
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TEXT_SIDE)}
    check_tensors(folder / WEIGHTS, written, tensor_digests(expected))
    write_json(folder / "1_Pooling/config.json", _pooling(model.config.text_config.hidden_size))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", **dict.fromkeys(denses, "Dense")}
    kinds[f"{len(kinds)}_Normalize"] = "Normalize"
    open_clip.write_modules(folder, [(path, f"{MODULES}.{kind}") for path, kind in kinds.items()])
    # transformers' own encoders come with a pooler that mean pooling leaves unused, and would draw one at random.
    kwargs = {"model_args": {"add_pooling_layer": False}} if hasattr(model.text_model, "pooler") else {}
    settings = {"max_seq_length": CONTEXT_LENGTH, "do_lower_case": False} | kwargs
    write_json(folder / "sentence_bert_config.json", settings)
    return denses


def _pooling(width: int) -> dict[str, Any]:
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    return {"word_embedding_dimension": width} | {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}


def _write_open_clip(model: CapivaraModel, base: Path, folder: Path) -> bool:
    """The text side for open_clip's model of the base, compared with the model; False where it does not fit there."""
    try:
        open_clip_model_cfg(model.config, BASE_TEXT_MODEL)
        mapped_model(base, model.config)  # as without the same tensors no state dict can be exchanged
    except ValueError as error:
        logger.info("open_clip is left out: %s", error)
        return False
    state = open_clip_state_dict(model)
    ours = {name: tensor.detach().contiguous() for name, tensor in state.items() if not name.startswith("visual.")}
    save_file(ours, folder / OPEN_CLIP_TEXT, metadata={"format": "pt"})
    written = capivara_state_dict(state | mapped_tensors([folder / OPEN_CLIP_TEXT]))
    check_tensors(folder / OPEN_CLIP_TEXT, written, tensor_digests(model.state_dict()))
    return True


def _write_tokenizer(model: Path, folder: Path) -> None:
    """The tokenizer with its code, for texts alone; without the code, curly quotation marks are plain, too."""
    tokenizer = load_processor(model).tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    write_plain_tokenizer(folder, read_json(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = hide_paths(read_json(path))
    for name in ("is_local", "local_files_only", "processor_class"):
        settings.pop(name, None)
    settings["auto_map"] = {"AutoTokenizer": settings["auto_map"]["AutoTokenizer"]}
    write_json(path, settings)


def _language(model: Path) -> str:
    """Code of the language that a model was trained in; of one that doesn't say so, Portuguese, which is CAPIVARA's."""
    return read_json(model / "run.json", config=dict)["config"]["language"] if (model / "run.json").is_file() else "pt"


def _card(
    source: Path, folder: Path, facts: dict[str, Any], denses: list[str], has_open_clip: bool, repo_id: str | None
) -> str:
    """README.md: for which indexes it holds, and how each program opens it. Its figures have been measured just now."""
    known, language = card_metadata(source / "README.md"), escaped(_language(source))
    metadata = {"library_name": "sentence-transformers", "pipeline_tag": "feature-extraction"}
    metadata |= {"license": known["license"]} if known.get("license") in LICENCES else {}
    metadata["tags"] = ["capivara", "clip", "sentence-transformers", "onnx", *["open_clip"] * has_open_clip]
    return MARKDOWN_TEMPLATES.get_template("drop_in.md.j2").render(
        **facts | {name: code(facts[name]) for name in ("model", "base", "image_digest")},
        metadata=yaml_dump(metadata).strip(),
        repo_id=repo_id,
        examples=code_examples(language, [f"a text in {language}", f"another text in {language}"])["sentences"],
        denses=denses,
        open_clip=has_open_clip,
        graphs=read_json(folder / "onnx/quantisation.json")["graphs"],
        length=CONTEXT_LENGTH,
        pooler="model_args" in read_json(folder / "sentence_bert_config.json"),
    )
