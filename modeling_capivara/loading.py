"""Load two-tower models (CAPIVARA and CLIP-like models of transformers) and their processors from folders or the Hub.

The functions are stricter than transformers. A weight that is missing, unexpected or of the wrong shape raises a
ValueError, where transformers only warns.
"""

import hashlib
import html
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.gemma import GemmaTokenizer
from transformers.models.siglip2 import Siglip2Tokenizer

from capivara_common.cli import make_coded_error
from capivara_common.files import read_json
from capivara_common.hub_cache import check_hub_model_reachable, looks_like_hub_id
from capivara_common.model_kinds import ANY_SIZE_VISION_TOWERS, KINDS, get_supported_model_kind
from capivara_common.weight_file import find_weight_files, read_scalar

from .checks_capivara import PADDING_MODEL_TYPES, check_config_ranges, wrap_tokenizer_errors
from .configuration_capivara import collect_config_values_to_check

WEIGHTS_FILE = "model.safetensors"
MAX_NAMED_KEYS = 5  # a model has hundreds of weights, so error messages name at most this many
# Metadata fields that the card of a converted or trimmed model copies from the card of the original model.
INHERITED_CARD_FIELDS = ("license", "license_name", "license_link", "language", "attribution")
ORIGIN_CARD_TEXT = "For a description, the training data and the license, see the card of the original model."


def load_transformers_config(source: str, **options: Any) -> PreTrainedConfig:
    """Load and validate the configuration of any transformers model.

    Args:
        source: Folder or Hub id.
        **options: Options of `AutoConfig.from_pretrained`, such as `revision`. `trust_remote_code` is False by default.

    Returns:
        The configuration.

    Raises:
        OSError: If there is no configuration.
        ValueError: If the configuration is damaged, or a size is outside the limits in `checks_capivara.py`.
    """
    try:
        check_config_ranges(PreTrainedConfig.get_config_dict(source, revision=options.get("revision"))[0])
        config = AutoConfig.from_pretrained(source, **{"trust_remote_code": False, **options})
        # The second check finds sizes that a model type stores under its own names, which only its configuration class
        # knows.
        check_config_ranges(collect_config_values_to_check(config))
    except OSError:
        raise
    except Exception as error:  # damaged files make transformers raise errors of many types, even RecursionError
        raise ValueError(f"The config.json of {source} can't be used: {' '.join(str(error).split())}") from error
    return config


