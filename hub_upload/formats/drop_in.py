"""Export only the text encoder of a model, as a drop-in replacement for the text encoder of its base model.

With this format, images that were embedded with the base model can be searched without embedding them again. Both
models must have the same image encoder. These files are written:

    config.json, model.safetensors, tokenizer  text tower, for transformers (SigLIP: the whole text encoder)
    modules.json, 1_Pooling/, 2_Dense/, ...    CAPIVARA only: the whole text encoder, for sentence-transformers
    open_clip_text.safetensors                 text encoder, `logit_scale`, `logit_bias`, with open_clip's tensor names
    onnx/text_model.onnx                       input_ids, attention_mask (CAPIVARA only) -> text_embeds (texts, width)
    drop_in.json                               names of model and base model, and digest of their image encoder
    README.md                                  card with code examples
"""

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from capivara_common.files import read_json, write_json, write_text
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.model_kinds import KINDS
from capivara_common.privacy import get_publishable_model_or_dataset_name
from hub_upload import card_values, formats
from hub_upload.formats import onnx, open_clip, sentence_transformers
from modeling_capivara import convert_open_clip, loading
from modeling_capivara.two_towers import embedding_width

METADATA_FILE = "drop_in.json"
OPEN_CLIP_TEXT_FILE = "open_clip_text.safetensors"
TEXT_ENCODER_PREFIXES = ("text_model.", "text_projection.")  # tensor names of the text encoder start with these
# Python package that contained the module classes of Sentence Transformers before its version 6. Version 6 still
# accepts these class names in modules.json, so they work in all versions (tested with 3.4, 4.1, 5.0, 5.2 and 6.2).
SENTENCE_TRANSFORMERS_MODELS = "sentence_transformers.models"
# Classes of the activation functions that follow the hidden layers and the last layer of the text projection.
HIDDEN_ACTIVATION = "torch.nn.modules.activation.GELU"
OUTPUT_ACTIVATION = "torch.nn.modules.linear.Identity"
logger = logging.getLogger("capivara")


def write_drop_in_text_encoder(
    source: Path, folder: Path, config: PreTrainedConfig, base: str, repo_id: str | None = None
) -> None:
    """Write only the text encoder of a CAPIVARA or SigLIP model, to replace the text encoder of its base model.

    The module docstring lists the files.

    Args:
        source: Folder of the model.
        folder: Empty folder to write to.
        config: Configuration of the model.
        base: Folder or Hub id of the base model.
        repo_id: Hub id that the code examples in the card load. None: they load the current folder.

    Raises:
        ValueError: If the image encoders of the two models differ, their text encoders are equal, or a model is
            damaged.
    """
    base_folder = formats.resolve_compatible_base_folder(source, base)
    model, processor = loading.load_memory_mapped_model(source, config), loading.load_processor(source)
    base_model = loading.load_memory_mapped_model(base_folder, loading.load_two_towers_config(base_folder))
    digest, base_digest = (loading.weights_digest(whole, TEXT_ENCODER_PREFIXES) for whole in (model, base_model))
    if digest == base_digest:
        raise ValueError(
            f"The text encoders of {source} and {base} are bit-identical, so there is nothing to replace. Give a model "
            "whose text encoder was trained."
        )
    is_capivara, length = KINDS[config.model_type].is_native, formats.max_text_tokens(processor)
    dense_folders = _write_text_encoder(model, folder)
    if is_capivara:
        _write_sentence_transformers_config(model, folder, dense_folders)
    values = {"repo_id": repo_id, "length": length}
    values["open_clip"] = _try_write_open_clip_weights(model, source, base_folder, folder)
    _write_tokenizer(processor.tokenizer, folder, length, is_capivara)
    del model, base_model  # frees memory before the ONNX export loads the model
    onnx.write_onnx(folder, source, ["text_model"])
    metadata = {
        "model": get_publishable_model_or_dataset_name(str(source)),
        "base": get_publishable_model_or_dataset_name(base),
        "image_digest": image_encoder_digest(source),
        "width": embedding_width(config),
        "distance": "cosine",
        "unit_length": True,
    }
    write_json(folder / METADATA_FILE, metadata)
    write_text(folder / "README.md", _render_card(source, config, metadata, **values))
    if (source / "LICENSE").is_file():
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")


