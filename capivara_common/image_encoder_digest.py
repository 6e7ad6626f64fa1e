"""Which models embed images alike: a digest of the image side, kept so that it is computed once.

An index built with a model stays valid for every model of the same digest, such as one whose text side alone was
trained further.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from capivara_common.environment import cache_home
from capivara_common.files import read_json, write_json
from capivara_common.weight_file import WeightFile, find_weight_files

DIGEST_VERSION = 1  # raise it when the digest covers other things
IMAGE_ENCODER_PREFIXES = ("vision_model.", "visual_projection.")  # how the names of the image side's parameters begin
DIGEST_CHUNK_BYTES = 1 << 24
# What the numbers of an image depend on; the rest of a configuration (names of labels, versions, dropout) changes
# without them. Of other kinds of towers, all fields but `NEUTRAL` count.
CLIP_VISION_FIELDS = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")
TIMM_VISION_FIELDS = ("model_type", "architecture", "model_args", "do_pooling")
CAPIVARA_VISION_DEFAULTS = {
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
}
CAPIVARA_VISION_DEFAULTS |= {"patch_size": 32, "image_size": 224, "do_pooling": True, "model_args": None}
# Of models of transformers itself: what a published one leaves out, and one that was loaded and saved states.
CLIP_VISION_DEFAULTS = CAPIVARA_VISION_DEFAULTS | {"hidden_act": "quick_gelu"}
SIGLIP_VISION_DEFAULTS = CAPIVARA_VISION_DEFAULTS | {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "patch_size": 16,
}
IMAGE_PROCESSOR_DEFAULTS = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
IGNORED_CONFIG_FIELDS = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "id2label",
    "label2id",
    "label_names",
}
IMAGE_PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
)
IMAGE_PROCESSOR_FIELDS += ("do_normalize", "image_mean", "image_std")


def image_encoder_digest(folder: Path) -> str:
    """32 letters, of image tower, its projection and preprocessing. ValueError: files are missing or damaged."""
    settings = (json.dumps(part, sort_keys=True) for part in _image_encoder_settings(folder).values())
    return hashlib.blake2b("\0".join([_cached_weights_digest(folder), *settings]).encode(), digest_size=16).hexdigest()


def image_processor_settings(folder: Path) -> dict[str, Any]:
    """What a model's image processor does: its fields `PROCESSOR_FIELDS`. Raises ValueError as `image_side_digest`."""
    return _image_encoder_settings(folder)["image_processor"]


def _image_encoder_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """What the numbers of an image depend on beside the weights, by its place in the folder's files."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vision, processor = config.get("vision_config") or {}, _read_processor_settings(folder)
        steps = {name: _normalize_setting(name, processor.get(name)) for name in IMAGE_PROCESSOR_FIELDS}
        if (kind := config.get("model_type", "capivara")) == "capivara":
            return {"vision_config": _vision_settings(vision), "image_processor": steps}
        known = (SIGLIP_VISION_DEFAULTS if kind == "siglip" else CLIP_VISION_DEFAULTS) | vision | {"model_type": kind}
        steps = {name: IMAGE_PROCESSOR_DEFAULTS.get(name) if value is None else value for name, value in steps.items()}
        return {"vision_config": {name: known[name] for name in CLIP_VISION_FIELDS}, "image_processor": steps}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The settings of the model {folder} can't be read: {error!r}") from error


def _read_processor_settings(folder: Path) -> dict[str, Any]:
    """The settings of the image processor, from the file that transformers takes them from."""
    path = folder / "processor_config.json"
    nested = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    older = folder / "preprocessor_config.json"
    if "image_processor" in nested or not older.is_file():
        return nested["image_processor"]
    return json.loads(older.read_text(encoding="utf-8"))


def _normalize_setting(name: str, value: Any) -> Any:
    """A setting of the image processor as it is saved, also where one number stands for a size. Raises TypeError."""
    if name not in ("size", "crop_size") or isinstance(value, dict | None):
        return value
    if type(value) is not int:
        raise TypeError(f"{name} must be a whole number or an object of them, got {value!s:.80}")
    return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}


def _vision_settings(vision: dict[str, Any]) -> dict[str, Any]:
    known = {"clip_vision_model": CLIP_VISION_FIELDS, "timm_wrapper": TIMM_VISION_FIELDS}
    if fields := known.get(vision.get("model_type", CAPIVARA_VISION_DEFAULTS["model_type"])):
        return {name: vision.get(name, CAPIVARA_VISION_DEFAULTS.get(name)) for name in fields}
    return {name: value for name, value in vision.items() if name not in IGNORED_CONFIG_FIELDS}


def _cached_weights_digest(folder: Path) -> str:
    """Of the image side's tensors, from the cache where the files are as they were."""
    paths = find_weight_files(folder)
    # With the time of change: archives and `cp -p` give another model's file of the same size the same date.
    marks = [(path.stat(), path) for path in paths]
    places = [[str(path.resolve()), mark.st_size, mark.st_mtime_ns, mark.st_ctime_ns] for mark, path in marks]
    name = hashlib.blake2b(json.dumps(places).encode(), digest_size=16).hexdigest()
    kept = cache_home() / "image_digests" / f"{name}-{DIGEST_VERSION}.json"
    with suppress(OSError, ValueError):  # not there, or damaged: made anew
        if len(found := read_json(kept, weights=str)["weights"]) == 32:
            return found
    digest = _compute_weights_digest(paths)
    with suppress(OSError):  # a cache that can't be written to costs seconds, nothing else
        write_json(kept, {"weights": digest, "files": [Path(place[0]).name for place in places]})
    return digest


def _compute_weights_digest(paths: list[Path]) -> str:
    tensors = {
        name: file
        for file in map(WeightFile, paths)
        for name in file.tensors
        if name.startswith(IMAGE_ENCODER_PREFIXES)
    }
    tensors.pop("vision_model.embeddings.position_ids", None)  # a constant that older files of CLIP have
    if not tensors:
        raise ValueError(f"The weights of {paths[0].parent} hold no image tower.")
    digest = hashlib.blake2b(digest_size=16)
    for name, file in sorted(tensors.items()):
        digest.update(f"{name} {file.tensors[name].dtype} {file.tensors[name].shape}".encode())
        raw = file.raw_bytes(name)
        for start in range(0, len(raw), DIGEST_CHUNK_BYTES):
            digest.update(raw[start : start + DIGEST_CHUNK_BYTES])
    return digest.hexdigest()
