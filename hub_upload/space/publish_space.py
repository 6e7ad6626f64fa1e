"""The page as a Space: a folder with the program, the index and the models, and its upload.

    python -m hub_upload.space --model runs/mine --space demo
    python -m hub_upload.space --model runs/mine --repo_id org/demo           # lists what would be sent
    python -m hub_upload.space --model runs/mine --repo_id org/demo --push

Requirements are pinned to the versions that built the index. The Space is one of Docker: the page is no gradio
application.
"""

import configparser
import hashlib
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token

from capivara_common.environment import cache_home
from capivara_common.files import whole_folder, write_text
from capivara_common.privacy import short_name
from capivara_search.index import PictureIndex
from capivara_search.models import find_model
from capivara_search.page.server import DEFAULT_PORT, Credit
from capivara_search.table import PictureTable
from hub_upload.allowed_files import TOKENIZER_FILES, check_contents, check_paths, check_repo_id, check_secrets
from hub_upload.push import NO_TOKEN, PushError, hub_errors, readable_size
from hub_upload.space.collection import credit_of, picture_folder
from hub_upload.space.published_index import publish_index
from modeling_capivara.loading import card_metadata

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("capivara_common", "capivara_search", "modeling_capivara")
PROGRAM_SUFFIXES = (".py", ".html", ".css", ".js", ".svg", ".json", ".txt", ".yaml")
STORES = ("s3://", "gs://", "az://")  # how addresses of indexes begin
PACKAGES = ("lancedb", "pillow-heif", "starlette", "threadpoolctl", "uvicorn")  # of the page, beside those of the model
MODEL_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
TITLE = "CAPIVARA: busca em português"
APP = '''"""{title}. Made by `python -m hub_upload.space`; the program is in capivara_search/page."""

import os

from capivara_search.index import PictureIndex
from capivara_search.page.server import Credit, serve_index

if __name__ == "__main__":
    index, *compare = [PictureIndex.open(where, model) for where, model in {indexes!r}]
    credit = {credit!r}
    names = ["*"] if "SPACE_HOST" in os.environ else []  # of a Space its proxy decides, and all may see the page
    serve_index(index, "0.0.0.0", {port}, *compare, open_browser=False, credit=credit, allow_hosts=names)
'''
# torch of PyPI brings several GB for GPUs, which a free Space has none of. Spaces run as the user 1000.
DOCKERFILE = """\
FROM python:3.11-slim
RUN useradd --create-home --uid 1000 user
WORKDIR /home/user/app
COPY requirements.txt .
RUN pip install --no-cache-dir torch=={torch} --index-url https://download.pytorch.org/whl/cpu \\
 && pip install --no-cache-dir --requirement requirements.txt
COPY --chown=user . .
USER user
EXPOSE {port}
CMD ["python", "app.py"]
"""
BODY = """
# {title}

Busca de imagens e classificação com palavras em português, com o modelo CAPIVARA
([artigo](https://arxiv.org/abs/2310.13683)). Escreva uma frase ou envie uma imagem: a página mostra o que combina.

- Modelo: {models}
- Imagens: {pictures}

## Licenças

O código é MIT. {licences} Quem copia este Space aceita essas licenças.
"""


def open_indexes(
    pictures: str, models: Sequence[str], cache_dir: str, device: str | None, batch_size: int, **options: Any
) -> tuple[list[PictureIndex], Credit]:
    """An index of the pictures for each model, built or brought up to date where it is not given.

    Args:
        pictures: index, folder of pictures, or data set.
        models: folders or Hub ids.
        cache_dir: "auto", or root of all caches.
        device: of the models; the GPU where there is one.
        batch_size: pictures that are embedded at once.
        options: of `picture_folder`, for a data set.

    Raises:
        ValueError: there are no such pictures, or no such model; an index was built with another model.
    """
    if Path(pictures, "pictures.lance").is_dir() or pictures.startswith(STORES):
        indexes = [PictureIndex.open(pictures, model, device) for model in models]
        return indexes, credit_of(Path(next(iter(indexes[0].folders()), pictures)))
    cache = cache_home() if cache_dir == "auto" else Path(cache_dir)
    folder, credit = picture_folder(pictures, cache, **options)
    indexes = []
    for model in [find_model(model, device) for model in models]:
        key = hashlib.blake2b(f"{folder.resolve()}\0{model.image_digest}".encode(), digest_size=16).hexdigest()
        index = PictureIndex.open(cache / "space" / key / "index.lance", model)
        index.add(folder, batch_size=batch_size)  # what it has is not embedded again
        indexes.append(index)
    return indexes, credit


def write_space(indexes: Sequence[PictureIndex], models: Sequence[str], folder: Path, credit: Credit) -> list[Path]:
    """Write the folder of a Space.

    Args:
        indexes: of the pictures, one for each model; those of the same image tower may be one and the same.
        models: folder or Hub id of each model; a folder is copied, an id is left to the Space to fetch.
        folder: where to; missing or empty.
        credit: whose pictures they are.

    Returns:
        The files, relative to `folder`, in order.

    Raises:
        ValueError: the folder is not empty, or a model's file names a path of this machine or a token.
    """
    with whole_folder(folder) as made:
        for source in (*program_files(), Path("LICENSE")):
            _copy(ROOT / source, made / source)
        there = [_copied_model(model, made) for model in models]
        places: dict[str, str] = {}
        for index, model in zip(indexes, there, strict=True):
            if index.where not in places:
                places[index.where] = f"index-{len(places) + 1}.lance"
                publish_index(index, made / places[index.where], model, credit.name)
        opened = [(places[index.where], model) for index, model in zip(indexes, there, strict=True)]
        app = APP.format(title=TITLE, indexes=opened, credit=credit, port=DEFAULT_PORT)
        write_text(made / "app.py", app)
        pinned = requirements(models)
        write_text(made / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in pinned.items()))
        write_text(made / "Dockerfile", DOCKERFILE.format(torch=pinned["torch"], port=DEFAULT_PORT))
        write_text(made / "README.md", _readme(models, credit))
        write_text(made / "names.txt", "\n".join(_names(made / place) for place in places.values()))
        for name in ("README.md", "app.py", "names.txt"):  # what a stranger's card and files are called
            check_secrets(made / name, name)
        for name in ("README.md", "app.py"):
            check_paths(made / name, name)
        (made / "names.txt").unlink()
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_target(models: Sequence[str], folder: Path | None, repo_id: str | None) -> None:
    """Raise ValueError where a Space of these models can't be written to `folder`, or `repo_id` is none of the Hub."""
    if len(models) > len({short_name(model) for model in models}):
        raise ValueError(f"{' and '.join(models)} would both be {short_name(models[0])} in the Space; rename one.")
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is a file or not empty. Choose another one, or remove it.")
    if repo_id is not None:
        check_repo_id(repo_id)


