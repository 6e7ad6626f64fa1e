"""The wheel as users install it: in a new environment, outside the checkout, with every command of the search."""

import configparser
import email
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from dist_contents import compare_contents

import modeling_capivara

ROOT = Path(__file__).resolve().parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
NAME, VERSION = CONFIG["metadata"]["name"], modeling_capivara.__version__
DESCRIPTION = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
PACKAGES = ("modeling_capivara", "capivara_common", "capivara_search")
PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
# Code that every process of the new environment runs: at its end, write the paths of all imported modules.
WATCH = """\
import atexit, os, sys

@atexit.register
def write():
    paths = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    with open(os.environ["MODULES_TO"], "a") as file:
        print(*filter(None, paths), file=file)
"""

pytestmark = pytest.mark.slow


def tracked(*folders: str) -> list[str]:
    """Return the tracked and untracked files of the checkout, without ignored ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with a wheel and a source archive, built from the files of the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # Without isolation, the wheel is built with the tests' setuptools, and nothing is downloaded.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    process = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr + process.stdout
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Function that runs `capivara` in an environment with the wheel; dependencies come from the tests' environment."""
    (wheel,), user_folder = built.glob("*.whl"), tmp_path_factory.mktemp("user")
    environment, home = user_folder / "env", user_folder / "home"
    (home / "Fotos").mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    python = environment / "bin" / "python"
    # Install the wheel first: pip would otherwise see the checkout's editable installation and skip the wheel.
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    without_checkout = os.environ | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-m", "pip", *install], env=without_checkout, check=True, timeout=120)
    (site,) = environment.glob("lib/python3*/site-packages")
    # A folder named in a .pth file is searched for packages, but its own .pth files, such as the link to the
    # checkout, are not read.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\nimport modules_watch\n", encoding="utf-8")
    (site / "modules_watch.py").write_text(WATCH, encoding="utf-8")
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CAPIVARA", "XDG"))
    }
    variables |= {"HOME": str(home), "LANG": "pt_BR.UTF-8", "LC_ALL": "", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    variables |= {"MODULES_TO": str(user_folder / "modules.txt")}

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess:
        command = [str(environment / "bin" / "capivara"), *map(str, words)]
        process = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=180)
        assert process.returncode == code, process.stderr
        return process

    def start(*words: str) -> subprocess.Popen:
        command = [str(environment / "bin" / "capivara"), *words]
        return subprocess.Popen(command, cwd=home, env=variables, stdout=subprocess.PIPE, text=True)

    def run_code(code: str) -> str:
        command = [str(python), "-P", "-c", code]
        process = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=180)
        assert process.returncode == 0, process.stderr
        return process.stdout

    run.home, run.modules, run.start, run.python = home, user_folder / "modules.txt", start, run_code
    return run


