"""The page as a Space: a folder with the program, an index of pictures and the model.

Whose the pictures are is read from the README of their folder, where that is there. The index is copied without the
names of this machine's folders and the places where pictures were taken; thumbnails stand for the pictures.
Requirements are pinned to the versions that built it. The Space is one of Docker.
"""

import json
import re
import shutil
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import jinja2
import pyarrow as pa
from huggingface_hub import SpaceCard, SpaceCardData

from capivara_common.files import atomic_folder, write_text
from capivara_common.privacy import find_secret, short_name
from capivara_search.index import PictureIndex
from capivara_search.indexing import FOLDER_KEY_PREFIX
from capivara_search.models import find_model
from capivara_search.page.server import DEFAULT_PORT, Credit
from capivara_search.table import PictureTable
from hub_upload.allowed_files import TOKENIZER_FILES, check_model_files, check_paths, check_secrets
from modeling_capivara.loading import read_card_metadata

CODE_ROOT, TEMPLATE_FOLDER = Path(__file__).resolve().parents[2], Path(__file__).parent / "templates"
PROGRAM_PACKAGES = ("capivara_common", "capivara_search", "modeling_capivara")
PROGRAM_SUFFIXES = (".py", ".html", ".css", ".js", ".svg", ".json", ".txt", ".yaml")
STORAGE_PREFIXES = ("s3://", "gs://", "az://")  # how addresses of indexes begin
# Of the page, beside those of the model.
PAGE_PACKAGES = ("jinja2", "lancedb", "pillow-heif", "starlette", "threadpoolctl", "uvicorn")
SPACE_MODEL_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
SPACE_TITLE = "CAPIVARA: busca em português"
SPACE_CARD_STYLE = {
    "emoji": "🐾",
    "colorFrom": "green",
    "colorTo": "yellow",
    "pinned": False,
}  # of the Hub's list of Spaces

# --- Pictures --------------------------------------------------------------------------------------------------------


def open_index(pictures: str, model: str) -> tuple[PictureIndex, Credit]:
    """An index of pictures, and whose they are. Raises ValueError where there is no such index, or no such model."""
    if not Path(pictures, "pictures.lance").is_dir() and not pictures.startswith(STORAGE_PREFIXES):
        raise ValueError(f"--pictures {pictures} is no index. Make one: capivara index FOLDER --index pictures.lance")
    index = PictureIndex.open(pictures, model)
    return index, read_credit(Path(next(iter(index.folders()), pictures)))


def read_credit(folder: Path) -> Credit:
    """Whose the pictures of a folder are, as its README says."""
    found = read_card_metadata(folder / "README.md")
    keys = ("pretty_name", "license", "attribution")
    name, licence, attribution = (value if isinstance(value := found.get(key), str) else "" for key in keys)
    return Credit(name or folder.resolve().name, licence, attribution)


def publish_index(index: PictureIndex, output: Path, model: str, title: str = "") -> int:
    """Copy an index without the names of this machine's folders, and without the places where pictures were taken.

    Args:
        index: with rows.
        where: folder of the copy, which is not there yet.
        model: where the Space finds the model: a folder relative to the Space's, or a Hub id.
        title: name of the folder that stands for the one that was added, where it is only one.

    Returns the number of pictures. Raises ValueError where the index's model has embedded none.
    """
    names: dict[str, str] = {}  # folder that was added -> name in its place, the innermost first
    for folder in sorted(folders := list(index.folders()), key=len, reverse=True):
        name = "/" + ((title if len(folders) == 1 else "") or PurePath(folder).name or "pictures").replace("/", "-")
        while name in names.values():
            name += "-"
        names[folder] = name
    source, target, width = PictureTable(index.where), PictureTable(output), index.model.width
    target.create(width)
    kept, digest, copied = target.pictures.schema, index.model.image_digest, 0
    for batch in source.batches(kept.names, f"model = '{digest}'"):
        rows, nowhere = pa.Table.from_batches([batch]), pa.nulls(len(batch), pa.float64())
        renamed = pa.array([_anonymize_path(path, names) for path in rows["path"].to_pylist()], pa.string())
        changed: dict[str, Any] = {"path": renamed, "latitude": nowhere, "longitude": nowhere}
        target.upsert(pa.Table.from_arrays([changed.get(name, rows[name]) for name in kept.names], schema=kept))
        copied += len(rows)
    if not copied:
        raise ValueError(f"The index {index.where} has no picture that {index.model.name} has embedded.")
    facts = {"source": model, "name": index.model.name, "width": width, "image_digest": digest}
    target.set_metadata({"model": json.dumps(facts), **{FOLDER_KEY_PREFIX + name: "" for name in names.values()}})
    return copied


