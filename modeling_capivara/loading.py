"""Model folders, loaded with every weight accounted for and errors that say what is wrong."""

import hashlib
import html
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from capivara_common.cli import coded_error
from capivara_common.files import read_json
from capivara_common.hub_cache import check_reachable, is_hub_id, unsupported_reason
from capivara_common.weight_file import find_weight_files, read_scalar

from .checks_capivara import check_sizes, wrap_tokenizer_errors
from .configuration_capivara import get_sizes
from .processing_capivara import CapivaraProcessor

WEIGHTS_FILE = "model.safetensors"
MAX_NAMED_KEYS = 5  # in an error message: a model has hundreds
INHERITED_CARD_FIELDS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "attribution",
)  # of the source's own card
ORIGIN_CARD_TEXT = (
    "What the model is, how it was trained and under which licence it may be used is stated where it comes from."
)


def load_config(source: str, **options: Any) -> PreTrainedConfig:
    """The configuration of any model of transformers; ValueError where it is damaged, or a size is outside of `LIMITS`.

    `options` are those of `AutoConfig`. OSError where there is none.
    """
    try:
        check_sizes(PreTrainedConfig.get_config_dict(source, revision=options.get("revision"))[0])
        config = AutoConfig.from_pretrained(source, **{"trust_remote_code": False, **options})
        check_sizes(get_sizes(config))  # also of kinds with names of their own
    except OSError:
        raise
    except Exception as error:  # RecursionError among them, and what transformers and its data classes raise
        raise ValueError(f"The config.json of {source} can't be used: {' '.join(str(error).split())}") from error
    return config