def load_model(source: str | Path) -> PreTrainedModel:
    """Load a two-tower model (text encoder and image encoder) in float32, and check that all weights match the model.

    Args:
        source: Folder or Hub id.

    Returns:
        The model, as transformers' `AutoModel` returns it.

    Raises:
        ValueError: If there is no such model, a file is damaged, or the model is not a supported two-tower model. Also
            if weights are missing, unexpected or of the wrong shape.
    """
    check_model_file_exists(source, "config.json", "is not a model folder")
    try:
        if Path(source).is_dir():
            # Check these two weights first, so that a clear error is raised before transformers loads all weights. Each
            # of them must be a single number, or missing.
            for name in ("logit_scale", "logit_bias"):
                read_scalar(Path(source), name)
        options = {"dtype": "float32", "use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
        # With this option, transformers does not raise an error for weights of the wrong shape, but lists them in the
        # report.
        options["ignore_mismatched_sizes"] = True
        with _silence_load_report():
            model, report = AutoModel.from_pretrained(source, config=load_two_towers_config(source), **options)
    except Exception as error:
        raise ValueError(f"The model {source} can't be loaded: {' '.join(str(error).split())}") from error
    # transformers itself would only warn, and initialize missing weights randomly.
    _raise_on_weight_mismatch(f"The weights of {source}", report)
    check_config_ranges({"logit_scale": model.logit_scale.item()}, f"{source}: ")
    return model


@contextmanager
def _silence_load_report() -> Iterator[None]:
    """Return a context manager that keeps transformers from printing a report of weights that do not match the model.

    The report is not needed, because the error of `_raise_on_weight_mismatch` names the first of these weights. The
    logger is disabled, and its level is not set, because at a level of WARNING or higher transformers prints a plan of
    sharded layers instead of the report.
    """
    transformers_logger = logging.getLogger("transformers.modeling_utils")
    was_disabled, transformers_logger.disabled = transformers_logger.disabled, True
    try:
        yield
    finally:
        transformers_logger.disabled = was_disabled


def load_memory_mapped_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Load all tensors of safetensors files, memory-mapped, so that data is read from disk only when it is used.

    Args:
        files: Paths of the safetensors files, for example all shards of a model.

    Returns:
        A dictionary {tensor name: tensor}.

    Raises:
        ValueError: If a file can't be read.
    """
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weights {file} can't be read: {error}") from error
    return tensors


def load_memory_mapped_model(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load a model with memory-mapped weights, to save or convert it without copying the weights into memory.

    The returned model is only for saving. Use `load_model` to load a model that can be run.

    Args:
        folder: Folder with the weights.
        config: Configuration of the model.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If the weights can't be read or do not match the configuration.
    """
    tensors = load_memory_mapped_tensors(find_weight_files(folder))
    try:
        model = build_save_only_model_from_tensors(tensors, config, f"The weights of {folder}")
    except ValueError:
        # transformers renames weights of some model types, such as AltCLIP, while it loads them (`layer.0` to
        # `layers.0`). Such weights can't be mapped, so `load_model` copies them into memory as float32. Weights of
        # CAPIVARA models are not renamed, so for these models other names are an error.
        if KINDS[config.model_type].is_native:
            raise
        return load_model(folder).eval()
    check_config_ranges({"logit_scale": model.logit_scale.item()}, f"{folder}: ")
    return model


def build_save_only_model_from_tensors(
    tensors: Mapping[str, Tensor], config: PreTrainedConfig, subject: str
) -> PreTrainedModel:
    """Build a model that uses the given tensors as its weights, without copying them. It can be saved, but not run.

    Args:
        tensors: Dictionary {weight name: tensor}.
        config: Configuration of the model.
        subject: Subject of error messages, such as "The weights of FOLDER".

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If tensors are missing, unexpected or of the wrong shape. The message names some of them.
    """
    # Non-persistent buffers stay on the device "meta" and have no values, so the model can't be run.
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32)
    expected = model.state_dict()
    report = {"missing_keys": expected.keys() - tensors.keys(), "unexpected_keys": tensors.keys() - expected.keys()}
    shapes = [(key, tensors[key].shape, expected[key].shape) for key in tensors.keys() & expected.keys()]
    # A tensor of shape [1] where a scalar is expected is not a mismatch, because PyTorch can load it.
    report["mismatched_keys"] = [
        (key, actual, needed) for key, actual, needed in shapes if actual != needed and (actual, needed) != ((1,), ())
    ]
    _raise_on_weight_mismatch(subject, report)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def _raise_on_weight_mismatch(subject: str, report: Mapping[str, Iterable]) -> None:
    """Raise an error if a comparison of weights with a model's configuration found differences.

    Args:
        subject: Subject of the error message, such as "The weights of FOLDER".
        report: Result of the comparison, as transformers returns it: names under "missing_keys" and "unexpected_keys",
            and tuples (name, shape in the files, shape in the model) under "mismatched_keys".

    Raises:
        ValueError: If one of the three lists is not empty. The message names at most `MAX_NAMED_KEYS` weights.
    """
    shapes = [f"{key} {list(actual)}, not {list(expected)}" for key, actual, expected in report["mismatched_keys"]]
    all_faults = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "mismatched": shapes}
    faults = {kind: keys for kind, keys in all_faults.items() if keys}
    if faults:
        max_keys = MAX_NAMED_KEYS // len(faults)
        problems = [f"{kind} keys: {format_weight_names_for_error(keys, max_keys)}" for kind, keys in faults.items()]
        raise ValueError(f"{subject} do not fit its config; {'; '.join(problems)}.")


def format_weight_names_for_error(keys: Iterable[str], max_keys: int = MAX_NAMED_KEYS) -> str:
    """Format names of weights for an error message, with a limited number of names.

    Args:
        keys: Names of weights.
        max_keys: Largest number of names in the result.

    Returns:
        The first names in alphabetical order and the number of further names, such as "a, b and 3 more".
    """
    keys = sorted(keys)
    more = f" and {len(keys) - max_keys} more" if len(keys) > max_keys else ""
    return ", ".join(keys[:max_keys]) + more


