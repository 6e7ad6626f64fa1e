"""Write the settings and tokenizer files with which transformers.js runs the ONNX graphs of a model.

    config.json                           with the key transformers.js_config: how many weight files each graph has
    preprocessor_config.json              image processor, with a class name that transformers.js knows
    tokenizer.json                        tokenizer with only those normalizer steps that transformers.js knows
    tokenizer_config.json                 maximum number of tokens in a text

`hub_upload/formats/onnx.py` writes the ONNX graphs.
"""

from pathlib import Path
from typing import Any

from capivara_common.files import read_json, write_json
from capivara_common.model_kinds import KINDS
from hub_upload import formats
from modeling_capivara.loading import load_processor
from modeling_capivara.text_cleaning_capivara import CONTEXT_LENGTH

# File names and settings follow `models/session.js` and `utils/model-loader.js` of transformers.js 4.3.
CONFIG_KEY = "transformers.js_config"  # key in config.json that transformers.js reads
# Settings of image processors that transformers.js supports. All other settings are left out of
# preprocessor_config.json.
IMAGE_SETTINGS = (
    *("do_resize", "size", "do_center_crop", "crop_size", "do_convert_rgb", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)
# Types of normalizer steps in tokenizer.json that transformers.js supports.
NORMALIZER_TYPES = (
    *("BertNormalizer", "Precompiled", "Sequence", "Replace", "NFC", "NFD", "NFKC", "NFKD"),
    *("Strip", "StripAccents", "Lowercase", "Prepend"),
)
# Steps that replace a normalizer of the type `Nmt`, which transformers.js does not support. They remove control
# characters and turn other white space into spaces, as `do_nmt` does in normalizers/unicode.rs of the tokenizers
# library.
NMT_STEPS = [
    formats.build_replace_step(r"[\u0001-\u0008\u000B\u000E-\u001F\u007F\u008F\u009F]", ""),
    formats.build_replace_step(r"[\u0009\u000A\u000C\u000D\u1680\u200B-\u200F\u2028\u2029\u2581\uFEFF\uFFFD]", " "),
]
# PIL's number for the LANCZOS resize filter, which replaces the model's own filter (usually bicubic). transformers.js's
# bicubic filter skips pixels when it shrinks images; LANCZOS is closest to the image processor in Python. In a browser,
# the setting has no effect, because the canvas resizes images.
LANCZOS_RESAMPLE = 1


def write_model_and_preprocessor_configs(folder: Path) -> None:
    """Write the settings that transformers.js needs for the model (config.json) and images (preprocessor_config.json).

    The transformers library for Python is not affected. It ignores the additional key in config.json, and reads the
    settings for images from processor_config.json.

    Args:
        folder: Folder of the export, which already has the ONNX graphs and the files for transformers.
    """
    weight_files = {path.name: 1 for path in sorted((folder / "onnx").glob("*.onnx"))}
    settings: dict[str, Any] = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {CONFIG_KEY: {"use_external_data_format": weight_files}})
    processor, kind = load_processor(folder).image_processor, KINDS[settings["model_type"]]
    image_processor, class_name = processor.to_dict(), kind.js_image_processor or type(processor).__name__
    settings = {name: image_processor[name] for name in IMAGE_SETTINGS if name in image_processor}
    settings |= {"image_processor_type": class_name, "resample": LANCZOS_RESAMPLE}
    write_json(folder / "preprocessor_config.json", settings)


def read_and_convert_tokenizer(folder: Path) -> dict[str, Any]:
    """Read a tokenizer.json, and replace normalizer steps that transformers.js does not support.

    A normalizer step changes a text before it is split into tokens, for example to lowercase.

    Args:
        folder: Folder with the tokenizer.json, which is not changed.

    Returns:
        The converted content of tokenizer.json.

    Raises:
        ValueError: If a normalizer step can't be converted.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    return tokenizer | {"normalizer": _convert_normalizer(tokenizer["normalizer"])}


def convert_tokenizer_files_in_place(folder: Path) -> None:
    """Rewrite the tokenizer files of an export, so that transformers.js splits texts into the same tokens.

    For a CAPIVARA model, this is guaranteed only for clean texts, because transformers.js does not run CAPIVARA's
    text cleaning code.

    Args:
        folder: Folder of the export, with config.json and the tokenizer files.
    """
    is_capivara = KINDS[read_json(folder / "config.json")["model_type"]].is_native
    formats.write_tokenizer_json_with_normalizer(folder, read_and_convert_tokenizer(folder), is_capivara)
    if is_capivara:
        # In Python, CAPIVARA's text cleaning code removes superfluous white space. transformers.js does not run this
        # code, but its setting `remove_space` has the same effect.
        settings = read_json(folder / "tokenizer_config.json")
        max_length = min(settings.get("model_max_length", CONTEXT_LENGTH), CONTEXT_LENGTH)
        write_json(folder / "tokenizer_config.json", settings | {"model_max_length": max_length, "remove_space": True})


def _convert_normalizer(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Replace normalizer steps of the type `Nmt` with steps that transformers.js supports, also inside sequences.

    Args:
        normalizer: Value of "normalizer" in tokenizer.json; None if the tokenizer has no normalizer.

    Returns:
        The converted value.

    Raises:
        ValueError: If there is a step of another type that transformers.js does not support.
    """
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        return normalizer | {"normalizers": [_convert_normalizer(step) for step in normalizer["normalizers"]]}
    if normalizer["type"] == "Nmt":
        return {"type": "Sequence", "normalizers": [*NMT_STEPS]}
    if normalizer["type"] not in NORMALIZER_TYPES:
        raise ValueError(
            f"transformers.js does not support the normalizer {normalizer['type']} in tokenizer.json, so the model "
            "can't run in a browser. Remove transformers_js from --formats, or omit the flag --static."
        )
    return normalizer
