"""The page as a Space: which pictures and files it gets, that they are enough, and what is sent."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import made_pictures
import pytest
import yaml
from hub_client import hub_commands
from made_pictures import CAPTIONS, made_index, png, save_folder
from page_process import PageClient as Asked
from PIL import Image

pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install -e '.[search]'")

from capivara_search.index import PictureIndex
from hub_upload.space.__main__ import main
from hub_upload.space.publish_space import publish_index, read_credit

ROOT = Path(__file__).resolve().parent.parent
CARD = "---\nlicense: cc-by-sa-4.0\n---\n"


@pytest.fixture
def flags(tiny_folder, tmp_path):
    about = "---\npretty_name: Áreas\nlicense: cc-by-sa-4.0\nattribution: Made here\n---\n"
    (save_folder(tmp_path / "areas") / "README.md").write_text(about, encoding="utf-8")
    (tiny_folder / "README.md").write_text(CARD, encoding="utf-8")
    (tiny_folder / "optimizer.pt").write_bytes(b"of a training run")
    made_index(tmp_path / "i.lance", tmp_path / "areas", tiny_folder)
    return ["--model", str(tiny_folder), "--pictures", str(tmp_path / "i.lance")]


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_whose_pictures_they_are(flags, tmp_path):
    credit = read_credit(tmp_path / "areas")
    assert (credit.name, credit.license, credit.attribution) == ("Áreas", "cc-by-sa-4.0", "Made here")
    (tmp_path / "areas" / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")  # no YAML
    assert (read_credit(tmp_path / "areas").name, read_credit(tmp_path / "areas").license) == ("areas", "")


def test_a_published_index_names_no_place(saved_tiny_folder, tmp_path):
    folder = save_folder(tmp_path / "ana" / "fotos")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2025:03:05 14:30:00"
    exif.get_ifd(0x8825).update({1: "S", 2: (12.0, 58.0, 15.0), 3: "W", 4: (38.0, 30.0, 36.0)})
    made_pictures.made_pictures()[3].resize((300, 300)).save(folder / "casa.jpg", exif=exif)
    index = made_index(tmp_path / "i.lance", folder, saved_tiny_folder)
    assert index.get_picture(str(folder / "casa.jpg")).latitude is not None, "nowhere to hide would prove nothing"
    assert publish_index(index, tmp_path / "public.lance", "models/mine") == 31
    copy = PictureIndex.open(tmp_path / "public.lance", str(saved_tiny_folder))
    assert copy.folders() == {"/fotos": 31} and copy.newest(1)[0].path == "/fotos/casa.jpg"
    shown = copy.get_picture("/fotos/casa.jpg")
    assert (shown.latitude, shown.longitude) == (None, None) and shown.taken and len(copy.thumbnail("/fotos/casa.jpg"))
    assert [hit.path for hit in copy.search("um gato", k=9)] == [
        "/fotos/" + os.path.relpath(hit.path, folder) for hit in index.search("um gato", k=9)
    ]
    for path in (tmp_path / "public.lance").rglob("*"):
        assert not path.is_file() or b"/ana/" not in path.read_bytes(), f"{path} names a folder of this machine"


# --- The folder ------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_space(flags, tmp_path, capsys):
    space = tmp_path / "space"
    main([*flags, "--space", str(space)])
    said = capsys.readouterr().out
    assert f"The Space is in {space}; `python app.py` there starts it" in said
    _, head, body = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(head)
    assert (about["sdk"], about["app_port"], about["license"]) == ("docker", 7860, "cc-by-sa-4.0")
    assert "Áreas. Made here" in body and "models" not in about
    files = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    assert "optimizer.pt" not in " ".join(files) and {"LICENSE", "Dockerfile", "models/model/config.json"} <= files
    for name in files:
        if not name.endswith(("tokenizer.json", ".safetensors")):
            assert str(tmp_path).encode() not in (space / name).read_bytes(), f"{name} names this machine"
    lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("==")[0] for line in lines} >= {"torch", "transformers", "lancedb", "starlette", "pillow"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines) and "datasets" not in " ".join(lines)
    assert not [line for line in lines if line.startswith("timm")], "no tower of this model is timm's"
    docker = (space / "Dockerfile").read_text(encoding="utf-8")
    assert f"torch=={dict(line.split('==') for line in lines)['torch']} " in docker and "EXPOSE 7860" in docker
    with pytest.raises(ValueError, match="not empty"):
        main([*flags, "--space", str(space)])


def test_a_model_that_names_this_machine_is_not_copied(flags, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    (tiny_folder / "config.json").write_text(json.dumps({**config, "from": str(tmp_path / "x")}), encoding="utf-8")
    with pytest.raises(ValueError, match="names a place on"):
        main([*flags, "--space", str(tmp_path / "space")])
    assert not (tmp_path / "space").exists()


@pytest.mark.slow
def test_a_space_runs_from_its_folder_alone(flags, tmp_path):
    main([*flags, "--space", str(tmp_path / "space")])
    for gone in ("areas", "i.lance", "model"):
        shutil.rmtree(tmp_path / gone)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment["SPACE_HOST"] = "us-demo.hf.space"
    app = (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    assert '"0.0.0.0", 7860' in app
    started = app.replace('"0.0.0.0", 7860', '"127.0.0.1", 7860')  # nothing is opened to the network here
    started = started.replace("names)", "names, on_open=lambda url: print(url, flush=True))")
    (tmp_path / "space" / "app.py").write_text(started, encoding="utf-8")
    command = ["timeout", "-k", "5", "300", sys.executable, "app.py"]
    server = subprocess.Popen(command, cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, text=True)
    try:
        asked = Asked(server.stdout.readline().strip())
        assert "Imagens: Áreas, licença" in asked.get("")[2].decode()
        status, found = asked.ask("search", {"text": "azul", "k": 3}, png(4))
        assert status == 200 and found["count"] == 30 and found["hits"][0]["name"].removesuffix(".png") in CAPTIONS
        path = found["hits"][0]["path"]
        assert path.startswith("/Áreas/") and asked.get("download", path)[0] == 404
        assert asked.get("picture", path)[1]["content-type"] == "image/webp", "a thumbnail stands for the picture"
        names = {"Host": "us-demo.hf.space", "Origin": "https://us-demo.hf.space"}
        assert asked.ask("search", {"text": "azul"}, **names)[0] == 200
    finally:
        server.terminate()
        server.wait(timeout=30)


# --- The Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path):
    with hub_commands(tmp_path / "hub") as found:
        yield found


@pytest.mark.slow
def test_push(commands, flags, tmp_path):
    """By the command that sends models: shown first, then one commit; what an older Space had in its folders goes."""
    main([*flags, "--space", str(tmp_path / "demo")])
    (tmp_path / "demo" / "capivara_search" / "x.pyc").write_bytes(b"of a start here")

    def run(*more, **options):
        return commands("--model", tmp_path / "demo", "--repo-type", "space", "--repo-id", "us/demo", *more, **options)

    listed = run()
    assert listed.code == 0 and "Nothing was sent" in listed.out and "app.py" in listed.out, listed.err
    assert ("spaces", "us/demo") not in commands.hub.storage.repos
    sent = run("--push", "--private")
    assert sent.code == 0 and "Pushed in one commit" in sent.out, sent.err
    there = set(commands.hub.files("us/demo", kind="spaces"))
    assert {"app.py", "README.md", "requirements.txt", "Dockerfile", "capivara_search/__init__.py"} <= there
    fragment = next(name for name in there if name.startswith("index.lance/pictures.lance/data/"))
    assert commands.hub.repo("us/demo", "spaces").private and not [name for name in there if name.endswith(".pyc")]
    (tmp_path / "demo" / fragment).rename(tmp_path / "demo" / f"{fragment}.new")
    assert run("--push").code == 0
    assert set(commands.hub.files("us/demo", kind="spaces")) == there - {fragment} | {f"{fragment}.new"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Say what is made: --space FOLDER, or --static"),
        (["--space", "x", "--push"], "`--push` is gone: send the folder by `hub_upload.push --repo_type space`"),
        (["--space", "x", "--batch_size", "8"], "`--batch_size` is gone: make the index by `capivara index`"),
        (["--space", "x", "--split", "test"], "`--split` is gone: make the index by `capivara index`"),
        (["--space", "x", "--pictures", "areas"], "areas is no index. Make one: capivara index FOLDER"),
        (["--space", "x", "--model", "./no-model"], "no-model"),
    ],
)
def test_errors_are_one_line(flags, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        main([*flags, *more])
    assert "\n" not in str(error.value)