def load_processor(source: str | Path) -> ProcessorMixin:
    """Load the processor of a two-tower model, which prepares texts and images for the model.

    Args:
        source: Folder or Hub id.

    Returns:
        A `CapivaraProcessor` for a CAPIVARA model, otherwise a processor of transformers. Texts are truncated to the
        number of tokens that the model accepts.

    Raises:
        ValueError: If there is no processor, a file is damaged, or the processor belongs to another model.
    """
    hint = "save one with `CapivaraProcessor(image_processor, tokenizer).save_pretrained(folder)`"
    # Older versions of transformers store a processor in two files, preprocessor_config.json and tokenizer_config.json,
    # instead of processor_config.json.
    in_two_files = (Path(source) / "preprocessor_config.json").is_file()
    required_file = "tokenizer_config.json" if in_two_files else "processor_config.json"
    check_model_file_exists(source, required_file, f"has no processor; {hint}")
    try:
        with wrap_tokenizer_errors("its tokenizer"):
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ValueError(f"its class {type(processor).__name__} does not process both texts and images")
        # Published SigLIP 2 models name Gemma's tokenizer, which keeps capital letters. They were trained on lowercase
        # texts, so the tokenizer is replaced by SigLIP 2's, which converts texts to lowercase.
        if isinstance(processor.tokenizer, GemmaTokenizer):
            processor.tokenizer = Siglip2Tokenizer.from_pretrained(source)
        check_config_ranges(processor.image_processor.to_dict())
        _check_and_adapt_processor(processor, load_two_towers_config(source))
    except Exception as error:
        raise ValueError(f"The processor of {source} can't be loaded: {' '.join(str(error).split())}") from error
    return processor


def _check_tokenizer(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Check that a model has all tokens of its processor's tokenizer, and that the padding token is valid.

    Args:
        processor: The model's processor.
        config: Configuration of the model.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or has no padding token. Also if the padding token
            is not in the model's vocabulary, or its id is not the `pad_token_id` of a model that needs this id.
    """
    tokenizer, text_config = processor.tokenizer, config.text_config
    token, token_id = tokenizer.pad_token, tokenizer.pad_token_id
    if token_id is None:
        raise ValueError("its tokenizer has no padding token")
    if token_id >= text_config.vocab_size:
        raise ValueError(f"its padding token {token!r} is not among the model's {text_config.vocab_size} tokens")
    # The number of tokens is not enough to find the largest id, because an added token may have any id.
    last_id = max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder])
    if last_id >= text_config.vocab_size:
        problem = f"its tokenizer has the token {tokenizer.convert_ids_to_tokens(last_id)!r} with the id {last_id}"
        hint = "add rows with `resize_token_embeddings`, or remove tokens"
        raise ValueError(f"{problem}, but the model has {text_config.vocab_size} tokens; {hint}")
    # Some text towers number the positions of tokens from the id of the padding token, so another id would shift all
    # positions.
    needs_same_id = KINDS[config.model_type].is_native or text_config.model_type in PADDING_MODEL_TYPES
    if needs_same_id and token_id != text_config.pad_token_id:
        raise ValueError(f"its padding token {token!r} has the id {token_id}, not {text_config.pad_token_id}")


def pads_to_max_length(processor: ProcessorMixin) -> bool:
    """Return whether a model requires every text to be padded to the maximum length, without an attention mask.

    This is the case for SigLIP models, because they were trained with such texts.

    Args:
        processor: Processor of the model.
    """
    return any(type(processor).__name__ in kind.processors for kind in KINDS.values() if kind.pads_to_max_length)


def _check_and_adapt_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Check that a processor matches a model, and limit the processor's tokenizer to the model's maximum text length.

    Args:
        processor: Processor of transformers. The `model_max_length` of its tokenizer is changed. For a SigLIP model,
            the tokenizer is also changed to return no attention mask.
        config: Configuration of the model.

    Raises:
        ValueError: If the type, the tokenizer or the image size of the processor does not match the model. Also if the
            tokenizer returns no attention mask, but the model needs an attention mask.
    """
    tokenizer, kind = processor.tokenizer, KINDS[config.model_type]
    settings = processor.image_processor.to_dict()
    size = dict(settings.get("crop_size" if settings.get("do_center_crop") else "size") or {})
    if type(processor).__name__ not in kind.processors or "max_num_patches" in settings:
        raise ValueError(f"a {type(processor).__name__} does not fit a model of the type {config.model_type!r}")
    _check_tokenizer(processor, config)
    if kind.is_native:  # the checks below are for other kinds; a CapivaraProcessor truncates texts by itself
        return
    takes_any_size = config.vision_config.model_type in ANY_SIZE_VISION_TOWERS
    side = size.get("height") if takes_any_size else config.vision_config.image_size
    if (size.get("height"), size.get("width")) != (side, side) or side is None:
        raise ValueError(f"its images have {size}, but the image tower takes {side} x {side} pixels")
    positions = config.text_config.max_position_embeddings
    # Text towers of these types number the positions of tokens from `pad_token_id` + 1. The positions below this number
    # are not available for tokens.
    if config.text_config.model_type in PADDING_MODEL_TYPES:
        positions -= config.text_config.pad_token_id + 1
    # SigLIP models were trained without an attention mask, so padding changes their embeddings. To get the same
    # embeddings as in training, the tokenizer must not return an attention mask.
    if kind.pads_to_max_length:
        tokenizer.model_input_names = ["input_ids"]
    elif "attention_mask" not in tokenizer.model_input_names:
        raise ValueError("its tokenizer returns no attention mask, so padding would change the embeddings of texts")
    # Some processors, such as Siglip2Processor, set their own maximum length, which may be below that of the tokenizer.
    processor_max_length = getattr(processor, "text_kwargs", {}).get("max_length", positions)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions, processor_max_length)


