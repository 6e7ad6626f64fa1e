"""Images to `pixel_values`, equal to open_clip 3.3's evaluation transform to the last bit."""

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

# 64 million pixels, 256 MB as RGB. A photo of any usual shape needs well under a million; a 1 x 20,000 strip would
# need a billion.
MAX_RESIZED_PIXELS = 2**26

CHANNEL_COUNTS = (1, 2, 3, 4)  # L, LA, RGB, RGBA


class CapivaraImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_resized_pixels (`int`, *optional*, defaults to 67,108,864):
        An image whose resized width times height would exceed this is refused before it is resized.
    """

    max_resized_pixels: int


class CapivaraImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor, but resize, crop, conversion to RGB and normalisation in that order, on PIL images.

    The order and the roundings are those of open_clip 3.3's evaluation transform: PIL's own bicubic resize in the
    image's own mode, crop offset `round(margin / 2)`, RGB only after the crop. transformers' CLIP processors convert
    first, and crop one pixel off when the margin is 3 mod 4.

    Arrays and tensors give what the same pixels give as a PIL image (`array_to_pil`). 16-bit images are scaled to 8
    bits, not clipped to white. Files keep their own mode too, and are turned upright as their EXIF data say; the pixels
    of a URL are RGB.
    """

    valid_kwargs = CapivaraImageProcessorKwargs
    max_resized_pixels = MAX_RESIZED_PIXELS

    def fetch_images(self, image_url_or_urls) -> Image.Image | np.ndarray | torch.Tensor | list:
        """As in transformers, but the image of a local file keeps its mode, as the resize is done in it."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
            with Image.open(source) as image:
                return ImageOps.exif_transpose(image)
        return super().fetch_images(os.fspath(source) if isinstance(source, os.PathLike) else source)

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        images = _flatten_images(self.fetch_images(images))
        if not images:
            raise ValueError("There is no image: got an empty list or batch; give at least one.")
        return images

    def _validate_preprocess_kwargs(self, **kwargs: Unpack[ImagesKwargs]) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        size, crop_size = kwargs["size"], kwargs["crop_size"]
        if kwargs["do_resize"] and not (size.shortest_edge or 0) > 0:
            raise ValueError(f'size must be {{"shortest_edge": pixels}}, at least 1, got {dict(size)}.')
        if kwargs["do_center_crop"] and not min(crop_size.height or 0, crop_size.width or 0) > 0:
            raise ValueError(f'crop_size must be {{"height": pixels, "width": pixels}}, at least 1, got {crop_size}.')
        for name, least in {"image_mean": -np.inf, "image_std": 0}.items() if kwargs["do_normalize"] else ():
            found = np.atleast_1d(np.asarray(kwargs[name], dtype=float))
            if found.shape not in ((1,), (3,)) or not (np.isfinite(found) & (found > least)).all():
                rule = f"one finite number above {least}, or three, a channel each"
                raise ValueError(f"{name} must be {rule}, got {kwargs[name]}.")
        if kwargs["do_convert_rgb"] is False or kwargs.get("data_format") not in (None, ChannelDimension.FIRST):
            raise ValueError("The model takes three channels, channels_first: leave do_convert_rgb, data_format out.")

    def process_image(
        self, image, input_data_format: str | ChannelDimension | None = None, **kwargs: Unpack[ImagesKwargs]
    ) -> Image.Image:
        """One image of any kind as an 8-bit PIL image of its own mode. Raises ValueError as `array_to_pil`."""
        if not isinstance(image, Image.Image):
            return array_to_pil(image, input_data_format)
        if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit and float pixels; PIL would clip them to white
            return Image.fromarray(to_uint8(np.asarray(image)))
        return image.convert("LA") if image.mode == "La" else image  # PIL has no way from La to RGB

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: int,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        max_resized_pixels: int,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> BatchFeature:
        pixels = []
        for image in images:
            if do_resize:
                image = resize_short_side(image, size.shortest_edge, resample, max_resized_pixels)
            if do_center_crop:
                image = center_crop(image, crop_size.height, crop_size.width)
            array = torch.from_numpy(np.array(image.convert("RGB"))).to(device or "cpu")  # (height, width, 3), uint8
            one = array.permute(2, 0, 1).contiguous().float()
            if do_rescale:  # 1 / 255 as a division: a product with it differs in the last bit
                one = one.div_(255) if rescale_factor == 1 / 255 else one.mul_(rescale_factor)
            if do_normalize:
                mean, std = (one.new_tensor(value).reshape(-1, 1, 1) for value in (image_mean, image_std))
                one = one.sub_(mean).div_(std)
            pixels.append(one)
        if len({one.shape for one in pixels}) == 1:  # else a list of (3, height, width)
            pixels = torch.stack(pixels)  # (images, 3, height, width)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def resize_short_side(image: Image.Image, short_side: int, resample: int, max_pixels: int) -> Image.Image:
    """`image` with its short side at `short_side` pixels, the long side rounded down, as torchvision does.

    ValueError where the result would have more than `max_pixels` pixels, or the image has none.
    """
    width, height = image.size
    if not width or not height:
        raise ValueError(f"The image is empty: {width} x {height} pixels.")
    long_side = int(short_side * max(width, height) / min(width, height))
    new_size = (short_side, long_side) if width <= height else (long_side, short_side)
    if new_size[0] * new_size[1] > max_pixels:
        sizes = f"{width} x {height} pixels would be resized to {new_size[0]} x {new_size[1]}"
        raise ValueError(f"An image of {sizes}, over {max_pixels}; crop it first or raise `max_resized_pixels`.")
    return image if image.size == new_size else image.resize(new_size, resample)


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle `height` x `width` pixels; where the image is smaller, black around it, as torchvision does."""
    left, top = _crop_offset(image.width, width), _crop_offset(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _crop_offset(length: int, crop_length: int) -> int:
    """Where a crop begins: outside of an image that is smaller, and of two middle pixels at the even one."""
    margin = length - crop_length
    return round(margin / 2) if margin >= 0 else -(-margin // 2)


def array_to_pil(image: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> Image.Image:
    """An array or tensor as the PIL image that has the same pixels; values as of `to_eight_bits`.

    It is (height, width), with 1 to 4 channels last (arrays) or first (tensors), unless only the other reading fits or
    `input_data_format` ("channels_first" or "channels_last") says otherwise; ValueError where it is no image.
    """
    tensor_input = isinstance(image, torch.Tensor)
    array = image.detach().cpu().float().numpy() if tensor_input and image.is_floating_point() else image
    array = np.asarray(array.detach().cpu() if isinstance(array, torch.Tensor) else array)
    if array.ndim == 3:
        array = _to_channels_last(array, tensor_input, input_data_format)
    elif array.ndim != 2:
        raise ValueError(f"An image has 2 or 3 dimensions, got an array of shape {array.shape}.")
    array = np.ascontiguousarray(to_uint8(array))
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Pixels of any depth as uint8 of the same shape.

    uint8 stays. uint16 is scaled by 255 / 65535. Wider integers are taken as 8-bit when none exceeds 255, else as
    16-bit. Booleans become 0 and 255. Floats are shares from 0 to 1, or, when one exceeds 1, 0 to 255. ValueError where
    a value is negative, too large or not finite.
    """
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise ValueError(f"Pixels must be booleans, integers or floats, got {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    floating = np.issubdtype(array.dtype, np.floating)
    limit = 255 if floating else 65535
    if not (low >= 0 and high <= limit):  # also False for NaN
        raise ValueError(
            f"Pixels must be 0 to {limit} for {array.dtype}, got {low:g} to {high:g}. Normalised `pixel_values` go to "
            "the model, not to the processor."
        )
    if floating:
        return np.rint(array * 255 if high <= 1 else array).astype(np.uint8)
    if (array.dtype.itemsize == 2 and array.dtype.kind == "u") or high > 255:
        return np.rint(array / 257).astype(np.uint8)
    return array.astype(np.uint8)


def _to_channels_last(array: np.ndarray, is_tensor: bool, input_data_format: str | None) -> np.ndarray:
    first_fits, last_fits = array.shape[0] in CHANNEL_COUNTS, array.shape[-1] in CHANNEL_COUNTS
    if input_data_format is not None:
        channels_first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
    else:
        channels_first = first_fits and (is_tensor or not last_fits)
    if not (first_fits if channels_first else last_fits):
        reading = f" with input_data_format={input_data_format!r}" if input_data_format else ""
        raise ValueError(f"An image has 1 to 4 channels, first or last; got shape {array.shape}{reading}.")
    return array.transpose(1, 2, 0) if channels_first else array


def _flatten_images(images) -> list:
    """One image, a batch array, or lists of them, nested or not, as one flat list."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten_images(item)]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]
