"""The page as a Space: which files it gets, that they are enough, and what is sent."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import made_space
import pytest
import yaml
from hub_client import hub_commands
from test_space_page import asked, free_port, wait_for

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")

from hub_upload.space.__main__ import main
from hub_upload.space.publish_space import OTHER_FILES, program_files

ROOT = Path(__file__).resolve().parent.parent
CARD = "---\nlicense: cc-by-sa-4.0\n---\n"


@pytest.fixture
def flags(tiny_folder, tmp_path):
    made_space.save_dataset(tmp_path / "areas", "pretty_name: Áreas\nlicense: cc-by-sa-4.0\nattribution: Made here\n")
    (tiny_folder / "README.md").write_text(CARD, encoding="utf-8")
    (tiny_folder / "optimizer.pt").write_bytes(b"of a training run")
    cache = tmp_path / "cache"
    return ["--model", str(tiny_folder), "--pictures", str(tmp_path / "areas"), "--cache_dir", str(cache)]


def test_the_program_is_what_the_page_imports():
    files = set(map(str, program_files()))
    assert {
        "hub_upload/space/app.py",
        "hub_upload/__init__.py",
        "modeling_capivara/embedder.py",
        "caption_data/rows.py",
    } <= files
    assert {"modeling_capivara/modeling_capivara.py", "eval/embeddings.py", "capivara_search/common/files.py"} <= files
    assert not [name for name in files if name.startswith(("training/", "tests/", "benchmarks/", "examples/"))]
    assert "hub_upload/space/publish_space.py" not in files and all((ROOT / name).is_file() for name in files)
    beside = {
        path.relative_to(ROOT) for path in (ROOT / "hub_upload/space").iterdir() if path.suffix in (".css", ".js")
    }
    assert beside <= set(OTHER_FILES)


def test_the_folder_of_a_space(flags, tmp_path, capsys):
    space = tmp_path / "space"
    main([*flags, "--space", str(space)])
    said = capsys.readouterr().out
    assert "README.md" in said and "files of the program" in said and "Nothing was sent" not in said
    _, head, body = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["sdk"] == "gradio" and about["app_file"] == "app.py" and about["license"] == "cc-by-sa-4.0"
    assert "Áreas. Made here" in body and "models" not in about
    files = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    assert "optimizer.pt" not in " ".join(files) and "LICENSE" in files
    assert sum(name.startswith("index/embeddings-") for name in files) == 1
    for name in files:
        if name.endswith((".py", ".json", ".md", ".txt")) and not name.endswith("tokenizer.json"):
            assert str(tmp_path) not in (space / name).read_text(encoding="utf-8"), f"{name} names this machine"
    lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("==")[0] for line in lines} >= {"torch", "transformers", "datasets", "accelerate", "pillow"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines) and "gradio" not in " ".join(lines)
    assert not [line for line in lines if line.startswith("timm")], "no tower of this model is timm's"
    with pytest.raises(SystemExit, match="not empty"):
        main([*flags, "--space", str(space)])


def test_a_broken_card_of_the_model_is_one_without_a_licence(flags, tiny_folder, tmp_path):
    (tiny_folder / "README.md").write_text("---\nlicense: [mit\n---\n", encoding="utf-8")
    main([*flags, "--space", str(tmp_path / "space")])
    readme = (tmp_path / "space/README.md").read_text(encoding="utf-8")
    assert "as imagens" in readme.lower() and "o modelo" not in readme.lower().split("licenças")[1]


def test_a_model_that_names_this_machine_is_not_copied(flags, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    (tiny_folder / "config.json").write_text(json.dumps({**config, "from": str(tmp_path / "x")}), encoding="utf-8")
    with pytest.raises(SystemExit, match="names a place on"):
        main([*flags, "--space", str(tmp_path / "space")])
    assert not (tmp_path / "space").exists()


@pytest.mark.slow
def test_a_space_runs_from_its_folder_alone(flags, tmp_path):
    main([*flags, "--space", str(tmp_path / "space")])
    port = free_port()
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    app = (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    assert "'0.0.0.0'" in app
    started = app.replace("'0.0.0.0'", f"'127.0.0.1', '--port', '{port}'")  # nothing is opened to the network here
    (tmp_path / "space" / "app.py").write_text(started, encoding="utf-8")
    command = ["timeout", "-k", "5", "300", sys.executable, "app.py"]
    with open(tmp_path / "said.txt", "w") as said:
        server = subprocess.Popen(command, cwd=tmp_path / "space", env=environment, stdout=said, stderr=said)
    try:
        wait_for(f"http://127.0.0.1:{port}", server, tmp_path / "said.txt")
        assert b"30 imagens" in asked(f"http://127.0.0.1:{port}/config")[2]
        told = (tmp_path / "said.txt").read_text(encoding="utf-8")
        assert "Embedding" not in told and "Thumbnails" not in told, "the index was built again"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The command against a stand-in for the Hub, which learns of Spaces here."""

    def with_spaces(pattern: re.Pattern) -> re.Pattern:
        known = pattern.pattern.replace("models|datasets", "models|datasets|spaces")
        return re.compile(known.replace("(?P<kind>datasets/)", "(?P<kind>datasets/|spaces/)"))

    routes = [(method, with_spaces(pattern), action) for method, pattern, action in hub_server.ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    with hub_commands(tmp_path / "hub") as found:
        yield found


@pytest.mark.slow
def test_push(commands, flags):
    def run(*more, **options):
        return commands(*flags, *more, call="hub_upload.space.__main__:main", **options)

    listed = run("--repo_id", "us/demo")
    assert listed.code == 0 and "Nothing was sent" in listed.out and "app.py" in listed.out
    assert ("spaces", "us/demo") not in commands.hub.storage.repos
    assert "there is no token" in run("--repo_id", "us/demo", "--push", token=None).err.lower()
    sent = run("--repo-id", "us/demo", "--push", "--private")
    assert sent.code == 0 and "Sent: http" in sent.out, sent.err
    there = commands.hub.files("us/demo", kind="spaces")
    assert {"app.py", "README.md", "requirements.txt", "index/index.json"} <= set(there)
    assert commands.hub.repo("us/demo", "spaces").private
    refused = run("--repo-id", "them/demo", "--push")
    assert refused.code and "error: " in refused.err and "them" in refused.err
    assert "--push needs --repo_id" in run("--push").err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--port", "0"], "port must be 1 to 65535"),
        (["--cache_dir", "off"], "index is kept"),
        (["--pictures", "no/such/folder"], "does not exist"),
        (["--model", "./no-model"], "does not exist"),
    ],
)
def test_errors_are_one_line(flags, more, message):
    with pytest.raises(SystemExit, match=message) as error:
        main([*flags, *more])
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("more", [["--repo_id", "demo"], ["--space", "."]])
def test_a_wrong_target_is_said_before_the_index_is_built(flags, tmp_path, more):
    with pytest.raises(SystemExit, match=r"error: .*(must be owner/name|not empty)"):
        main([*flags, *more])
    assert not (tmp_path / "cache").exists()


def test_two_models_of_one_name_do_not_become_one(flags, tmp_path):
    one, other = (tmp_path / where / "runs" / "mine" for where in "ab")
    for folder in (one, other):
        shutil.copytree(flags[1], folder)
    with pytest.raises(SystemExit, match=r"error: .* would both be mine"):
        main([*flags, "--model", str(one), "--compare", str(other), "--space", str(tmp_path / "space")])


def test_a_missing_extra_says_how_to_get_it(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("capivara_search.common.environment.find_spec", lambda name: None if name == "gradio" else True)
    with pytest.raises(SystemExit, match=r'error: The page needs gradio, .*: pip install -e "\.\[app\]"$'):
        main(flags)
    assert not (tmp_path / "cache").exists()