def check_model_file_exists(source: str | Path, required_file: str, fault: str) -> None:
    """Check that a model and one of its files exist, to give a clear error before transformers loads the model.

    Args:
        source: Folder or Hub id.
        required_file: Name of the file, such as "config.json".
        fault: What the error says about a folder without the file, such as "is not a model folder".

    Raises:
        ValueError: If the folder or file does not exist, the configuration is damaged, or the Hub can't be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not looks_like_hub_id(str(source)):
            raise make_coded_error(ValueError, "no_model", "The model folder {model} does not exist.", model=source)
        return check_hub_model_reachable(source, required_file)
    if (folder / "config.json").is_file():
        # Read the configuration here, because the error that transformers raises for a damaged file does not name the
        # folder.
        load_two_towers_config(folder)
    if not (folder / required_file).is_file():
        text = "The folder {model} {fault} ({file} is missing)."
        raise make_coded_error(ValueError, "not_a_model", text, model=source, fault=fault, file=required_file)


def load_two_towers_config(source: str | Path) -> PreTrainedConfig:
    """Load and validate the configuration of a two-tower model (text encoder and image encoder).

    Args:
        source: Folder or Hub id.

    Returns:
        The configuration.

    Raises:
        ValueError: If the configuration is missing or damaged, or the model is not a supported two-tower model.
    """
    try:
        # Check the model type first, because the error that transformers raises for an unknown type lists all its
        # types.
        if Path(source).is_dir():
            get_supported_model_kind(read_json(Path(source) / "config.json", model_type=str))
        config = load_transformers_config(str(source))
        get_supported_model_kind(config.to_dict())
        return config
    except Exception as error:  # damaged files make transformers raise errors of many types, even RecursionError
        reason = " ".join(str(error).split())
        text = "The config.json of {model} does not describe a two-tower model: {reason}"
        raise make_coded_error(ValueError, "no_two_towers", text, model=source, reason=reason) from error


def weights_digest(model: torch.nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """Compute a hash of a model's weights, so that two models can be compared by a short string.

    The hash covers the names, dtypes, shapes and values of the tensors.

    Args:
        model: The model.
        prefixes: Only tensors whose names start with one of these prefixes are included. Default: all tensors.

    Returns:
        The BLAKE2b hash as 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_card_metadata(card: Path) -> dict[str, Any]:
    """Read the metadata (YAML header) of a model card or dataset card, such as its license.

    Args:
        card: Path of the card, a README.md.

    Returns:
        A dictionary {field name: value}. It is empty if there is no card, or if the metadata block is missing or can't
        be read.
    """
    try:
        # The card is not read with huggingface_hub's `metadata_load`, because that would reject the whole card for a
        # single byte that is not UTF-8.
        block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace"))
        metadata = yaml.safe_load(block[2]) if block else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # PyYAML raises ValueError for impossible dates
        return {}
    return metadata if isinstance(metadata, dict) else {}


def write_origin_card(source: Path, folder: Path, description: str, repo_id: str | None = None) -> None:
    """Write the model card of a converted or trimmed model, with the license and attribution of the original model.

    No card is written if `repo_id` is None and the original card has no metadata to copy.

    Args:
        source: Folder of the original model, whose README.md is read.
        folder: Folder of the new model, to which README.md is written.
        description: Sentence that says how the new model was made.
        repo_id: Hub id of the original model, for the metadata field `base_model`. Default: the `base_model` of the
            original card.
    """
    source_metadata = read_card_metadata(source / "README.md")
    metadata = {"base_model": repo_id or source_metadata.get("base_model")}
    metadata |= {key: source_metadata.get(key) for key in INHERITED_CARD_FIELDS}
    values = {key: value if isinstance(value, list) else [value] for key, value in metadata.items() if value}
    metadata = {key: metadata[key] for key, items in values.items() if all(isinstance(item, str) for item in items)}
    if metadata:
        metadata |= {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
        title, yaml_block = html.escape(repo_id or source.resolve().name), yaml_dump(metadata, sort_keys=False)
        card = f"---\n{yaml_block}---\n\n# {title}\n\n{description}\n{ORIGIN_CARD_TEXT}\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
