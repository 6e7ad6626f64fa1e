"""Choose how a model embeds images fastest on this CPU: the number of images per forward pass, and the precision.

    embed = tune_chunk_size(embed, len(images), device, encoder_digest, output)
    vectors = embed(images[:32])  # the first call measures

Which choice is fastest differs between CPUs. Before a long pass embeds its first batch, it embeds images of this batch
with each candidate in turns, and chooses the candidate with the smallest median time. The choice is kept in the folder
`embedding_speed` of the cache, in a file for each CPU, model and version of torch and transformers, so that later
passes do not measure again. The choice is also recorded in the output of the pass, because the number of images per
forward pass changes the last bits of embeddings. A resumed run and other tasks of the same output read this record,
even on another machine. The measured embeddings are not used, so that all rows of the output are computed in the same
way.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capivara_common.environment import cache_home, describe_device, package_versions
from capivara_common.files import json_digest, lock_folder, read_json, write_json

if TYPE_CHECKING:
    import torch

CHUNK_SIZES = (4, 8, 16)  # candidates for the images per forward pass; the first is the default
SAMPLE_IMAGES = 16  # images that a measurement embeds with each candidate
ROUNDS = 3  # how often each candidate is measured
# A pass with fewer images keeps the default, because the measurement takes as long as embedding 144 images.
LONG_PASS_IMAGES = 1000
MIN_SPEEDUP = 1.03  # a smaller speedup over the default may be noise, so the default stays
CHUNK_MIN_COSINE = 0.999999  # between embeddings that were computed with different numbers of images per forward pass
BF16_MIN_COSINE = 0.999  # between embeddings in bfloat16 and float32
logger = logging.getLogger("capivara")


def tune_chunk_size(
    embed: Callable[..., Any], image_count: int, device: "torch.device | str", encoder: str, record: Path | None = None
) -> Callable[[Sequence[Any]], Any]:
    """Wrap a function that embeds images, so that it uses the fastest number of images per forward pass.

    Args:
        embed: Function that embeds a list of images. It must have the keyword parameter `chunk_images`, the number of
            images per forward pass on a CPU.
        image_count: Images of the whole pass, including those that an earlier run or another task embeds. A pass with
            fewer than `LONG_PASS_IMAGES` uses the default of `embed`, as does every pass on a GPU.
        device: Device of the model.
        encoder: Digest of the image encoder, including the precision.
        record: Folder for the record of this pass, for example the output folder. None: the pass has no record.

    Returns:
        Function that embeds a list of at least one image. Its first call measures, unless the choice is known.
    """
    if image_count < LONG_PASS_IMAGES or str(device).partition(":")[0] != "cpu":
        return embed
    chosen: list[int] = []

    def embed_tuned(images: Sequence[Any]) -> Any:
        if not chosen:
            sample = list(islice(cycle(images), SAMPLE_IMAGES))
            candidates = {size: partial(embed, sample, chunk_images=size) for size in CHUNK_SIZES}
            chosen.append(choose_fastest("chunk_images", candidates, CHUNK_MIN_COSINE, encoder, record))
        return embed(images, chunk_images=chosen[0])

    return embed_tuned


def choose_fastest(
    setting: str, candidates: Mapping[Any, Callable[[], Any]], min_cosine: float, encoder: str, record: Path | None
) -> Any:
    """Choose the value of a setting with which a sample of images is embedded fastest.

    Args:
        setting: Name of the setting, for the names of files.
        candidates: For each value, a function that embeds the sample and returns an array (images, width) of vectors of
            unit length. The first value is the default.
        min_cosine: Smallest allowed cosine between an embedding and the default's embedding of the same image.
        encoder: Digest of the image encoder.
        record: Folder in which the choice of the output is recorded, or None.

    Returns:
        The recorded choice of the output if there is one. Otherwise, the choice that is kept in the cache for this CPU,
        model and versions. If neither file exists or can be read, the value that is measured to be fastest.
    """
    output_file = record and record / f"fastest-{setting}.json"
    if output_file and (content := _read_choice(output_file, candidates)):
        return content["choice"]
    versions = {name: version for name, version in package_versions().items() if name in ("torch", "transformers")}
    identity = {"setting": setting, "device": describe_device(), "encoder": encoder, "versions": versions}
    cache_file = cache_home() / "embedding_speed" / f"{json_digest(identity)}.json"
    # Of several tasks that start at the same time, the first measures, and the others wait for its choice.
    with _locked(cache_file.parent):
        content = _read_choice(cache_file, candidates)
        if content is None:
            content = identity | _measure(candidates, min_cosine)
            logger.info("Fastest %s on this CPU: %s.", setting, content["choice"])
            with suppress(OSError):  # without the file, the next pass measures again
                write_json(cache_file, content)
    if output_file:
        with _locked(output_file.parent):  # a task on another machine may have recorded its choice in the meantime
            recorded = _read_choice(output_file, candidates)
            if recorded is None:
                write_json(output_file, content)
            content = recorded or content
    return content["choice"]


def _measure(candidates: Mapping[Any, Callable[[], Any]], min_cosine: float) -> dict[str, Any]:
    """Time all candidates in turns, and return the choice with the median seconds of each candidate."""
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
    eligible = [
        value
        for value in candidates
        if cosines[value] >= min_cosine and medians[value] * MIN_SPEEDUP <= medians[default]
    ]
    choice = min(eligible, key=medians.__getitem__, default=default)
    return {"choice": choice, "seconds": {str(value): median for value, median in medians.items()}}


def _read_choice(path: Path, candidates: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Read a file with a choice. Returns None if the file is missing or damaged, so that the choice is made again."""
    try:
        content = read_json(path, choice=type(next(iter(candidates))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s can't be used and is written again: %s", path, error)
        return None
    return content if content["choice"] in candidates else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder for the `with` block, after creating it. A file system without locks is used without a lock."""
    lock = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
