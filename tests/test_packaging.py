"""Package names, versions, extras and authors agree in all files."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import modeling_capivara
from capivara_common import environment
from capivara_common.environment import get_install_command_of_extra, require_packages

ROOT = Path(__file__).resolve().parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
NAME = CONFIG["metadata"]["name"]
EXTRAS = set(CONFIG["options.extras_require"])


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_install_commands_name_this_project():
    """`capivara` is a package of somebody else: commands must name the checkout or `modeling-capivara`."""
    assert NAME == "modeling-capivara"
    requirements = []
    for path in tracked():
        if path == Path(__file__) or path.suffix not in {".py", ".md", ".j2", ".cfg", ".yaml", ".js", ""}:
            continue
        text = path.read_text(encoding="utf-8")
        requirements += [
            (path.name, *match) for match in re.findall(r"([\w.-]*capivara|[\"']\.)\[([^\]\n]+)\]['\"]", text)
        ]
    assert len(requirements) > 10
    for file, target, extras in requirements:
        assert target.strip("\"'") in {".", NAME}, f"{file}: {target}[{extras}]"
        assert set(extras.split(",")) <= EXTRAS or not extras.isidentifier(), f"{file}: {target}[{extras}]"


def test_the_error_for_a_missing_package_has_the_install_command(monkeypatch, tmp_path):
    assert not [extra for extra in EXTRAS if "_" in extra], "older versions of pip do not find extras with underscores"
    for extra in EXTRAS:
        assert get_install_command_of_extra(extra) == f'pip install -e ".[{extra}]"'
    with pytest.raises(ImportError, match=r'^X .*no_such\.module.*pip install -e "\.\[app\]"$'):
        require_packages("X", "app", "json", "no_such.module")
    require_packages("X", "app", "json")
    monkeypatch.setattr(environment, "CODE_ROOT", tmp_path)  # as in site-packages
    with pytest.raises(ImportError, match=r'pip install "modeling-capivara\[app\]"$'):
        require_packages("X", "app", "no_such.module")


def test_versions_and_authors_agree():
    version = modeling_capivara.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (heading, *_) = re.findall(r"^## (\S+)(?: \(unreleased\)|, \d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert version == heading == citation["version"]
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT"
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