def _write_text_encoder(model: PreTrainedModel, folder: Path) -> list[str]:
    """Write the text tower for transformers, and its projection as Dense modules of Sentence Transformers.

    Each linear layer of the projection is written to a separate subfolder, such as `2_Dense`.

    Args:
        model: Model with both towers. SigLIP has no separate text projection, so no Dense module is written for it.
        folder: Folder to write to.

    Returns:
        Names of the subfolders of the linear layers, in the order of execution.

    Raises:
        ValueError: If a written tensor differs from the tensor of the model.
    """
    model.text_model.save_pretrained(folder)
    text_tower = loading.load_memory_mapped_tensors([folder / loading.WEIGHTS_FILE])
    written = {f"text_model.{name}": tensor for name, tensor in text_tower.items()}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for name, layer in layers.items() if name.startswith("text_projection")}
    dense_folders = [f"{number}_Dense" for number in range(2, 2 + len(layers))]
    for dense_folder, (name, layer) in zip(dense_folders, layers.items(), strict=True):
        is_last = dense_folder == dense_folders[-1]
        settings = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": False}
        settings["activation_function"] = OUTPUT_ACTIVATION if is_last else HIDDEN_ACTIVATION
        write_json(folder / dense_folder / "config.json", settings)
        weights_file = folder / dense_folder / loading.WEIGHTS_FILE
        formats.save_state_dict({"linear.weight": layer.weight}, weights_file)
        written[f"{name}.weight"] = loading.load_memory_mapped_tensors([weights_file])["linear.weight"]
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TEXT_ENCODER_PREFIXES)}
    formats.check_tensors(folder / loading.WEIGHTS_FILE, written, formats.compute_tensor_digests(expected))
    return dense_folders


