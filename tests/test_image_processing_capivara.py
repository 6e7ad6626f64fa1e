"""Pixels equal open_clip's to the last bit, for every size, mode and container of an image."""

import random

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import CenterCrop, Compose

from capivara_common import image_files
from modeling_capivara import CapivaraImageProcessor, image_processing_capivara

PROCESSOR = CapivaraImageProcessor()
OPEN_CLIP = image_transform_v2(PreprocessCfg(size=224), is_train=False)

SPECIAL_SIZES = [
    *[(1, n) for n in (1, 2, 3, 7, 20)],
    *[(n, 1) for n in (2, 3, 7, 20)],
    *[(640, 427), (427, 640), (2, 33), (33, 2), (3, 40), (40, 3), (640, 480), (500, 375)],
    *[(224, 224), (225, 224), (224, 225), (223, 224), (224, 223), (223, 223), (225, 225), (227, 224), (224, 227)],
    *[(448, 224), (224, 451), (300, 241), (241, 300), (112, 113), (113, 112)],
]
OPEN_CLIP_MODES = [
    *["L", "LA", "RGB", "RGBA", "CMYK", "1", "YCbCr", "HSV", "LAB", "PA", "RGBa", "RGBX"],
    *["P", "P-index", "P-bytes", "P-RGBA", "L-index", "RGB-color"],  # with a transparent index, alphas, a color
]
MODE_SIZES = [(224, 224), (160, 107), (37, 61), (1, 3), (225, 224)]


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, width, height, channels])
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def image_of(mode: str, width: int, height: int) -> Image.Image:
    """Return a noise image of a PIL mode; the part after a dash is the kind of transparency."""
    rgba = Image.fromarray(noise(width, height, 4), "RGBA")
    rgb = rgba.convert("RGB")
    if mode in ("RGBX", "LAB", "HSV"):  # `convert` would use only some of their possible values
        channels = 4 if mode == "RGBX" else 3
        return Image.frombytes(mode, (width, height), noise(width, height, channels).tobytes())
    if mode in ("LA", "RGBA", "RGBa"):
        return rgba.convert(mode)
    if mode == "PA":
        return rgb.quantize(64).convert("PA")
    if mode == "P-RGBA":
        return rgba.quantize(32)
    image = rgb.quantize(64) if mode.startswith("P") else rgb.convert(mode.split("-")[0])
    kinds = {"P-index": 3, "P-bytes": bytes(range(0, 256, 4)), "L-index": 3, "RGB-color": rgb.getpixel((0, 0))}
    if mode in kinds:
        image.info["transparency"] = kinds[mode]
    return image


def pixels(images, **kwargs) -> torch.Tensor:
    return PROCESSOR(images, return_tensors="pt", **kwargs).pixel_values


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected), f"{what}: largest difference {(actual - expected).abs().max():.3g}"


def test_every_size_gives_open_clips_bits():
    rng = random.Random(7)
    sizes = [*SPECIAL_SIZES]
    for number in range(120):
        short_side = rng.randint(5, 300)
        size = (short_side, int(short_side * rng.uniform(1, 2)))
        sizes.append(size if number % 2 else size[::-1])
    margins = {(int(224 * max(s) / min(s)) - 224) % 4 for s in sizes}
    assert margins == {0, 1, 2, 3}, "the sizes must include the margin that other processors crop differently"
    for size in sizes:
        image = Image.fromarray(noise(*size))
        assert_same_bits(pixels(image)[0], OPEN_CLIP(image), size)


