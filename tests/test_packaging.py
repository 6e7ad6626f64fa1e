"""Names, versions and authors agree; what is built holds the typed model package, and a page that stands on its own."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import modeling_capivara
from capivara_common.environment import how_to_install, require

ROOT = Path(__file__).resolve().parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
NAME = CONFIG["metadata"]["name"]
EXTRAS = set(CONFIG["options.extras_require"])
DESCRIPTION = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_what_is_said_to_be_installed_is_this_project():
    """`capivara` is a stranger's package: extras are asked of the checkout, or of the distribution's whole name."""
    assert NAME == "modeling-capivara"
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix not in {".py", ".md", ".j2", ".cfg", ".yaml", ".js", ""}:
            continue
        text = path.read_text(encoding="utf-8")
        found += [(path.name, *asked) for asked in re.findall(r"([\w.-]*capivara|[\"']\.)\[([^\]\n]+)\]['\"]", text)]
    assert len(found) > 10
    for file, target, extras in found:
        assert target.strip("\"'") in {".", NAME}, f"{file}: {target}[{extras}]"
        assert set(extras.split(",")) <= EXTRAS or not extras.isidentifier(), f"{file}: {target}[{extras}]"


def test_a_missing_package_is_said_with_what_brings_it():
    for extra in EXTRAS:
        assert how_to_install(extra).endswith(f'pip install -e ".[{extra}]"')
    with pytest.raises(ImportError, match=r'^X needs no_such.module, .* checkout: pip install -e "\.\[app\]"$'):
        require("X", "app", "json", "no_such.module")
    with pytest.raises(ImportError, match=r"not installed yet: pip install no_such$"):
        require("X", None, "no_such", "json")
    require("X", "app", "json")


def test_versions_and_authors_agree():
    version = modeling_capivara.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (heading, *_) = re.findall(r"^## (\S+)(?: \(unreleased\)|, \d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert version == heading == citation["version"]
    assert citation["cff-version"] == "1.2.0" and citation["license"] == CONFIG["metadata"]["license"]
    assert citation["authors"] == [{"name": CONFIG["metadata"]["author"]}]
    paper, bibtex = citation["preferred-citation"], (ROOT / "hub_upload/templates/citation.bib").read_text("utf-8")
    authors = re.search(r"author = \{(.*?)\},\n", bibtex, re.DOTALL)[1].replace(r"{\'a}", "á")
    assert " ".join(authors.split()) == " and ".join(
        f"{person.get('name-particle', '')} {person['family-names']}, {person['given-names']}".strip()
        for person in paper["authors"]
    )
    assert paper["title"] == re.search(r"title = \{(.*?)\},\n", bibtex)[1]
    assert str(paper["year"]) == re.search(r"year = \{(.*?)\}\n", bibtex)[1]
    assert "(CITATION.cff)" in (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel and a source archive of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / path.relative_to(ROOT))
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_typed_package_and_says_whose_it_is(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("/METADATA"))))
    folders = {name.split("/")[0] for name in names}
    ours = {"modeling_capivara", "capivara_common", "capivara_search"}
    assert folders == ours | {f"modeling_capivara-{modeling_capivara.__version__}.dist-info"}
    assert "capivara_search/py.typed" in names
    assert "modeling_capivara/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert (metadata["Name"], metadata["Version"]) == (NAME, modeling_capivara.__version__)
    assert f"{metadata['Author']}\n" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata["License"] == "MIT"
    assert metadata.get_all("Project-URL") == [
        "Paper, https://arxiv.org/abs/2310.13683",
        "Published model, https://huggingface.co/hiaac-nlp/CAPIVARA",
    ]


def test_the_page_of_an_index_has_no_link_into_the_repository(built):
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as files, tarfile.open(archive) as others:
        texts = [files.read(name) for name in files.namelist() if name.endswith("/METADATA")]
        texts += [others.extractfile(name).read() for name in others.getnames() if name.endswith("PKG-INFO")]
    assert len(texts) > 1
    for text in texts:
        shown = email.message_from_string(text.decode("utf-8")).get_payload()
        assert shown.strip() == DESCRIPTION.strip() and email.message_from_bytes(text)["Description-Content-Type"]
        targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", shown)
        assert targets and all("".join(target).startswith("https://") for target in targets)


@pytest.mark.slow
def test_the_wheel_works_on_its_own(built, tmp_path, tiny_folder):
    """Installed into an empty folder, outside of the checkout; the code is that of the page of an index."""
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(tmp_path / "site"), str(wheel)], check=True, timeout=120)
    code = re.search(r"```python\n(.*?)```", DESCRIPTION, re.DOTALL)[1].replace('"capivara"', repr(str(tiny_folder)))
    code += f"import importlib.metadata; print(modeling_capivara.__file__, importlib.metadata.version({NAME!r}))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vermelho" in done.stdout
    assert done.stdout.endswith(f"{tmp_path / 'site'}/modeling_capivara/__init__.py {modeling_capivara.__version__}\n")
