"""What a user has after `pip install`: the wheel, in a fresh environment, far from the checkout, with every command."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modeling_capivara", "capivara_common", "capivara_search")
PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
# Run at the end of every process of the environment: where its modules came from.
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
    """Files of the checkout, whether committed yet or not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=180)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """The command of an environment that holds the wheel, and what it depends on out of the tests' environment."""
    place = tmp_path_factory.mktemp("user")
    environment, home = place / "env", place / "home"
    (home / "Fotos").mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    python = environment / "bin" / "python"
    # Before the other packages are seen: pip would take the checkout's own installation for this one.
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, timeout=120)
    (site,) = environment.glob("lib/python3*/site-packages")
    # Named in a .pth file, the folder is searched, but its own .pth files, the link to the checkout, are not read.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\nimport modules_watch\n", encoding="utf-8")
    (site / "modules_watch.py").write_text(WATCH, encoding="utf-8")
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CAPIVARA", "XDG"))
    }
    variables |= {"HOME": str(home), "LANG": "pt_BR.UTF-8", "LC_ALL": "", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    variables |= {"MODULES_TO": str(place / "modules.txt")}

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess:
        command = [str(environment / "bin" / "capivara"), *map(str, words)]
        done = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=180)
        assert done.returncode == code, done.stderr
        return done

    def start(*words: str) -> subprocess.Popen:
        command = [str(environment / "bin" / "capivara"), *words]
        return subprocess.Popen(command, cwd=home, env=variables, stdout=subprocess.PIPE, text=True)

    run.home, run.modules, run.start = home, place / "modules.txt", start
    return run


def test_the_wheel_holds_its_packages_whole(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (points,) = (files.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    folders = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert folders == set(PACKAGES)
    assert {f"{name}/py.typed" for name in PACKAGES} <= names
    assert not set(tracked(*PACKAGES)) - names, "words, pages and pictures of the packages are needed, too"
    assert "capivara = capivara_search.__main__:run" in points


def test_every_command_works_in_a_fresh_environment(installed, saved_tiny_folder):
    pictures, home = installed.home / "Fotos", installed.home
    import skimage.data

    for name in PICTURES:
        shutil.copy(Path(skimage.data.__file__).parent / name, pictures)
    assert installed("--help").stdout.startswith("uso: capivara")
    assert "capivara indexar" in installed().stdout
    assert "capivara indexar PASTA" in installed("buscar", "um gato", code=3).stderr

    done = installed("indexar", "Fotos", "--model", saved_tiny_folder)
    assert f"{len(PICTURES)} imagens novas" in done.stdout
    assert (home / ".local" / "share" / "capivara" / "pictures.lance").is_dir()
    hits = json.loads(installed("search", "um", "gato", "--json").stdout)
    assert {hit["path"] for hit in hits} == {str(pictures / name) for name in PICTURES}
    like = installed("buscar", "--like", "Fotos/chelsea.png", "-k", "1").stdout
    assert re.search(r"^ *1 .*Fotos/chelsea\.png$", like, re.MULTILINE)
    classified = installed("classify", "Fotos", "--labels", "gato", "foguete", "--json").stdout
    assert len(json.loads(classified)) == len(PICTURES)
    assert str(len(PICTURES)) in installed("estado").stdout
    shutil.copy(pictures / "coffee.png", pictures / "copy.png")
    installed("indexar", "Fotos")
    groups = json.loads(installed("duplicates", "--threshold", "0.9999", "--json").stdout)
    assert {"coffee.png", "copy.png"} in [{Path(hit["path"]).name for hit in group} for group in groups]
    installed("export", "all.csv")
    assert len(list(csv.DictReader((home / "all.csv").open(encoding="utf-8")))) == len(PICTURES) + 1
    page = installed.start("abrir", "--no-open")
    address = re.search(r"http://127\.0\.0\.1:\d+", page.stdout.readline())[0]
    for part in ("/", "/static/page.js", "/static/page.css"):
        with urllib.request.urlopen(address + part, timeout=60) as answer:
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
