"""Augment images as in the CAPIVARA paper (arXiv 2310.13683, section 4), reproducibly.

An augmented copy of an image is called a view. For the same image, seed and view index, training and the command
`captions.embed` (which embeds images in advance) make the same view.
"""

from importlib.metadata import version
from typing import Any

import numpy as np
import PIL.Image
import torch

from capivara_common.image_files import to_8_bit

# Settings of the CAPIVARA paper (arXiv 2310.13683, section 4): length of the image's shorter side and size of the crop,
# in pixels; smallest and largest share of the image's area that a crop covers; strength of the augmentation AugMix
AUGMENTATION = {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}


def derive_seed(*numbers: int) -> int:
    """Combine several non-negative integers, such as a seed and a step number, into one 63-bit random seed.

    The same integers in the same order give the same seed on every machine.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def describe_augmentation(seed: int) -> dict[str, Any]:
    """Return all settings that determine how images are augmented, so that results can record them.

    Args:
        seed: Seed of the run or dataset.

    Returns:
        A dict of JSON values: the constants in `AUGMENTATION`, the version of torchvision (key "torchvision"), and the
        seed (key "seed").
    """
    return AUGMENTATION | {"torchvision": version("torchvision"), "seed": seed}


def make_augmented_view(image: PIL.Image.Image, digest: str, view: int, seed: int) -> PIL.Image.Image:
    """Return a randomly augmented copy of an image, called a view. The same arguments give the same view.

    As in the CAPIVARA paper (arXiv 2310.13683, section 4), the view is a random crop with 90 to 100 % of the area,
    followed by AugMix with severity 2.

    Args:
        image: Decoded image.
        digest: BLAKE2b-128 hex digest of the image file.
        view: Index of the view. Each index gives another view of the image.
        seed: Seed of the run or dataset.

    Returns:
        The view, 224 x 224 pixels, RGB.
    """
    from torchvision.transforms import v2 as transforms

    # The seed depends on the digest and not on the row index, because indices change when other rows are skipped.
    torch.manual_seed(derive_seed(seed, int(digest, 16), view))
    bicubic = transforms.InterpolationMode.BICUBIC
    image = to_8_bit(image)  # PIL's conversion to RGB would clip 16-bit images instead of scaling them
    # PIL can't convert the mode La (gray with premultiplied alpha) to RGB directly.
    image = image.convert("LA") if image.mode == "La" else image
    image = transforms.Resize(AUGMENTATION["resize"], bicubic)(image.convert("RGB"))
    image = transforms.RandomResizedCrop(AUGMENTATION["crop"], AUGMENTATION["scale"], interpolation=bicubic)(image)
    return transforms.AugMix(severity=AUGMENTATION["augmix_severity"])(image)