def _write_sentence_transformers_config(model: PreTrainedModel, folder: Path, dense_folders: list[str]) -> None:
    """Write the configuration files with which Sentence Transformers loads the text encoder of a CAPIVARA model.

    SigLIP models get no such files, because Sentence Transformers can't load SigLIP's text encoder alone.

    Args:
        model: Model with both towers.
        folder: Folder to write to.
        dense_folders: Subfolders with the layers of the text projection, from `_write_text_encoder`.
    """
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {"word_embedding_dimension": model.config.text_config.hidden_size}
    pooling |= {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
    write_json(folder / "1_Pooling/config.json", pooling)
    classes = {"": "Transformer", "1_Pooling": "Pooling", **dict.fromkeys(dense_folders, "Dense")}
    classes[f"{len(classes)}_Normalize"] = "Normalize"
    sentence_transformers.write_sentence_transformers_pipeline_files(folder, SENTENCE_TRANSFORMERS_MODELS, classes)
    # The setting makes transformers load the text tower without its pooler layer. Mean pooling does not use this layer,
    # and transformers would initialize it at random, because the export has no weights for it.
    kwargs = {"model_args": {"add_pooling_layer": False}} if hasattr(model.text_model, "pooler") else {}
    settings = {"max_seq_length": formats.CONTEXT_LENGTH, "do_lower_case": False} | kwargs
    write_json(folder / "sentence_bert_config.json", settings)


def _try_write_open_clip_weights(model: PreTrainedModel, source: Path, base: Path, folder: Path) -> bool:
    """Write the text encoder with open_clip's tensor names, so that it can be loaded into the base model in open_clip.

    The written tensors are compared with the model.

    Args:
        model: Model with both towers.
        source: Folder of the model.
        base: Folder of the base model.
        folder: Folder to write to.

    Returns:
        True if the file was written. False if open_clip can't represent the model, or if model and base model have
        different tensor names or shapes. In this case, the reason is logged.
    """
    try:
        # The result is not used: the call raises a ValueError if the base model has other tensor names or shapes than
        # the model.
        loading.load_memory_mapped_model(base, model.config)
        has_hf_text = KINDS[model.config.model_type].open_clip_layout == "hf_text"
        if has_hf_text:
            convert_open_clip.to_open_clip_model_cfg(model.config, convert_open_clip.BASE_TEXT_MODEL)
            state = convert_open_clip.to_open_clip_state_dict(model)
        else:
            open_clip.check_siglip_supported(model.config)
            # The whole model is written to a temporary folder, because the comparison of embeddings with open_clip
            # needs both towers.
            with TemporaryDirectory(dir=folder) as temporary:
                state = open_clip.write_open_clip_siglip(source, Path(temporary))
    except (ValueError, ImportError) as error:
        logger.info("The format open_clip is skipped: %s", error)
        return False
    text_state = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    formats.save_state_dict(text_state, folder / OPEN_CLIP_TEXT_FILE)
    if has_hf_text:
        written_text_state = loading.load_memory_mapped_tensors([folder / OPEN_CLIP_TEXT_FILE])
        written = convert_open_clip.to_capivara_state_dict(state | written_text_state)
        formats.check_tensors(folder / OPEN_CLIP_TEXT_FILE, written, formats.compute_tensor_digests(model.state_dict()))
    return True


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, length: int, is_capivara: bool) -> None:
    """Write the files of the tokenizer, so that it can be loaded without the processor of the model.

    CAPIVARA's tokenizer cleans texts with Python code. For programs that don't run this code, normalizer steps are
    added to tokenizer.json, which at least make curly quotes straight and normalize accents.

    Args:
        tokenizer: Tokenizer of the model.
        folder: Folder to write to.
        length: Maximum number of tokens in a text.
        is_capivara: Whether it is CAPIVARA's own tokenizer.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)
    settings = formats.save_tokenizer_for_publication(tokenizer, folder)
    settings.pop("processor_class", None)
    if is_capivara:
        formats.write_tokenizer_json_with_normalizer(folder, read_json(folder / "tokenizer.json"), is_capivara)
        settings["auto_map"] = {"AutoTokenizer": settings["auto_map"]["AutoTokenizer"]}
    write_json(folder / "tokenizer_config.json", settings)


def _render_card(source: Path, config: PreTrainedConfig, metadata: dict[str, Any], **values: Any) -> str:
    """Render the card (README.md) of an exported text encoder.

    The card says with which image embeddings the text encoder is compatible, and how each library loads it.

    Args:
        source: Folder of the model. The license is read from its card, and the language from its run.json.
        config: Configuration of the model.
        metadata: Content of drop_in.json.
        values: Further variables of the Jinja template of the card. `repo_id` is the Hub id that the code examples
            load; with None, they load the current folder. `length` is the maximum number of tokens in a text.
            `open_clip` says whether the file for open_clip was written.

    Returns:
        The text of the card.
    """
    # run.json names the language of the model. The card of a model without run.json has Portuguese examples.
    model_card, language = loading.read_card_metadata(source / "README.md"), "pt"
    if (source / "run.json").is_file():
        language = read_json(source / "run.json", config=dict)["config"]["language"]
    is_capivara = KINDS[config.model_type].is_native
    library = "sentence-transformers" if is_capivara else "transformers"
    tags = ["clip", library] if is_capivara else [config.model_type]
    license = model_card["license"] if model_card.get("license") in card_values.HUB_LICENSES else None
    card_data = {"library_name": library, "license": license}
    card_data["tags"] = ["capivara", *tags, "onnx", *["open_clip"] * values["open_clip"]]
    texts = [f"{number} text in {card_values.escape_value_for_markdown(language)}" for number in ("a", "another")]
    names = ("model", "base", "image_digest")
    return card_values.MARKDOWN_TEMPLATES.get_template("drop_in.md.j2").render(
        metadata | {name: card_values.format_as_markdown_code_or_escaped_text(metadata[name]) for name in names},
        metadata=ModelCardData(pipeline_tag="feature-extraction", **card_data),
        is_capivara=is_capivara,
        examples=card_values.select_code_example_inputs(language, texts)["texts"],
        **values,
    )