def test_the_wheel_is_complete_and_has_correct_metadata(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        entry_points, metadata_text = (
            wheel.read(next(name for name in names if name.endswith(end))).decode()
            for end in ("entry_points.txt", "/METADATA")
        )
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"modeling_capivara-{VERSION}.dist-info"}
    assert {f"{name}/py.typed" for name in PACKAGES} <= names
    licenses = {name.rpartition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE", "LICENSE-CC-BY-SA-4.0.txt"}, "licenses of the code and of the data in the wheel"
    assert not set(tracked(*PACKAGES)) - names, "data files of the packages are missing"
    assert "capivara = capivara_search.__main__:run" in entry_points
    metadata = email.message_from_string(metadata_text)
    assert (metadata["Name"], metadata["Version"]) == (NAME, VERSION)
    assert metadata["License-Expression"] == "MIT AND CC-BY-SA-4.0" and metadata["License"] is None
    assert set(metadata.get_all("License-File")) == licenses


def test_wheel_and_source_archive_have_the_committed_files_and_pass_twine(built):
    difference = compare_contents(built)
    assert not difference, f"run `make dist`, then python tests/dist_contents.py dist --write\n{difference}"
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stdout.count("PASSED") == 2, process.stdout


def test_the_package_description_is_rendered_as_on_an_index(built):
    from readme_renderer import markdown

    html = markdown.render(DESCRIPTION)
    assert html and {"<h1", "<a href", "<code"} <= set(re.findall(r"<h1|<a href|<code", html))
    assert "```" not in html and "](" not in html, "a block or link was not rendered"


def test_the_package_description_has_only_absolute_links(built):
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as files, tarfile.open(archive) as source_archive:
        texts = [files.read(name) for name in files.namelist() if name.endswith("/METADATA")]
        names = [name for name in source_archive.getnames() if name.endswith("PKG-INFO")]
        texts += [source_archive.extractfile(name).read() for name in names]
    assert len(texts) > 1
    for text in texts:
        description = email.message_from_string(text.decode("utf-8")).get_payload()
        assert description.strip() == DESCRIPTION.strip() and email.message_from_bytes(text)["Description-Content-Type"]
        targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", description)
        assert targets and all("".join(target).startswith("https://") for target in targets)


def test_the_code_of_the_package_description_runs(installed, saved_tiny_folder):
    code = re.search(r"```python\n(.*?)```", DESCRIPTION, re.DOTALL)[1]
    code = code.replace('"capivara"', repr(str(saved_tiny_folder)))
    code += f"import importlib.metadata; print(modeling_capivara.__file__, importlib.metadata.version({NAME!r}))"
    output = installed.python(code)
    assert "vermelho" in output and output.endswith(f"/modeling_capivara/__init__.py {VERSION}\n")
    assert output.splitlines()[-1].startswith(str(installed.home.parent))


def test_every_search_command_works_in_a_new_environment(installed, saved_tiny_folder):
    pictures, home = installed.home / "Fotos", installed.home
    import skimage.data

    for name in PICTURES:
        shutil.copy(Path(skimage.data.__file__).parent / name, pictures)
    assert installed("--help").stdout.startswith("uso: capivara")
    assert "capivara indexar" in installed().stdout
    assert "capivara indexar PASTA" in installed("buscar", "um gato", code=3).stderr

    indexing = installed("indexar", "Fotos", "--model", saved_tiny_folder)
    assert f"{len(PICTURES)} imagens novas" in indexing.stdout
    assert (home / ".local" / "share" / "capivara" / "pictures.lance").is_dir()
    hits = json.loads(installed("search", "um", "gato", "--json").stdout)
    assert {hit["path"] for hit in hits} == {str(pictures / name) for name in PICTURES}
    for words in (
        "buscar --like Fotos/chelsea.png", "classify Fotos --labels gato foguete", "estado",
        "duplicates --threshold 0.1", "export all.csv",
    ):  # fmt: skip
        assert installed(*words.split()).stdout, words
    page = installed.start("abrir", "--no-open")
    address = re.search(r"http://127\.0\.0\.1:\d+", page.stdout.readline())[0]
    for path in ("/", "/static/page.js", "/static/page.css"):
        with urllib.request.urlopen(address + path, timeout=60) as answer:
            assert answer.status == 200 and answer.read()
    page.send_signal(signal.SIGINT)
    assert page.wait(timeout=60) == 0
    assert "_capivara" in installed("completion", "zsh").stdout
    installed("esquecer", "Fotos")
    installed("buscar", "um gato", code=3)
    assert (pictures / "chelsea.png").is_file()

    modules = installed.modules.read_text(encoding="utf-8").split()
    assert any(path.endswith("capivara_search/index.py") for path in modules)
    ours = re.compile(r"/(modeling_capivara|capivara_search|eval|training|captions|caption_data|records|hub_upload)/")
    assert not [path for path in modules if path.startswith(str(ROOT)) and ours.search(path)]
    assert not [path for path in modules if ours.search(path) and not path.startswith(str(installed.home.parent))]