@pytest.mark.parametrize("mode", OPEN_CLIP_MODES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_mode_gives_open_clips_bits(mode):
    for size in MODE_SIZES:
        image = image_of(mode, *size)
        assert image.mode == mode.split("-")[0]
        if mode == "LA":  # open_clip refuses premultiplied images (La)
            assert_same_bits(pixels(image.convert("La")), pixels(image.convert("La").convert("LA")), "La")
        assert_same_bits(pixels(image)[0], OPEN_CLIP(image.copy()), (mode, size))


@pytest.mark.parametrize("side", [32, 63, 250, 336])
def test_other_sizes_give_open_clips_bits(side):
    reference = image_transform_v2(PreprocessCfg(size=side, mean=(0.5,) * 3, std=(0.25,) * 3), is_train=False)
    processor = CapivaraImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    for size in [(90, 61), (61, 90), (side, side), (side + 3, side)]:
        image = Image.fromarray(noise(*size))
        assert_same_bits(processor(image, return_tensors="pt").pixel_values[0], reference(image), (side, size))


# --- arrays and tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(61, 45), (1, 5), (5, 1), (224, 231), (7, 3)])
def test_arrays_and_tensors_equal_the_pil_image(size):
    for channels, mode in [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")]:
        array = noise(*size, channels)
        expected = pixels(Image.fromarray(array.squeeze(-1) if channels == 1 else array, mode))
        first = array.transpose(2, 0, 1)
        readings = {
            "channels last": pixels(array, input_data_format="channels_last"),
            "channels first": pixels(first, input_data_format="channels_first"),
            "tensor channels first": pixels(torch.from_numpy(first.copy())),
            "tensor channels last": pixels(torch.from_numpy(array), input_data_format="channels_last"),
        }
        if channels == 1:
            readings["two dimensions"] = pixels(torch.from_numpy(array[..., 0]))
        if min(size) > 4:  # the shape shows which axis has the channels
            readings["channels first, guessed"] = pixels(first)
            readings["tensor channels last, guessed"] = pixels(torch.from_numpy(array))
        for name, actual in readings.items():
            assert_same_bits(actual, expected, (name, channels, size))


def test_values_of_every_dtype_are_converted_to_bytes():
    array, ramp = noise(20, 30), np.arange(256, dtype=np.uint8).reshape(16, 16)
    dark, tensor, shares = ramp > 127, torch.from_numpy(ramp), torch.rand(3, 20, 20, requires_grad=True)
    pairs = [(np.asfortranarray(array), array), (array[::-1][::-1], array), (dark, dark.astype(np.uint8) * 255)]
    pairs += [((tensor / 255).half(), ramp), (tensor.bfloat16(), ramp), (shares, shares.detach().numpy())]
    pairs += [((ramp / 255).astype(kind), ramp) for kind in (np.float16, np.float32, np.float64)]
    pairs += [(ramp.astype(kind), ramp) for kind in (np.float16, np.float64, np.int16, np.int64, np.uint32)]
    pairs += [(torch.from_numpy(array).permute(2, 0, 1).to(torch.int32), array)]
    for number, (image, expected) in enumerate(pairs):
        assert_same_bits(pixels(image), pixels(expected), number)


# --- more than eight bits -----------------------------------------------------------------------------------------


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path):
    eight = noise(50, 40)[..., 0]
    sixteen = eight.astype(np.uint16) * 257  # 0 stays 0, 255 becomes 65535
    readings = {
        "I;16": Image.fromarray(sixteen),
        "I;16B": Image.frombytes("I;16B", (50, 40), sixteen.astype(">u2").tobytes()),
        "I": Image.fromarray(sixteen.astype(np.int32)),
    }
    assert all(image.mode == mode for mode, image in readings.items())
    readings["I;16"].save(tmp_path / "deep.png")
    readings |= {"array": sixteen, "tensor": torch.from_numpy(sixteen), "path": str(tmp_path / "deep.png")}
    for name, image in readings.items():
        assert_same_bits(pixels(image), pixels(Image.fromarray(eight)), name)
    rgb = noise(50, 40)
    assert_same_bits(pixels(rgb.astype(np.uint16) * 257), pixels(rgb), "three channels")
    dark = np.full((30, 30), 200, dtype=np.uint16)  # 0.3 % of white, although the values would fit into a byte
    for image in (dark, Image.fromarray(dark)):
        assert_same_bits(pixels(image), pixels(np.full((30, 30), 1, np.uint8)), "dark")


# --- containers ---------------------------------------------------------------------------------------------------


def test_containers():
    images = [Image.fromarray(noise(*size)) for size in [(50, 40), (40, 50), (224, 224), (1, 3)]]
    assert_same_bits(pixels(images), torch.stack([OPEN_CLIP(image) for image in images]), "of unequal sizes")
    a, b = noise(40, 40, seed=1), noise(40, 40, seed=2)
    two, tensors = pixels([a, b]), torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2)
    assert two.shape == (2, 3, 224, 224) and not torch.equal(two[0], two[1])
    batches = [(a, b), [[a], [b]], np.stack([a, b]), tensors, [a[None], b[None]], [Image.fromarray(a), tensors[1]]]
    for number, batch in enumerate(batches):
        assert_same_bits(pixels(batch), two, number)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P-index", "P-bytes"])
def test_file_keeps_its_mode_and_is_turned_upright(tmp_path, mode):
    path = tmp_path / "image.png"
    image_of(mode, 61, 45).save(path)
    with Image.open(path) as image:
        expected = OPEN_CLIP(image)
    for source in (str(path), path, [path]):
        assert_same_bits(pixels(source)[0], expected, mode)
    turned, image = Image.Exif(), image_of(mode, 61, 45)
    turned[0x0112] = 6  # EXIF orientation tag: rotate by 90 degrees to display the image upright
    image.save(path, exif=turned)
    assert_same_bits(pixels(path), pixels(image.transpose(Image.Transpose.ROTATE_270)), "exif")


