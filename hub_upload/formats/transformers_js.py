"""transformers.js's part of a repository, beside the graphs of `formats/onnx.py`: what it loads by name alone.

    onnx/model.onnx, onnx/*_fp16.onnx     both towers and their scores, and every graph in float16, too
    config.json                           transformers.js_config: whose weights lie beside the graph
    preprocessor_config.json              the image processor, under a name that it knows
    tokenizer.json, tokenizer_config.json the same tokens by steps that it knows, and the longest text

Source: its `models/session.js` and `utils/model-loader.js`, 4.3.
"""

from pathlib import Path
from typing import Any

from capivara_common.files import read_json, write_json
from hub_upload import formats
from modeling_capivara.loading import load_processor
from modeling_capivara.processing_capivara import CapivaraProcessor
from modeling_capivara.text_cleaning_capivara import CONTEXT_LENGTH

CONFIG_KEY = "transformers.js_config"  # its part of config.json
IMAGE_SETTINGS = (
    *("do_resize", "size", "do_center_crop", "crop_size", "do_convert_rgb", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)  # settings of the image processor that it knows
# The steps of a normaliser that it has, and what stands for the one of the tokenizers library that it lacks: control
# characters out, other white space as blanks (`do_nmt` of tokenizers' normalizers/unicode.rs).
NORMALIZER_TYPES = (
    *("BertNormalizer", "Precompiled", "Sequence", "Replace", "NFC", "NFD", "NFKC", "NFKD"),
    *("Strip", "StripAccents", "Lowercase", "Prepend"),
)
NMT_REPLACEMENTS = {
    r"[\u0001-\u0008\u000B\u000E-\u001F\u007F\u008F\u009F]": "",
    r"[\u0009\u000A\u000C\u000D\u1680\u200B-\u200F\u2028\u2029\u2581\uFEFF\uFFFD]": " ",
}
# Its own bicubic resize leaves out pixels of larger pictures; LANCZOS is the filter that does not, and is the nearest
# to ours. In a browser it is the canvas that resizes, whatever is named.
LANCZOS_RESAMPLE = 1


def write_configs(folder: Path) -> None:
    """Configuration and image processor; of the former, Python reads the rest, and of the latter nothing."""
    weights = {path.name: 1 for path in sorted((folder / "onnx").glob("*.onnx"))}  # files beside each
    settings: dict[str, Any] = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {CONFIG_KEY: {"use_external_data_format": weights}})
    processor = load_processor(folder)
    ours, kind = processor.image_processor.to_dict(), type(processor.image_processor).__name__
    if isinstance(processor, CapivaraProcessor):
        kind = "CLIPImageProcessor"
    pixels = {name: ours[name] for name in IMAGE_SETTINGS if name in ours} | {
        "image_processor_type": kind,
        "resample": LANCZOS_RESAMPLE,
    }
    write_json(folder / "preprocessor_config.json", pixels)


def convert_tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer.json` in steps that transformers.js has; ValueError where there is none for one of them."""
    tokenizer = read_json(folder / "tokenizer.json")
    return tokenizer | {"normalizer": _convert_normalizer(tokenizer["normalizer"])}


def write_converted_tokenizer(folder: Path) -> None:
    """Make the tokenizer of a folder readable to transformers.js, with its ids (CAPIVARA: of repaired texts)."""
    is_own = read_json(folder / "config.json")["model_type"] == "capivara"
    formats.write_tokenizer_json(folder, convert_tokenizer(folder), is_own)
    if is_own:  # whose texts are repaired before
        settings = read_json(folder / "tokenizer_config.json")
        longest = min(settings.get("model_max_length", CONTEXT_LENGTH), CONTEXT_LENGTH)
        write_json(folder / "tokenizer_config.json", settings | {"model_max_length": longest, "remove_space": True})


def _convert_normalizer(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same normaliser without `Nmt`."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        return normalizer | {"normalizers": [_convert_normalizer(step) for step in normalizer["normalizers"]]}
    if normalizer["type"] == "Nmt":
        steps = [
            {"type": "Replace", "pattern": {"Regex": kind}, "content": by} for kind, by in NMT_REPLACEMENTS.items()
        ]
        return {"type": "Sequence", "normalizers": steps}
    if normalizer["type"] not in NORMALIZER_TYPES:
        raise ValueError(
            f"transformers.js has no normaliser {normalizer['type']}, which tokenizer.json names, so that no browser "
            "reads the model. Leave transformers_js out of --formats, or --static."
        )
    return normalizer
