"""Compute a digest that identifies a model's image encoder. Models with the same digest embed images in the same way.

For example, a model and its fine-tuned version have the same digest if only the text encoder was trained. A search
index that was built with one of them is then also valid for the other one.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from capivara_common.environment import cache_home
from capivara_common.files import json_digest, read_json, write_json
from capivara_common.model_kinds import KINDS, NATIVE_MODEL_TYPE
from capivara_common.weight_file import WeightFile, find_weight_files

DIGEST_VERSION = 1  # version of the cached digests; increase it if the digest covers other weights than before
IMAGE_ENCODER_PREFIXES = ("vision_model.", "visual_projection.")  # prefixes of the encoder's parameter names
DIGEST_CHUNK_BYTES = 1 << 24  # 16 MiB; weights are hashed in pieces of this size, to limit memory
# Default values of transformers' image processors. The file of an image processor may omit these settings.
IMAGE_PROCESSOR_DEFAULTS = {
    "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
}  # fmt: skip
# Config fields that do not change the embedding of an image. They are needed if the model's entry of `KINDS` does not
# list the type of the image tower: the digest then covers all fields of the tower's config except these.
IGNORED_CONFIG_FIELDS = {
    *("transformers_version", "dtype", "torch_dtype", "_name_or_path", "id2label", "label2id", "label_names"),
}
IMAGE_PROCESSOR_FIELDS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)


def image_encoder_digest(folder: Path) -> str:
    """Return a digest that identifies a model's image encoder; models with equal digests embed images in the same way.

    The digest covers the weights and settings of the image encoder, and the image preprocessing.

    Args:
        folder: Model folder in transformers' format.

    Returns:
        BLAKE2b-128 digest, 32 hexadecimal characters.

    Raises:
        ValueError: If files of the model are missing or damaged.
    """
    settings = [json.dumps(part, sort_keys=True) for part in _image_encoder_settings(folder).values()]
    identity = "\0".join([_get_or_compute_weights_digest(folder), *settings])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def image_processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings with which a model preprocesses images, such as the image size and the mean color.

    Args:
        folder: Model folder in transformers' format.

    Returns:
        `{name: value}` for all names in `IMAGE_PROCESSOR_FIELDS`, for example `"size": {"shortest_edge": 224}`.

    Raises:
        ValueError: If files of the model are missing or damaged.
    """
    return _image_encoder_settings(folder)["image_processor"]


def _image_encoder_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the settings of a model that change the embedding of an image.

    Args:
        folder: Model folder in transformers' format.

    Returns:
        `{"vision_config": settings of the image tower, "image_processor": settings of the image processor}`. Both
        values are dicts `{name: value}`. Settings that the files omit have their default values.

    Raises:
        ValueError: If files of the model are missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vision, processor = config.get("vision_config") or {}, _read_image_processor_settings(folder)
        kind = KINDS[config.get("model_type", NATIVE_MODEL_TYPE)]
        tower = kind.select_vision_settings(vision)
        if tower is None:
            tower = {name: value for name, value in vision.items() if name not in IGNORED_CONFIG_FIELDS}
        defaults = {} if kind.is_native else IMAGE_PROCESSOR_DEFAULTS
        values = defaults | {name: value for name, value in processor.items() if value is not None}
        steps = {name: _normalize_image_size_setting(name, values.get(name)) for name in IMAGE_PROCESSOR_FIELDS}
        return {"vision_config": tower, "image_processor": steps}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The settings of the model {folder} can't be read: {error!r}") from error


def _read_image_processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a model folder's image processor.

    transformers reads them from processor_config.json, or from preprocessor_config.json of older models.
    """
    path = folder / "processor_config.json"
    nested = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    older = folder / "preprocessor_config.json"
    if "image_processor" in nested or not older.is_file():
        return nested["image_processor"]
    return json.loads(older.read_text(encoding="utf-8"))


def _normalize_image_size_setting(name: str, value: Any) -> Any:
    """Convert a setting of the image processor to one canonical form: a size that is one number becomes a dict.

    Args:
        name: Name of the setting. Only "size" and "crop_size" are changed.
        value: Value of the setting.

    Returns:
        For example `{"shortest_edge": 224}` for the size 224, and `{"height": 224, "width": 224}` for the crop size
        224.

    Raises:
        TypeError: If a size is not an integer, a dict or None.
    """
    if name not in ("size", "crop_size") or isinstance(value, dict | None):
        return value
    if type(value) is not int:
        raise TypeError(
            f'{name} must be an integer or a dict such as {{"height": 224, "width": 224}}, got {value!s:.80}'
        )
    return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}


def _get_or_compute_weights_digest(folder: Path) -> str:
    """Return the digest of the image encoder's weights (32 hexadecimal characters).

    The digest is read from the cache if the weight files of the model folder are unchanged; otherwise it is computed
    and cached.
    """
    paths = find_weight_files(folder)
    # The change time (ctime) is included, because unpacking an archive and `cp -p` keep the modification time (mtime).
    # The file of another model could then have the same size and mtime.
    stats = [(path.stat(), path) for path in paths]
    metadata = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat, path in stats]
    cache_file = cache_home() / "image_digests" / f"{json_digest(metadata)}-{DIGEST_VERSION}.json"
    with suppress(OSError, ValueError):  # if the file is missing or damaged, the digest is computed again
        cached = read_json(cache_file, weights=str)["weights"]
        if len(cached) == 32:
            return cached
    digest = _compute_weights_digest(paths)
    with suppress(OSError):  # without a cache, the next call only takes seconds longer
        write_json(cache_file, {"weights": digest, "files": [Path(entry[0]).name for entry in metadata]})
    return digest


def _compute_weights_digest(paths: list[Path]) -> str:
    """Compute a digest of the names, types, shapes and bytes of the image encoder's tensors.

    Args:
        paths: Weight files of a model.

    Returns:
        BLAKE2b digest as 32 hexadecimal characters.

    Raises:
        ValueError: If the files contain no image tower, or a file is damaged.
    """
    tensors: dict[str, WeightFile] = {}
    for file in map(WeightFile, paths):
        tensors |= {name: file for name in file.tensors if name.startswith(IMAGE_ENCODER_PREFIXES)}
    tensors.pop("vision_model.embeddings.position_ids", None)  # a constant; only older CLIP files have it
    if not tensors:
        raise ValueError(f"The weights of {paths[0].parent} contain no image tower.")
    digest = hashlib.blake2b(digest_size=16)
    for name, file in sorted(tensors.items()):
        digest.update(f"{name} {file.tensors[name].dtype} {file.tensors[name].shape}".encode())
        raw = file.raw_bytes(name)
        for start in range(0, len(raw), DIGEST_CHUNK_BYTES):
            digest.update(raw[start : start + DIGEST_CHUNK_BYTES])
    return digest.hexdigest()