def test_save_and_load_keep_every_setting(tmp_path):
    from transformers import AutoImageProcessor

    settings = {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 44}, "max_resized_pixels": 12345}
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    changed, image = CapivaraImageProcessor(**settings), Image.fromarray(noise(61, 45))
    for processor, expected in ((PROCESSOR, OPEN_CLIP(image)), (changed, changed(image).pixel_values[0])):
        processor.save_pretrained(tmp_path)
        for loaded in (CapivaraImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
            assert isinstance(loaded, CapivaraImageProcessor)
            assert_same_bits(loaded(image, return_tensors="pt").pixel_values[0], torch.as_tensor(expected), "reloaded")
    assert expected.shape == (3, 40, 44) and loaded.max_resized_pixels == 12345
    assert (tuple(loaded.image_mean), tuple(loaded.image_std)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# --- refusals -----------------------------------------------------------------------------------------------------


def test_oversized_resize_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"1 x 20000 pixels.*224 x 4480000.*67108864.*max_resized_pixels"):
        PROCESSOR(Image.new("L", (1, 20000)))
    with pytest.raises(ValueError, match=r"40 x 20 pixels.*448 x 224"):
        PROCESSOR(noise(40, 20), max_resized_pixels=448 * 224 - 1)
    assert pixels(noise(40, 20), max_resized_pixels=448 * 224).shape == (1, 3, 224, 224)


BAD_IMAGES = {
    "negative": (np.full((4, 5, 3), -0.1), r"0 to 255 for float64, got -0\.1"),
    "normalized": (torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0)), "`pixel_values`.* model"),
    "text": (np.array([["a"]]), "booleans, integers or floats"),
    "five channels": (np.zeros((9, 9, 5), np.uint8), r"1 to 4 channels.*\(9, 9, 5\)"),
    "empty PIL": (Image.new("RGB", (0, 5)), "0 x 5"),
    "empty list": ([], "no image"),
    "missing file": ("/nowhere/image.png", "/nowhere/image.png"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused_by_name(kind):
    image, message = BAD_IMAGES[kind]
    with pytest.raises(ValueError, match=message):
        PROCESSOR(image, return_tensors="pt")


BAD_SETTINGS = {
    "both sides": ({"size": {"height": 20, "width": 30}}, "shortest_edge.*20"),
    "negative size": ({"size": {"shortest_edge": -3}}, "at least 1.*-3"),
    "empty crop": ({"crop_size": {"height": 0, "width": 3}}, "crop_size must be"),
    "two means": ({"image_mean": [0.5, 0.5]}, r"image_mean.*\(0\.5, 0\.5\)"),
    "no spread": ({"image_std": [0.5, 0.5, 0.0]}, "image_std.*above 0"),
    "infinite mean": ({"image_mean": float("inf")}, "image_mean must be a finite number, .*inf"),
    "no number": ({"image_std": float("nan")}, "image_std.*above 0"),
    "no conversion": ({"do_convert_rgb": False}, "do_convert_rgb"),
    "channels last": ({"data_format": "channels_last"}, "data_format"),
    "wrong layout": ({"input_data_format": "channels_first"}, r"\(30, 20, 3\).*channels_first"),
    "misspelled": ({"do_normalise": False}, "do_normalise"),
}


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(kind):
    setting, message = BAD_SETTINGS[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        PROCESSOR(noise(20, 30), **setting)


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
@pytest.mark.parametrize("high", [1, 200, 255, 256, 65535])
def test_model_files_and_tools_convert_to_8_bits_alike(kind, high):
    """The formula exists twice, because the model files must not import capivara_common."""
    values = (np.random.default_rng(0).random((5, 7)) * high).astype(kind)
    values.flat[0] = high
    results = []
    for convert in (
        lambda image: image_processing_capivara.convert_pixels_to_uint8(np.asarray(image)),
        image_files.to_8_bit,
    ):
        try:
            results.append(np.asarray(convert(Image.fromarray(values))).tolist())
        except ValueError:
            results.append(ValueError)
    assert results[0] == results[1]


def test_each_step_can_be_left_out():
    image, small = noise(224, 224), Image.fromarray(noise(31, 133))
    raw = torch.from_numpy(image).permute(2, 0, 1).float()
    assert torch.equal(pixels(image, do_normalize=False)[0], raw / 255)
    assert torch.equal(pixels(image, do_normalize=False, rescale_factor=0.5)[0], raw * 0.5)
    plain = PROCESSOR([image, noise(60, 40)], do_center_crop=False, do_rescale=False, do_normalize=False).pixel_values
    assert [tuple(result.shape) for result in plain] == [(3, 224, 224), (3, 224, 336)] and torch.equal(plain[0], raw)
    expected = Compose([CenterCrop(64), *OPEN_CLIP.transforms[2:]])(small)
    assert_same_bits(pixels(small, do_resize=False, crop_size=64)[0], expected, "a larger crop is padded with black")