def load_model(source: str | Path) -> PreTrainedModel:
    """A model of two towers out of a folder or from the Hub, in float32.

    transformers only warns of missing weights and leaves them random; here they are a ValueError, as surplus ones, a
    broken file and another kind of model are.
    """
    _check_model_folder(source, "config.json", "is no model folder")
    try:
        if Path(source).is_dir():
            for name in ("logit_scale", "logit_bias"):  # transformers tells of another shape after loading, in a table
                read_scalar(Path(source), name)
        options = {"dtype": "float32", "use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
        options |= {"ignore_mismatched_sizes": True}  # they are in the report, as the missing ones are
        with _silence_load_report():
            model, report = AutoModel.from_pretrained(source, config=load_two_towers_config(source), **options)
    except Exception as error:
        raise ValueError(f"The model {source} can't be loaded: {' '.join(str(error).split())}") from error
    faults = [report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")]
    _check_keys(f"The weights of {source}", *faults)
    check_sizes({"logit_scale": model.logit_scale.item()}, f"{source}: ")
    return model


@contextmanager
def _silence_load_report() -> Iterator[None]:
    """Keep transformers from printing every key that does not fit; the error of `_check_keys` names the first ones."""
    printer = logging.getLogger("transformers.modeling_utils")
    level = printer.level
    printer.setLevel(logging.ERROR)
    try:
        yield
    finally:
        printer.setLevel(level)


def load_mapped_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, as views of them: the system reads each when it is used. Raises ValueError."""
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weights {file} can't be read: {error}") from error
    return tensors


def load_mapped_model(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a folder with its weights as views of the folder's files, by `model_of_tensors`.

    transformers renames the weights of some model types while loading (AltCLIP's `layer.0` to `layers.0`). If the names
    of another type's weights do not fit, the model is loaded by `load_model` instead, into memory and in float32.
    """
    tensors = load_mapped_tensors(find_weight_files(folder))
    try:
        model = build_model_from_tensors(tensors, config, f"The weights of {folder}")
    except ValueError:
        if config.model_type == "capivara":
            raise
        return load_model(folder).eval()
    check_sizes({"logit_scale": model.logit_scale.item()}, f"{folder}: ")
    return model


def build_model_from_tensors(tensors: Mapping[str, Tensor], config: PreTrainedConfig, subject: str) -> PreTrainedModel:
    """A model whose weights are these tensors, not copies, to be saved and not to be run.

    Raises ValueError if some are missing, unexpected or of another shape; the message begins with `name` and names the
    first of them.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float32)
    expected = model.state_dict()
    shapes = [(key, tensors[key].shape, expected[key].shape) for key in tensors.keys() & expected.keys()]
    # torch itself loads a tensor of shape [1] as a scalar.
    mismatched = [shape for shape in shapes if shape[1] != shape[2] and shape[1:] != ((1,), ())]
    _check_keys(subject, expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), mismatched)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def _check_keys(
    name: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Sequence, Sequence]]
) -> None:
    """Raise ValueError if the keys of weights do not fit their config; at most `MAX_NAMED_KEYS` keys are named.

    Args:
        name: What the weights are called, the subject of the message.
        missing: Keys that the model needs and the weights lack.
        unexpected: Keys of the weights that the model does not have.
        mismatched: Key, shape in the weights and shape in the model, of keys whose shapes differ.
    """
    shapes = [f"{key} {list(found)}, not {list(expected)}" for key, found, expected in mismatched]
    faults = {"missing": missing, "unexpected": unexpected, "mismatched": shapes}
    if faults := {kind: keys for kind, keys in faults.items() if keys}:
        most = MAX_NAMED_KEYS // len(faults)
        named = [f"{kind} keys: {format_keys(keys, most)}" for kind, keys in faults.items()]
        raise ValueError(f"{name} do not fit its config; {'; '.join(named)}.")


def format_keys(keys: Iterable[str], max_keys: int = MAX_NAMED_KEYS) -> str:
    """Return the first `most` keys in alphabetical order, separated by commas, and the number of further keys."""
    keys = sorted(keys)
    more = f" and {len(keys) - max_keys} more" if len(keys) > max_keys else ""
    return ", ".join(keys[:max_keys]) + more


def load_processor(source: str | Path) -> ProcessorMixin:
    """The processor that was saved beside a model of two towers; ValueError where there is none, or it does not fit."""
    way_out = "save one with `CapivaraProcessor(image_processor, tokenizer).save_pretrained(folder)`"
    older = (Path(source) / "preprocessor_config.json").is_file()  # as transformers' models have it
    _check_model_folder(
        source, "tokenizer_config.json" if older else "processor_config.json", f"has no processor; {way_out}"
    )
    try:
        with wrap_tokenizer_errors("its tokenizer"):
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ValueError(f"it is a {type(processor).__name__}, not one of texts and images")
        if isinstance(processor.tokenizer, GemmaTokenizer):  # of a published SigLIP 2, trained in small letters
            processor.tokenizer = Siglip2Tokenizer.from_pretrained(source)
        check_sizes(processor.image_processor.to_dict())
        config = load_config(str(source))
        padding, rows = processor.tokenizer.pad_token_id, config.text_config.vocab_size
        if padding is not None and padding >= rows:
            raise ValueError(
                f"its padding token {processor.tokenizer.pad_token!r} is outside of the {rows} tokens known"
            )
        if not isinstance(processor, CapivaraProcessor):  # which has a rule of its own
            _fit_processor(processor, config)
    except Exception as error:
        raise ValueError(f"The processor of {source} can't be loaded: {' '.join(str(error).split())}") from error
    return processor


def pads_to_max_length(processor: ProcessorMixin) -> bool:
    """Whether texts are filled up to one length without a mask, and padding is read as any token: SigLIP's are."""
    return type(processor).__name__.startswith("Siglip")


def _fit_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """ValueError where transformers' processor is that of another model, whose figures would mean nothing.

    Its tokenizer gives no more tokens than the model has positions for, also one that was saved without a limit.
    """
    tokenizer, side, kind = processor.tokenizer, config.vision_config.image_size, type(processor).__name__
    steps = processor.image_processor.to_dict()
    size = dict((steps.get("crop_size") if steps.get("do_center_crop") else steps.get("size")) or {})
    if pads_to_max_length(processor) != (config.model_type == "siglip") or "max_num_patches" in steps:
        raise ValueError(f"a {kind} is none of the model's kind, {config.model_type!r}")
    if (size.get("height"), size.get("width")) != (side, side):
        raise ValueError(f"its images have {size}, the image tower takes {side} x {side} pixels")
    if len(tokenizer) > config.text_config.vocab_size or tokenizer.pad_token is None:
        known = f"{len(tokenizer)} tokens, {tokenizer.pad_token!r} for padding"
        raise ValueError(f"its tokenizer has {known}; the model knows {config.text_config.vocab_size}")
    positions = config.text_config.max_position_embeddings
    if config.model_type == "altclip":  # as RoBERTa, it counts positions from behind the padding's number
        positions -= config.text_config.pad_token_id + 1
    if pads_to_max_length(processor):  # the model attends to padding, so no caller may get a mask by default
        tokenizer.model_input_names = ["input_ids"]
    own = getattr(processor, "text_kwargs", {}).get("max_length", positions)  # Siglip2Processor's, say
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions, own)


def _check_model_folder(source: str | Path, required_file: str, fault: str) -> None:
    """A path that looks local must be a folder with the needed file; anything else may be a Hub id."""
    folder = Path(source)
    if not folder.is_dir():
        if not is_hub_id(str(source)):
            raise coded_error(ValueError, "no_model", "The model folder {model} does not exist.", model=source)
        return check_reachable(source, required_file)
    if (folder / "config.json").is_file():
        load_two_towers_config(folder)  # transformers' message about a wrong one would not name it
    if not (folder / required_file).is_file():
        text = "The folder {model} {fault} ({file} is missing)."
        raise coded_error(ValueError, "not_a_model", text, model=source, fault=fault, file=required_file)


def load_two_towers_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a folder or Hub id; ValueError where it is damaged, or of no model of two towers."""
    try:
        if Path(source).is_dir():  # transformers' message would list all the kinds that it knows
            read_json(Path(source) / "config.json", model_type=str)
        config = load_config(str(source))
        if fault := unsupported_reason(config.model_type):
            raise ValueError(fault)
        return config
    except Exception as error:  # RecursionError among them
        reason = " ".join(str(error).split())
        text = "The config.json of {model} is of no model of two towers: {reason}"
        raise coded_error(ValueError, "no_two_towers", text, model=source, reason=reason) from error


def weights_digest(model: torch.nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """Hex digest of the tensors of a model whose name starts with one of `prefixes`."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_card_metadata(card: Path) -> dict[str, Any]:
    """The metadata of a model's or data set's card; empty where it has none, or none that can be read."""
    try:
        # Not `metadata_load`, which gives up a card for one byte of its text that is no UTF-8.
        block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace"))
        found = yaml.safe_load(block[2]) if block else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # ValueError: a date that can't be
        return {}
    return found if isinstance(found, dict) else {}


def write_origin_card(source: Path, folder: Path, description: str, repo_id: str | None = None) -> None:
    """Write the README.md of a model that is `made`, a sentence, from that of the folder `source`, whose card states
    the licence; none where nothing is known. The base is `repo_id` on the Hub, else the one that the card names.
    """
    stated = read_card_metadata(source / "README.md")
    known = {
        "base_model": repo_id or stated.get("base_model"),
        **{key: stated.get(key) for key in INHERITED_CARD_FIELDS},
    }
    texts = {key: value if isinstance(value, list) else [value] for key, value in known.items() if value}
    known = {key: known[key] for key, found in texts.items() if all(isinstance(text, str) for text in found)}
    if known:
        known |= {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"}
        title, metadata = html.escape(repo_id or source.resolve().name), yaml_dump(known, sort_keys=False)
        (folder / "README.md").write_text(
            f"---\n{metadata}---\n\n# {title}\n\n{description}\n{ORIGIN_CARD_TEXT}\n", encoding="utf-8"
        )