def _anonymize_path(path: str, new_names: dict[str, str]) -> str:
    for folder, name in new_names.items():
        if PurePath(path).is_relative_to(folder):
            return str(PurePath(name, PurePath(path).relative_to(folder)))
    return str(PurePath("/", PurePath(path).name))  # of a folder that is no longer listed


# --- The folder -----------------------------------------------------------------------------------------------------


def write_space(index: PictureIndex, credit: Credit, model: str, folder: Path) -> None:
    """Write the folder of a Space; of the model, a folder is copied, and a Hub id left to the Space to fetch.

    Raises ValueError where the folder is not empty, or a file names a path of this machine or a token.
    """
    with atomic_folder(folder) as made:
        program = (path for package in PROGRAM_PACKAGES for path in (CODE_ROOT / package).rglob("*"))
        for path in (CODE_ROOT / "LICENSE", *(path for path in program if path.suffix in PROGRAM_SUFFIXES)):
            copy_file(path, made / path.relative_to(CODE_ROOT))
        there = _copy_model(model, made)
        publish_index(index, made / "index.lance", there, credit.name)
        names = "\n".join(PictureTable(made / "index.lance").rows(["path"])["path"].to_pylist())
        if found := find_secret(names):
            raise ValueError(f"A picture's name holds {found[0]}. Rename it, and revoke it if it is real.")
        pinned = pin_requirements(model)
        write_text(made / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in pinned.items()))
        values = {
            "title": SPACE_TITLE,
            "model": repr(there),
            "credit": repr(credit),
            "port": DEFAULT_PORT,
            "pinned": pinned,
        }
        for name in ("app.py", "Dockerfile"):
            template = jinja2.Template((TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
            write_text(made / name, template.render(values) + "\n")
        licence = read_model_license(Path(model))
        known = {one for one in (credit.license, licence) if one}
        about = {"sdk": "docker", "app_port": DEFAULT_PORT, "license": known.pop() if len(known) == 1 else "other"}
        about |= {"title": SPACE_TITLE, "short_description": "Busca de imagens com palavras em português"}
        about["models"] = None if Path(model).is_dir() else [model]
        write_space_card(made, "space", about, name=short_name(model), credit=credit, model_licence=licence)
        for name in ("README.md", "app.py"):  # what a stranger's card is called
            check_secrets(made / name, name)
            check_paths(made / name, name)


def write_space_card(folder: Path, template: str, card_data: dict[str, Any], **values: Any) -> None:
    """Write the README.md of a Space, of "space" or "static"; `about` is what the Hub reads."""
    path = TEMPLATE_FOLDER / f"{template}.md.jinja"
    card = SpaceCard.from_template(SpaceCardData(**card_data, **SPACE_CARD_STYLE), template_path=str(path), **values)
    write_text(folder / "README.md", f"{card}\n")


def read_model_license(model: Path) -> str:
    """What the card of a model in a folder says; the Hub shows that of others."""
    return str(read_card_metadata(model / "README.md").get("license") or "")


def pin_requirements(model: str) -> dict[str, str]:
    """What the page and its model need: package -> version, that which is installed."""
    needed = [line for line in metadata.requires("modeling-capivara") if "extra ==" not in line]
    names = [*(re.match(r"[\w.-]+", line)[0] for line in needed), *PAGE_PACKAGES]
    if "timm_wrapper" in (find_model(model).folder / "config.json").read_text("utf-8"):
        names.append("timm")
    return {name: metadata.version(name).partition("+")[0] for name in names}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file into a folder, which is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_model(model: str, space_folder: Path) -> str:
    """Where the Space finds a model: an id stays one, a folder is copied, without what only training needs."""
    source = Path(model)
    if not source.is_dir():
        return model
    target = Path("models", short_name(model))
    for file in (file for pattern in SPACE_MODEL_FILES for file in source.glob(pattern)):
        copy_file(file, space_folder / target / file.name)
    check_model_files(space_folder / target)
    return str(target)
