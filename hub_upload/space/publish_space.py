"""The page as a Space: a folder with the program, the index and the models, and its upload.

    python -m hub_upload.space --model runs/mine --space demo
    python -m hub_upload.space --model runs/mine --repo_id org/demo           # lists what would be sent
    python -m hub_upload.space --model runs/mine --repo_id org/demo --push

The Space gets the modules that the page imports, found by following the imports; requirements are pinned to the
versions that built the index, since what keeps embeddings apart names transformers' version.
"""

import configparser
import re
import shutil
from fnmatch import fnmatchcase
from importlib import metadata
from modulefinder import ModuleFinder
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token

from capivara_search.common.files import whole_folder, write_text
from capivara_search.common.privacy import short_name
from hub_upload.allowed_files import TOKENIZER_FILES, check_contents
from hub_upload.push import NO_TOKEN
from hub_upload.push_plan import readable_size
from hub_upload.remote import PushError, check_repo_id, hub_errors
from hub_upload.space.answers import Demo
from hub_upload.space.collection import stated
from hub_upload.space.index import embeddings_path

ROOT = Path(__file__).resolve().parents[2]
STARTS = "hub_upload/space/__main__.py"
OTHER_FILES = (Path("LICENSE"), Path("hub_upload/space/style.css"), Path("hub_upload/space/page.js"))
LEFT_OUT = ["hub_upload.space.publish_space"]  # a Space publishes nothing
MODEL_FILES = (
    *("config.json", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
)
APP = '''"""{title}. Made by `python -m hub_upload.space`; the program is in hub_upload/space."""

from hub_upload.space.__main__ import main

main({arguments!r})
'''
BODY = """
# {title}

Busca de imagens e classificação com palavras em português, com o modelo CAPIVARA
([artigo](https://arxiv.org/abs/2310.13683)). Escreva uma frase ou envie uma imagem: a página mostra o que combina e com
que pontuação.

- Modelo: {models}
- Imagens: {pictures}

## Licenças

O código é MIT. {licences} Quem copia este Space aceita essas licenças.
"""


def write_space(demo: Demo, models: list[str], folder: Path, title: str = "CAPIVARA: busca em português") -> list[Path]:
    """Write the folder of a Space.

    Args:
        demo: what the page answers from.
        models: folder or Hub id of each model of `demo`; a folder is copied, an id is left to the Space to fetch.
        folder: where to; missing or empty.
        title: of the Space.

    Returns:
        The files, relative to `folder`, in order.

    Raises:
        ValueError: the folder is not empty, or a model's file names a path of this machine or a token.
    """
    with whole_folder(folder) as made:
        for source in (*program_files(), *OTHER_FILES):
            _copy(ROOT / source, made / source)
        for source in sorted(demo.album.folder.glob("thumbnails-*.safetensors")):
            _copy(source, made / "index" / source.name)
        for source in [embeddings_path(index.album, index.embedder) for index in demo.indexes]:
            _copy(source, made / "index" / source.name)
        _copy(demo.album.folder / "index.json", made / "index" / "index.json")
        there = [_copied_model(model, made) for model in models]
        flags = [part for flag, model in zip(("--model", "--compare"), there, strict=False) for part in (flag, model)]
        arguments = [*flags, "--pictures", "index", "--host", "0.0.0.0"]
        write_text(made / "app.py", APP.format(title=title, arguments=arguments))
        write_text(made / "requirements.txt", "".join(f"{line}\n" for line in requirements(demo)))
        write_text(made / "README.md", _readme(demo, models, title))
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_target(models: list[str], folder: Path | None, repo_id: str | None) -> None:
    """Raise ValueError where a Space of these models can't be written to `folder`, or `repo_id` is none of the Hub."""
    if len(models) > len({short_name(model) for model in models}):
        raise ValueError(f"{' and '.join(models)} would both be {short_name(models[0])} in the Space; rename one.")
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--space {folder} is a file or not empty. Choose another one, or remove it.")
    if repo_id is not None:
        check_repo_id(repo_id)


def listing(folder: Path, files: list[Path]) -> str:
    """The files with their sizes, small ones of the program as one line."""
    shown = [file for file in files if file.suffix not in (".py", ".js", ".css") or file == Path("app.py")]
    lines = [f"  {file} ({readable_size((folder / file).stat().st_size)})" for file in shown]
    lines.append(f"  and {len(files) - len(shown)} files of the program")
    total = readable_size(sum((folder / file).stat().st_size for file in files))
    return "\n".join([*lines, f"{len(files)} files, {total}"])


def push_space(folder: Path, repo_id: str, private: bool) -> str:
    """Make the Space where there is none, and send the folder to it in one commit.

    Args:
        folder: as `write_space` writes it.
        repo_id: owner/name.
        private: whether a new Space is seen by its owner alone; one that exists stays as it is.

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
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Demonstração do CAPIVARA",
            delete_patterns=["index/*", "models/*"],  # of an earlier index or model, if it is not sent again
        )  # fmt: skip
    return commit.commit_url


def program_files() -> list[Path]:
    """The modules that the page imports, relative to the checkout, their packages included."""
    finder = ModuleFinder([str(ROOT)], excludes=LEFT_OUT)
    finder.run_script(str(ROOT / STARTS))
    return sorted(Path(module.__file__).relative_to(ROOT) for module in finder.modules.values() if module.__file__)


def requirements(demo: Demo) -> list[str]:
    """What the page and its models need, at the versions that are installed; gradio's is in the README."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = config["options"]["install_requires"] + config["options.extras_require"]["app"]
    names = [re.match(r"[\w.-]+", line)[0] for line in needed.split() if re.match(r"[A-Za-z]", line)]
    if any("timm_wrapper" in index.embedder.model.config.to_json_string() for index in demo.indexes):
        names.append("timm")
    pinned = {name: metadata.version(name).partition("+")[0] for name in names if name != "gradio"}
    return [f"{name}=={version}" for name, version in pinned.items()]


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


def _readme(demo: Demo, models: list[str], title: str) -> str:
    credit = demo.album.credit
    licences = {"as imagens": credit.licence, **{f"o modelo {short_name(m)}": _model_licence(m) for m in models}}
    known = {subject: licence for subject, licence in licences.items() if licence}
    about = {
        "title": title, "emoji": "🐾", "colorFrom": "green", "colorTo": "yellow", "sdk": "gradio",
        "sdk_version": metadata.version("gradio"), "python_version": "3.11", "app_file": "app.py", "pinned": False,
        "license": next(iter(known.values())) if len(set(known.values())) == 1 else "other",
        "models": [model for model in models if not Path(model).is_dir()],
        "short_description": "Busca de imagens com palavras em português",
    }  # fmt: skip
    about = {key: value for key, value in about.items() if value != []}
    listed = "; ".join(f"{subject}: {licence}" for subject, licence in known.items())
    listed = f"{listed[:1].upper()}{listed[1:]}." if listed else "Modelo e imagens não declaram licença."
    pictures = ". ".join(part for part in (credit.name, credit.attribution) if part)
    body = BODY.format(title=title, models=", ".join(map(short_name, models)), pictures=pictures, licences=listed)
    return f"---\n{yaml.safe_dump(about, allow_unicode=True, sort_keys=False)}---\n{body}"


def _model_licence(model: str) -> str:
    """What the card of a model in a folder says; the Hub shows that of others."""
    return str(stated(Path(model) / "README.md").get("license") or "")
