"""Write the search page as a Docker Space (web demo on the Hub): a folder with program, model and index of pictures.

The index is a copy without private data. Owner and license of the pictures are read from the README.md of their folder.
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
from capivara_common.privacy import find_secret, get_publishable_model_or_dataset_name
from capivara_search.index import PictureIndex
from capivara_search.models import resolve_search_model
from capivara_search.page.server import DEFAULT_PORT, Credit
from capivara_search.table import PictureTable
from hub_upload import upload_checks
from modeling_capivara.loading import read_card_metadata

CODE_ROOT = Path(__file__).resolve().parents[2]
TEMPLATE_FOLDER = Path(__file__).parent / "templates"
PROGRAM_PACKAGES = ("capivara_common", "capivara_search", "modeling_capivara")
PROGRAM_SUFFIXES = (".py", ".html", ".css", ".js", ".svg", ".json", ".txt", ".yaml")
STORAGE_PREFIXES = ("s3://", "gs://", "az://")  # starts of the URIs of indexes in cloud storage
# Python packages that the search page needs, in addition to the packages that the model needs.
PAGE_PACKAGES = ("jinja2", "lancedb", "pillow-heif", "starlette", "threadpoolctl", "uvicorn")
SPACE_MODEL_FILES = ("config.json", *upload_checks.PROCESSOR_FILES, *upload_checks.WEIGHT_FILES)
SPACE_TITLE = "CAPIVARA: busca em português"
# Settings in the front matter (YAML header) of README.md: how the Space looks in the Hub's list of Spaces.
SPACE_CARD_STYLE = {"emoji": "🐾", "colorFrom": "green", "colorTo": "yellow", "pinned": False}

# --- Pictures --------------------------------------------------------------------------------------------------------


def read_picture_credit_from_card(folder: Path) -> Credit:
    """Read who must be credited for the pictures in a folder, from the front matter (YAML header) of its README.md.

    Args:
        folder: Folder with the pictures.

    Returns:
        Name, license and attribution of the pictures. Missing values are "", but a missing name becomes the folder's
        name.
    """
    metadata = read_card_metadata(folder / "README.md")
    values = [metadata.get(key) for key in ("pretty_name", "license", "attribution")]
    name, license, attribution = (value if isinstance(value, str) else "" for value in values)
    return Credit(name or folder.resolve().name, license, attribution)


def copy_index_for_publication(index: PictureIndex, output: Path, model: str, title: str) -> None:
    """Copy an index of pictures for publication, without private data.

    In the copy, public names replace the paths of the indexed folders, and GPS coordinates are removed. Only pictures
    that were embedded with the model of the index are copied.

    Args:
        index: Index to copy.
        output: Folder of the copy. It must not exist yet.
        model: Folder of the model relative to the Space, or its Hub id. The copy stores it.
        title: Public name of the indexed folder. With "" or several folders, the last part of each
            folder's path is its public name.

    Raises:
        ValueError: If no picture was embedded with the model of the index.
    """
    # Maps each indexed folder to its public name. An indexed subfolder is listed before its parent folder, because
    # `_anonymize_path` uses the first folder that contains the picture.
    names: dict[str, str] = {}
    folders = sorted(index.folders(), key=len, reverse=True)
    for folder in folders:
        public_name = (title if len(folders) == 1 else "") or PurePath(folder).name or "pictures"
        name = "/" + public_name.replace("/", "-")
        while name in names.values():
            name += "-"
        names[folder] = name
    source, target, width = PictureTable(index.where), PictureTable(output), index.model.width
    target.create(width)
    schema, digest = target.pictures.schema, index.model.image_digest
    for batch in source.batches(schema.names, f"model = '{digest}'"):
        rows, nulls = pa.Table.from_batches([batch]), pa.nulls(len(batch), pa.float64())
        paths = pa.array([_anonymize_path(path, names) for path in rows["path"].to_pylist()], pa.string())
        changed: dict[str, Any] = {"path": paths, "latitude": nulls, "longitude": nulls}
        target.upsert(pa.Table.from_arrays([changed.get(name, rows[name]) for name in schema.names], schema=schema))
    if not target.count():
        raise ValueError(
            f"The index {index.where} has no pictures embedded with {index.model.name}. Index them with this model."
        )
    model_metadata = {"source": model, "name": index.model.name, "width": width, "image_digest": digest}
    target.set_metadata({"model": json.dumps(model_metadata)})
    target.set_folders(dict.fromkeys(names.values(), ""))


def _anonymize_path(path: str, new_names: dict[str, str]) -> str:
    """Replace the indexed folder in a picture's path with the public name of this folder.

    Args:
        path: Absolute path of a picture.
        new_names: Dict {indexed folder: public name}. The first folder that contains the picture is replaced, so
            subfolders must come before their parent folders.

    Returns:
        The path with the public name, such as "/photos/2024/beach.jpg". If none of the folders contains the picture,
        only the file name is kept.
    """
    for folder, name in new_names.items():
        if PurePath(path).is_relative_to(folder):
            return str(PurePath(name, PurePath(path).relative_to(folder)))
    # This happens if the picture's folder was removed from the list of indexed folders.
    return str(PurePath("/", PurePath(path).name))


# --- Folder of the Space ---------------------------------------------------------------------------------------------


def write_space(pictures: str, model: str, folder: Path) -> None:
    """Write the folder of a Space (web demo on the Hub) that serves the picture search page.

    Args:
        pictures: Path or URI of the index of pictures. The Space gets a copy without private data.
        model: Folder or Hub id of the model. A folder is copied to the Space. From a Hub id, the Space downloads the
            model.
        folder: Folder to write. It must be empty or not exist yet.

    Raises:
        ValueError: If the index or the model does not exist, `folder` is not empty, or a file to publish contains an
            access token or absolute path.
    """
    if not Path(pictures, "pictures.lance").is_dir() and not pictures.startswith(STORAGE_PREFIXES):
        raise ValueError(
            f"--pictures {pictures} is not an index. Create one: capivara index FOLDER --index pictures.lance"
        )
    index = PictureIndex.open(pictures, model)
    credit = read_picture_credit_from_card(Path(next(iter(index.folders()), pictures)))
    with atomic_folder(folder) as output:
        program = (path for package in PROGRAM_PACKAGES for path in (CODE_ROOT / package).rglob("*"))
        for path in (CODE_ROOT / "LICENSE", *(path for path in program if path.suffix in PROGRAM_SUFFIXES)):
            copy_file(path, output / path.relative_to(CODE_ROOT))
        model_location = _copy_local_model(model, output)
        copy_index_for_publication(index, output / "index.lance", model_location, credit.name)
        names = "\n".join(PictureTable(output / "index.lance").rows(["path"])["path"].to_pylist())
        if secret := find_secret(names):
            raise ValueError(
                f"The file name of a picture contains {secret[0]}. Rename it, and revoke it if it is real."
            )
        pinned = _get_required_package_versions(model)
        write_text(output / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in pinned.items()))
        values = {"title": SPACE_TITLE, "port": DEFAULT_PORT, "pinned": pinned}
        values |= {"model": repr(model_location), "credit": repr(credit)}
        for name in ("app.py", "Dockerfile"):
            template = jinja2.Template((TEMPLATE_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
            write_text(output / name, template.render(values) + "\n")
        model_license = read_model_license(Path(model))
        licenses = {credit.license, model_license} - {""}
        card_data = {"sdk": "docker", "app_port": DEFAULT_PORT}
        card_data["license"] = licenses.pop() if len(licenses) == 1 else "other"
        card_data |= {"title": SPACE_TITLE, "short_description": "Busca de imagens com palavras em português"}
        card_data["models"] = None if Path(model).is_dir() else [model]
        model_name = get_publishable_model_or_dataset_name(model)
        write_space_card(output, "space", card_data, name=model_name, credit=credit, model_license=model_license)
        # These two files quote texts from the cards of the model and the pictures. Such a text may contain an access
        # token or an absolute path.
        for name in ("README.md", "app.py"):
            upload_checks.check_file_for_secrets(output / name, name)
            upload_checks.check_paths(output / name, name)


def write_space_card(folder: Path, template: str, card_data: dict[str, Any], **values: Any) -> None:
    """Write the card (README.md) of a Space, from which the Hub reads the settings of the Space.

    Args:
        folder: Folder of the Space.
        template: "space" for a Space with a server, "static" for a page without a server.
        card_data: Settings of the Space, for the front matter (YAML header) of the card.
        values: Variables of the card's Jinja template.
    """
    path = TEMPLATE_FOLDER / f"{template}.md.jinja"
    card = SpaceCard.from_template(SpaceCardData(**card_data, **SPACE_CARD_STYLE), template_path=str(path), **values)
    write_text(folder / "README.md", f"{card}\n")


def read_model_license(model: Path) -> str:
    """Read the license of a model from the card (README.md) in its folder.

    Args:
        model: Folder of the model.

    Returns:
        Identifier of the license, such as "mit". "" if there is no such folder or card, or the card states no license.
    """
    return str(read_card_metadata(model / "README.md").get("license") or "")


def _get_required_package_versions(model: str) -> dict[str, str]:
    """Return the Python packages that the search page and a model need, with their installed versions.

    Args:
        model: Folder or Hub id of the model. The package timm is included only if the model needs it.

    Returns:
        A dict {package name: version}. Suffixes of local builds, such as "+cu128", are removed from the versions.
    """
    requirements = [line for line in metadata.requires("modeling-capivara") if "extra ==" not in line]
    names = [*(re.match(r"[\w.-]+", line)[0] for line in requirements), *PAGE_PACKAGES]
    if "timm_wrapper" in (resolve_search_model(model).folder / "config.json").read_text("utf-8"):
        names.append("timm")
    return {name: metadata.version(name).partition("+")[0] for name in names}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, and create the folder of the copy if it does not exist.

    Args:
        source: File to copy.
        target: Path of the copy.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_local_model(model: str, space_folder: Path) -> str:
    """Copy the files of a model that the search needs to the folder of a Space, and check that they may be published.

    Args:
        model: Folder or Hub id of the model. For a Hub id, nothing is copied.
        space_folder: Folder of the Space.

    Returns:
        Folder of the copy relative to the folder of the Space. A Hub id is returned unchanged.

    Raises:
        ValueError: If a copied file contains an absolute path or an access token.
    """
    source = Path(model)
    if not source.is_dir():
        return model
    target = Path("models", get_publishable_model_or_dataset_name(model))
    for file in (file for pattern in SPACE_MODEL_FILES for file in source.glob(pattern)):
        copy_file(file, space_folder / target / file.name)
    upload_checks.check_model_files(space_folder / target)
    return str(target)
