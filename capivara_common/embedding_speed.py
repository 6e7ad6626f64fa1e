"""Measure which setting embeds images fastest on this CPU: number of images per forward pass, or precision.

    embed = with_tuned_chunk_size(embed, len(images), device, encoder_digest, output)
    vectors = embed(images[:32])  # the first call measures

`with_tuned_chunk_size` chooses the number of images per forward pass. `load_or_measure_fastest_setting` chooses the
value of any setting, for example the precision. Both embed some images several times with each value, and choose the
value with the smallest median time. The choice is stored, so that later runs do not measure again.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capivara_common.environment import cache_home, describe_device, package_versions
from capivara_common.files import json_digest, locked_folder, read_json, write_json

if TYPE_CHECKING:
    import torch

CHUNK_SIZES = (8, 4, 16)  # candidates for the number of images per forward pass; the first is the default
SAMPLE_IMAGES = 16  # images that a measurement embeds with each candidate
ROUNDS = 3  # number of measurements of each candidate
# The fastest settings are measured only if at least this many images are embedded. Otherwise the default settings are
# used, because the measurement takes as long as embedding 144 images (3 candidates, 3 rounds, 16 images).
LONG_PASS_IMAGES = 1000
MIN_SPEEDUP = 1.03  # a smaller speedup over the default may be noise, so the default stays
# {setting: smallest allowed cosine between two embeddings of the same image}. One embedding is computed with the
# default value of the setting, the other one with a candidate value. A candidate with a smaller cosine is not chosen.
MIN_COSINES = {"chunk_images": 0.999999, "precision": 0.999}
logger = logging.getLogger("capivara")


def with_tuned_chunk_size(
    embed: Callable[..., Any], image_count: int, device: "torch.device | str", encoder: str, record: Path | None = None
) -> Callable[[Sequence[Any]], Any]:
    """Wrap a function that embeds images, so that it uses the fastest number of images per forward pass on this CPU.

    The first call of the new function measures, unless the number is already stored. On a GPU, or for fewer than
    `LONG_PASS_IMAGES` images, `embed` itself is returned.

    Args:
        embed: Function that embeds a list of images. It has the keyword parameter `chunk_images`, the number to choose.
        image_count: Number of images to embed in total, also by earlier runs and parallel processes.
        device: Device of the model.
        encoder: Digest of the image encoder and the precision.
        record: Folder, such as the output folder, that stores the number for resumed runs. None: only the cache stores
            it.

    Returns:
        Function that embeds a list of at least one image.
    """
    if image_count < LONG_PASS_IMAGES or str(device).partition(":")[0] != "cpu":
        return embed
    chosen: list[int] = []

    def embed_tuned(images: Sequence[Any]) -> Any:
        # The embeddings of the measurement are discarded, so that all rows are computed in the same way.
        if not chosen:
            sample = list(islice(cycle(images), SAMPLE_IMAGES))
            candidates = {size: partial(embed, sample, chunk_images=size) for size in CHUNK_SIZES}
            chosen.append(load_or_measure_fastest_setting("chunk_images", candidates, encoder, record))
        return embed(images, chunk_images=chosen[0])

    return embed_tuned


def load_or_measure_fastest_setting(
    setting: str, candidates: Mapping[Any, Callable[[], Any]], encoder: str, record: Path | None = None
) -> Any:
    """Return the value of a setting, such as the precision, with which images are embedded fastest on this CPU.

    A value that is stored in `record`, or in the cache for this CPU, encoder and versions of torch and transformers, is
    used again. Otherwise each candidate is measured. The default is replaced only by a value that is faster
    (`MIN_SPEEDUP`) and hardly changes the embeddings (`MIN_COSINES`).

    Args:
        setting: Name of the setting, a key of `MIN_COSINES`.
        candidates: `{value: function}`. The function embeds sample images, and returns vectors of unit length of shape
            (images, width). The first value is the default.
        encoder: Digest of the image encoder.
        record: Folder, such as the output folder, that stores the value for resumed runs. None: only the cache stores
            it.

    Returns:
        The chosen value, a key of `candidates`.
    """
    # The number of images per forward pass changes the last bits of embeddings. The record makes all processes that
    # write to the same output, and a resumed run on another machine, use the same value.
    output_file = record and record / f"fastest-{setting}.json"
    if output_file and (content := _read_choice(output_file, candidates)):
        return content["choice"]
    versions = {name: version for name, version in package_versions().items() if name in ("torch", "transformers")}
    identity = {"setting": setting, "device": describe_device(), "encoder": encoder, "versions": versions}
    cache_file = cache_home() / "embedding_speed" / f"{json_digest(identity)}.json"
    # If several processes start at the same time, the first process measures, and the others wait for its choice. If
    # the folder can't be locked, several processes may measure at the same time, which only costs time.
    with locked_folder(cache_file.parent, wait=True):
        content = _read_choice(cache_file, candidates)
        if content is None:
            content = identity | _time_and_choose_candidate(candidates, MIN_COSINES[setting])
            logger.info("The fastest value of %s on this CPU is %s.", setting, content["choice"])
            with suppress(OSError):  # if the file can't be written, the next run measures again
                write_json(cache_file, content)
    if output_file:
        with locked_folder(output_file.parent, wait=True):
            # A process on another machine may have recorded its choice in the meantime.
            if recorded := _read_choice(output_file, candidates):
                return recorded["choice"]
            write_json(output_file, content)
    return content["choice"]


def _time_and_choose_candidate(candidates: Mapping[Any, Callable[[], Any]], min_cosine: float) -> dict[str, Any]:
    """Time all candidates `ROUNDS` times each, and choose the fastest one that hardly changes the embeddings.

    Args:
        candidates: `{value: function}`, as for `load_or_measure_fastest_setting`. The first value is the default.
        min_cosine: Smallest allowed cosine between an embedding and the embedding with the default value.

    Returns:
        `{"choice": chosen value, "seconds": {value as text: median seconds}}`.
    """
    seconds: dict[Any, list[float]] = {value: [] for value in candidates}
    vectors = {}
    for _ in range(ROUNDS):
        for value, embed in candidates.items():
            start = time.perf_counter()
            vectors[value] = np.asarray(embed())
            seconds[value].append(time.perf_counter() - start)
    medians = {value: float(np.median(times)) for value, times in seconds.items()}
    default = next(iter(candidates))
    cosines = {value: float((vectors[value] * vectors[default]).sum(-1).min()) for value in candidates}
    max_seconds = medians[default] / MIN_SPEEDUP
    eligible = [value for value in candidates if cosines[value] >= min_cosine and medians[value] <= max_seconds]
    choice = min(eligible, key=medians.__getitem__, default=default)
    return {"choice": choice, "seconds": {str(value): median for value, median in medians.items()}}


def _read_choice(path: Path, candidates: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Read a recorded choice, as `_time_and_choose_candidate` returns it.

    Args:
        path: JSON file with the choice.
        candidates: The allowed choices are its keys.

    Returns:
        Content of the file. None if the file is missing or damaged, or its choice is not a key of `candidates`. The
        caller then chooses again.
    """
    try:
        content = read_json(path, choice=type(next(iter(candidates))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s can't be used, so the fastest setting is chosen again: %s", path, error)
        return None
    return content if content["choice"] in candidates else None
