"""CAPIVARA's image processor. Its `pixel_values` are bit-identical to those of open_clip 3.3's evaluation transform."""

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs, Unpack

# Largest number of pixels of an image after the resize: 67 million, or 256 MiB in memory. Photos of usual shapes have
# less than a million pixels after the resize, but a strip of 1 x 20,000 pixels would have a billion.
MAX_RESIZED_PIXELS = 2**26

CHANNEL_COUNTS = (1, 2, 3, 4)  # gray, gray + alpha, RGB, RGB + alpha


class CapivaraImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of `CapivaraImageProcessor` that transformers' image processors do not have.

    max_resized_pixels (`int`, *optional*, defaults to 67,108,864):
        Largest number of pixels (width times height) of a resized image. If an image would have more, a ValueError is
        raised before the resize.
    """

    max_resized_pixels: int


class CapivaraImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with the exact steps of open_clip 3.3's evaluation transform.

    An image is resized in its own color mode (gray, palette, …) with PIL's bicubic filter, cropped at the center,
    converted to RGB and normalized. An array or tensor gives the same result as a PIL image with the same pixels.
    16-bit images are scaled to 8 bits. Images from files are rotated according to their EXIF data. Images from URLs are
    converted to RGB before the resize.
    """

    valid_kwargs = CapivaraImageProcessorKwargs
    max_resized_pixels = MAX_RESIZED_PIXELS

    def fetch_images(self, image_url_or_urls) -> Image.Image | np.ndarray | torch.Tensor | list:
        """Load images from paths and URLs. Images that are already loaded are returned unchanged.

        Images from files keep their color mode. Images from URLs are converted to RGB.

        Args:
            image_url_or_urls: A path, URL, PIL image, array or tensor, or a list of them (also nested).

        Returns:
            The loaded image, or a list with the structure of the given list.
        """
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        # transformers would convert a file to RGB, but the resize must happen in the image's own color mode.
        if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
            with Image.open(source) as image:
                return ImageOps.exif_transpose(image)
        return super().fetch_images(os.fspath(source) if isinstance(source, os.PathLike) else source)

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        images = _flatten_images(self.fetch_images(images))
        if not images:
            raise ValueError("There is no image: got an empty list or batch. Give at least one image.")
        return images

    def _validate_preprocess_kwargs(self, **kwargs: Unpack[ImagesKwargs]) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        size, crop_size = kwargs["size"], kwargs["crop_size"]
        if kwargs["do_resize"] and not (size.shortest_edge or 0) > 0:
            raise ValueError(f'size must be {{"shortest_edge": pixels}} with at least 1 pixel, got {dict(size)}.')
        if kwargs["do_center_crop"] and not min(crop_size.height or 0, crop_size.width or 0) > 0:
            rule = '{"height": pixels, "width": pixels} with at least 1 pixel each'
            raise ValueError(f"crop_size must be {rule}, got {crop_size}.")
        for name, bound in {"image_mean": "", "image_std": " above 0"}.items() if kwargs["do_normalize"] else ():
            values = np.atleast_1d(np.asarray(kwargs[name], dtype=float))
            if values.shape not in ((1,), (3,)) or not np.isfinite(values).all() or (bound and values.min() <= 0):
                rule = f"a finite number{bound}, or three of them, one for each channel"
                raise ValueError(f"{name} must be {rule}, got {kwargs[name]}.")
        if kwargs["do_convert_rgb"] is False or kwargs.get("data_format") not in (None, ChannelDimension.FIRST):
            rule = "The model takes RGB images with the channels first"
            raise ValueError(f"{rule}, so do_convert_rgb=False and other values of data_format are not supported.")

    def process_image(
        self, image, input_data_format: str | ChannelDimension | None = None, **kwargs: Unpack[ImagesKwargs]
    ) -> Image.Image:
        """Convert an image of any type to a PIL image with 8 bits per channel, and keep its color mode.

        Args:
            image: PIL image, array or tensor.
            input_data_format: "channels_first" or "channels_last", for arrays and tensors. Default: inferred from the
                shape.
            **kwargs: Ignored.

        Returns:
            The PIL image.

        Raises:
            ValueError: If an array or tensor does not have the shape of an image, or a pixel value is out of range (see
                `convert_pixels_to_uint8`).
        """
        if not isinstance(image, Image.Image):
            return _array_to_pil(image, input_data_format)
        # Images with 16-bit, 32-bit or float pixels are converted here. PIL would clip all values above 255 to white.
        if image.mode.startswith(("I", "F")):
            return Image.fromarray(convert_pixels_to_uint8(np.asarray(image)))
        # PIL can't convert La (gray with premultiplied alpha) directly to RGB, but it can convert LA.
        return image.convert("LA") if image.mode == "La" else image

    def _preprocess(self, images: list[Image.Image], **kwargs: Unpack[CapivaraImageProcessorKwargs]) -> BatchFeature:
        # transformers' CLIP image processors convert to RGB before the resize. Their crop also differs by one pixel if
        # the removed margin is 3 modulo 4.
        # transformers passes all options. Options that the caller did not set have their default values.
        size, crop_size, factor = kwargs["size"], kwargs["crop_size"], kwargs["rescale_factor"]
        batch = []
        for image in images:
            if kwargs["do_resize"]:
                image = _resize_short_side(image, size.shortest_edge, kwargs["resample"], kwargs["max_resized_pixels"])
            if kwargs["do_center_crop"]:
                image = center_crop(image, crop_size.height, crop_size.width)
            array = torch.from_numpy(np.array(image.convert("RGB")))  # (height, width, 3), uint8
            pixels = array.to(kwargs.get("device") or "cpu").permute(2, 0, 1).contiguous().float()
            # The default factor, 1 / 255, is applied as a division by 255, as in open_clip. A multiplication may differ
            # from the division in the last bit.
            if kwargs["do_rescale"]:
                pixels = pixels.div_(255) if factor == 1 / 255 else pixels.mul_(factor)
            if kwargs["do_normalize"]:
                mean, std = (pixels.new_tensor(kwargs[name]).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
                pixels = pixels.sub_(mean).div_(std)
            batch.append(pixels)
        # Only images of the same size can be stacked. Images of different sizes stay a list.
        if len({pixels.shape for pixels in batch}) == 1:
            batch = torch.stack(batch)  # (images, 3, height, width)
        return BatchFeature({"pixel_values": batch}, tensor_type=kwargs.get("return_tensors"))


def _resize_short_side(image: Image.Image, short_side: int, resample: int, max_pixels: int) -> Image.Image:
    """Resize an image so that its shorter side has a given length, and keep the aspect ratio.

    The length of the longer side is rounded down, as in torchvision.

    Args:
        image: The image.
        short_side: Length of the shorter side of the result, in pixels.
        resample: Resampling filter, a value of `PIL.Image.Resampling`.
        max_pixels: Largest allowed number of pixels (width times height) of the result.

    Returns:
        The resized image, or `image` itself if it already has the right size.

    Raises:
        ValueError: If the result would have more than `max_pixels` pixels, or the image has no pixels.
    """
    width, height = image.size
    if not width or not height:
        raise ValueError(f"An image must have at least 1 x 1 pixels, got {width} x {height}.")
    long_side = int(short_side * max(width, height) / min(width, height))
    new_size = (short_side, long_side) if width <= height else (long_side, short_side)
    if new_size[0] * new_size[1] > max_pixels:
        sizes = f"{width} x {height} pixels would be resized to {new_size[0]} x {new_size[1]}"
        rule = f"over the limit of {max_pixels} pixels"
        raise ValueError(f"An image of {sizes}, {rule}. Crop it first or increase `max_resized_pixels`.")
    return image if image.size == new_size else image.resize(new_size, resample)


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop the center of an image. An image that is smaller than the crop is padded with black, as in torchvision.

    Args:
        image: The image.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        An image of exactly `width` x `height` pixels.
    """
    left, top = _crop_offset(image.width, width), _crop_offset(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _crop_offset(length: int, crop_length: int) -> int:
    """Return the offset of a centered crop along one side of an image, as torchvision computes it.

    Halves are rounded to the nearest even number if the image is larger than the crop.

    Args:
        length: Length of the image's side in pixels.
        crop_length: Length of the crop's side in pixels.

    Returns:
        Index of the first pixel of the crop; negative if the image is smaller than the crop.
    """
    margin = length - crop_length
    return round(margin / 2) if margin >= 0 else -(-margin // 2)


def _array_to_pil(image: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> Image.Image:
    """Convert an array or tensor to a PIL image with the same pixels.

    Args:
        image: Pixels, (height, width), or with 1 to 4 channels, (height, width, channels) or (channels, height, width).
            Values are converted by `convert_pixels_to_uint8`.
        input_data_format: "channels_first" or "channels_last". Default: inferred from the shape. If both orders are
            possible, the channels of a tensor are first and the channels of an array are last.

    Returns:
        An image in the PIL mode L, LA, RGB or RGBA.

    Raises:
        ValueError: If the shape is none of these, or a value is out of range (see `convert_pixels_to_uint8`).
    """
    is_tensor = isinstance(image, torch.Tensor)
    array = image.detach().cpu().float().numpy() if is_tensor and image.is_floating_point() else image
    array = np.asarray(array.detach().cpu() if isinstance(array, torch.Tensor) else array)
    if array.ndim == 3:
        array = _to_channels_last(array, is_tensor, input_data_format)
    elif array.ndim != 2:
        raise ValueError(f"An image must have 2 or 3 dimensions, got an array of shape {array.shape}.")
    array = np.ascontiguousarray(convert_pixels_to_uint8(array))
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)


def convert_pixels_to_uint8(array: np.ndarray) -> np.ndarray:
    """Convert pixels of any dtype to uint8 values from 0 to 255.

    - uint8 values are not changed.
    - uint16 values are divided by 257, so 65535 becomes 255.
    - Other integers are read as 8-bit values if none exceeds 255, otherwise as 16-bit values.
    - Booleans become 0 and 255.
    - Floats are read as values from 0 to 1 if none exceeds 1, otherwise as values from 0 to 255.

    Returns:
        uint8 array of the same shape.

    Raises:
        ValueError: If a value is negative, too large or not finite, or the dtype is not numeric.
    """
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise ValueError(f"Pixels must be booleans, integers or floats, got {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    is_float = np.issubdtype(array.dtype, np.floating)
    limit = 255 if is_float else 65535
    # The condition is written with `not`, so that it also refuses NaN, because every comparison with NaN is false.
    if not (low >= 0 and high <= limit):
        hint = "Pass normalized `pixel_values` to the model, not to the processor"
        raise ValueError(f"Pixels must be from 0 to {limit} for {array.dtype}, got {low:g} to {high:g}. {hint}.")
    if is_float:
        return np.rint(array * 255 if high <= 1 else array).astype(np.uint8)
    if (array.dtype.itemsize == 2 and array.dtype.kind == "u") or high > 255:
        return np.rint(array / 257).astype(np.uint8)
    return array.astype(np.uint8)


def _to_channels_last(array: np.ndarray, is_tensor: bool, input_data_format: str | None) -> np.ndarray:
    """Move the channels of an image array to the last dimension.

    Args:
        array: Pixels, (height, width, channels) or (channels, height, width), with 1 to 4 channels.
        is_tensor: Whether the pixels come from a tensor. If both orders are possible, the channels of a tensor are
            first and the channels of an array are last.
        input_data_format: "channels_first" or "channels_last". None infers the order from the shape.

    Returns:
        The array as (height, width, channels).

    Raises:
        ValueError: If the dimension of the channels does not have a size from 1 to 4.
    """
    first_fits, last_fits = array.shape[0] in CHANNEL_COUNTS, array.shape[-1] in CHANNEL_COUNTS
    channels_first = first_fits and (is_tensor or not last_fits)
    if input_data_format is not None:
        channels_first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
    if not (first_fits if channels_first else last_fits):
        data_format = f" with input_data_format={input_data_format!r}" if input_data_format else ""
        rule = "An image array must be (height, width, channels) or (channels, height, width), with 1 to 4 channels"
        raise ValueError(f"{rule}, got shape {array.shape}{data_format}.")
    return array.transpose(1, 2, 0) if channels_first else array


def _flatten_images(images) -> list:
    """Convert the images of a call to a flat list of single images.

    Args:
        images: A single image, a batch as a four-dimensional array or tensor, or nested lists of images and batches.

    Returns:
        The single images in their order.
    """
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten_images(item)]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]