def listing(folder: Path, files: Sequence[Path]) -> str:
    """The files with their sizes, small ones of the program and of the index as a line each."""
    parts = {"files of the program": [], "files of the index": []}
    lines = []
    for file in files:
        if any(part.endswith(".lance") for part in file.parts):
            parts["files of the index"].append(file)
        elif file.parts[0] in PROGRAM:
            parts["files of the program"].append(file)
        else:
            lines.append(f"  {file} ({readable_size((folder / file).stat().st_size)})")
    lines += [f"  {len(group)} {name} ({_size(folder, group)})" for name, group in parts.items() if group]
    return "\n".join([*lines, f"{len(files)} files, {_size(folder, files)}"])


def _size(folder: Path, files: Sequence[Path]) -> str:
    return readable_size(sum((folder / file).stat().st_size for file in files))


def push_space(folder: Path, repo_id: str, private: bool, sdk: str = "docker") -> str:
    """Make the Space where there is none, and send the folder to it in one commit.

    Args:
        folder: as `write_space` writes it, or `static_page.write_static_page`.
        repo_id: owner/name.
        private: whether a new Space is seen by its owner alone; one that exists stays as it is.
        sdk: of a new Space: "docker", or "static" for a page without a server.

    Returns:
        The address of the commit.

    Raises:
        ValueError: `repo_id` is none of the Hub.
        PushError: it was not sent; the message has the way out, and no token.
    """
    check_repo_id(repo_id)
    with hub_errors(repo_id, "space"):
        if get_token() is None:
            raise PushError(NO_TOKEN)
        api = HfApi()
        api.create_repo(repo_id, repo_type="space", space_sdk=sdk, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Demonstração do CAPIVARA",
            # of an earlier version, if it is not sent again
            delete_patterns=["index*", "models/*", "*.py", "model/*", "static/*", "library/*"],
        )  # fmt: skip
    return commit.commit_url


def program_files() -> list[Path]:
    """The two packages that the page consists of, relative to the checkout, with what lies beside their modules."""
    found = [path for package in PROGRAM for path in (ROOT / package).rglob("*") if path.suffix in PROGRAM_SUFFIXES]
    return sorted(path.relative_to(ROOT) for path in found)


def requirements(models: Sequence[str]) -> dict[str, str]:
    """What the page and its models need: package -> version, that which is installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    names = [re.match(r"[\w.-]+", line)[0] for line in config["options"]["install_requires"].split("\n") if line]
    names += PACKAGES
    if any("timm_wrapper" in (find_model(model).folder / "config.json").read_text("utf-8") for model in models):
        names.append("timm")
    return {name: metadata.version(name).partition("+")[0] for name in names}


def _names(index: Path) -> str:
    """The paths of a published index, a line each."""
    return "\n".join(PictureTable(index).rows(["path"])["path"].to_pylist())


def _copied_model(model: str, made: Path) -> str:
    """Where the Space finds a model: an id stays one, a folder is copied, without what only training needs."""
    source = Path(model)
    if not source.is_dir():
        return model
    target = Path("models", short_name(model))
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in MODEL_FILES):
            _copy(file, made / target / file.name)
    check_contents(made / target)
    return str(target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _readme(models: Sequence[str], credit: Credit) -> str:
    licences = {"as imagens": credit.licence, **{f"o modelo {short_name(m)}": _model_licence(m) for m in models}}
    known = {subject: licence for subject, licence in licences.items() if licence}
    about = {
        "title": TITLE, "emoji": "🐾", "colorFrom": "green", "colorTo": "yellow", "sdk": "docker",
        "app_port": DEFAULT_PORT, "pinned": False,
        "license": next(iter(known.values())) if len(set(known.values())) == 1 else "other",
        "models": [model for model in models if not Path(model).is_dir()],
        "short_description": "Busca de imagens com palavras em português",
    }  # fmt: skip
    about = {key: value for key, value in about.items() if value != []}
    listed = "; ".join(f"{subject}: {licence}" for subject, licence in known.items())
    listed = f"{listed[:1].upper()}{listed[1:]}." if listed else "Modelo e imagens não declaram licença."
    pictures = ". ".join(part for part in (credit.name, credit.attribution) if part)
    body = BODY.format(title=TITLE, models=", ".join(map(short_name, models)), pictures=pictures, licences=listed)
    return f"---\n{yaml.safe_dump(about, allow_unicode=True, sort_keys=False)}---\n{body}"


def _model_licence(model: str) -> str:
    """What the card of a model in a folder says; the Hub shows that of others."""
    return str(card_metadata(Path(model) / "README.md").get("license") or "")
