"""The folder of a Space: its files, what it must not reveal, that it runs on its own, and its push."""

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
from page_process import PageClient
from PIL import Image

pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install -e '.[search]'")

from capivara_search.index import PictureIndex
from hub_upload.space.__main__ import main
from hub_upload.space.docker_space import copy_index_for_publication, read_picture_credit_from_card

ROOT = Path(__file__).resolve().parent.parent
CARD = "---\nlicense: cc-by-sa-4.0\n---\n"
AREAS_CARD = "---\npretty_name: Áreas\nlicense: cc-by-sa-4.0\nattribution: Made here\n---\n"


@pytest.fixture
def flags(tiny_folder, tmp_path):
    """Flags that name a model and an index of pictures; both have cards."""
    (save_folder(tmp_path / "areas") / "README.md").write_text(AREAS_CARD, encoding="utf-8")
    (tiny_folder / "README.md").write_text(CARD, encoding="utf-8")
    (tiny_folder / "optimizer.pt").write_bytes(b"of a training run")
    made_index(tmp_path / "i.lance", tmp_path / "areas", tiny_folder)
    return ["--model", str(tiny_folder), "--pictures", str(tmp_path / "i.lance")]


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_credit_is_read_from_the_readme_of_the_pictures(tmp_path):
    (tmp_path / "areas").mkdir()
    (tmp_path / "areas" / "README.md").write_text(AREAS_CARD, encoding="utf-8")
    credit = read_picture_credit_from_card(tmp_path / "areas")
    assert (credit.name, credit.license, credit.attribution) == ("Áreas", "cc-by-sa-4.0", "Made here")
    (tmp_path / "areas" / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")  # invalid YAML
    assert (
        read_picture_credit_from_card(tmp_path / "areas").name,
        read_picture_credit_from_card(tmp_path / "areas").license,
    ) == ("areas", "")


@pytest.mark.slow
def test_a_published_index_has_no_folders_of_this_machine_and_no_locations(saved_tiny_folder, tmp_path):
    folder = save_folder(tmp_path / "ana" / "fotos")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2025:03:05 14:30:00"
    exif.get_ifd(0x8825).update({1: "S", 2: (12.0, 58.0, 15.0), 3: "W", 4: (38.0, 30.0, 36.0)})
    made_pictures.made_pictures()[3].resize((300, 300)).save(folder / "casa.jpg", exif=exif)
    index = made_index(tmp_path / "i.lance", folder, saved_tiny_folder)
    assert index.get_picture(str(folder / "casa.jpg")).latitude is not None, "a picture without location proves nothing"
    copy_index_for_publication(index, tmp_path / "public.lance", "models/mine", "")
    copy = PictureIndex.open(tmp_path / "public.lance", str(saved_tiny_folder))
    assert copy.folders() == {"/fotos": 31} and copy.newest(1)[0].path == "/fotos/casa.jpg"
    picture = copy.get_picture("/fotos/casa.jpg")
    assert (
        (picture.latitude, picture.longitude) == (None, None)
        and picture.taken
        and len(copy.thumbnail("/fotos/casa.jpg"))
    )
    assert [hit.path for hit in copy.search("um gato", k=9)] == [
        "/fotos/" + os.path.relpath(hit.path, folder) for hit in index.search("um gato", k=9)
    ]
    for path in (tmp_path / "public.lance").rglob("*"):
        assert not path.is_file() or b"/ana/" not in path.read_bytes(), f"{path} contains a folder of this machine"


# --- Folder of the Space ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_folder_of_a_space_has_program_model_index_and_card(flags, tmp_path, capsys):
    space = tmp_path / "space"
    main([*flags, "--space", str(space)])
    output = capsys.readouterr().out
    assert str(space) in output and "python app.py" in output
    _, front_matter, body = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card_data = yaml.safe_load(front_matter)
    assert (card_data["sdk"], card_data["app_port"], card_data["license"]) == ("docker", 7860, "cc-by-sa-4.0")
    assert "Áreas. Made here" in body and "models" not in card_data and "cc-by-sa-4.0" in body
    files = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    assert "optimizer.pt" not in " ".join(files) and {"LICENSE", "Dockerfile", "models/model/config.json"} <= files
    for name in files:
        if not name.endswith(("tokenizer.json", ".safetensors")):
            assert str(tmp_path).encode() not in (space / name).read_bytes(), f"{name} contains a path of this machine"
    lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("==")[0] for line in lines} >= {"torch", "transformers", "lancedb", "starlette", "pillow"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines) and "datasets" not in " ".join(lines)
    assert not [line for line in lines if line.startswith("timm")], "this model has no timm tower"
    docker = (space / "Dockerfile").read_text(encoding="utf-8")
    assert f"torch=={dict(line.split('==') for line in lines)['torch']} " in docker and "EXPOSE 7860" in docker
    with pytest.raises(ValueError, match=re.escape(str(space))):
        main([*flags, "--space", str(space)])


def test_a_model_with_a_path_of_this_machine_is_refused(flags, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    (tiny_folder / "config.json").write_text(json.dumps({**config, "from": str(tmp_path / "x")}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x"))):
        main([*flags, "--space", str(tmp_path / "space")])
    assert not (tmp_path / "space").exists()


@pytest.mark.slow
def test_a_space_runs_without_the_files_it_was_made_from(flags, tmp_path):
    main([*flags, "--space", str(tmp_path / "space")])
    for name in ("areas", "i.lance", "model"):
        shutil.rmtree(tmp_path / name)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment["SPACE_HOST"] = "us-demo.hf.space"
    app = (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    assert '"0.0.0.0", 7860' in app
    app = app.replace('"0.0.0.0", 7860', '"127.0.0.1", 7860')  # the test must not open a port to the network
    app = app.replace("hosts)", "hosts, on_open=lambda url: print(url, flush=True))")
    (tmp_path / "space" / "app.py").write_text(app, encoding="utf-8")
    command = ["timeout", "-k", "5", "300", sys.executable, "app.py"]
    server = subprocess.Popen(command, cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, text=True)
    try:
        client = PageClient(server.stdout.readline().strip())
        assert "Imagens: Áreas, licença" in client.get("")[2].decode()
        status, answer = client.ask("search", {"text": "azul", "k": 3}, png(4))
        assert status == 200 and answer["count"] == 30 and answer["hits"][0]["name"].removesuffix(".png") in CAPTIONS
        path = answer["hits"][0]["path"]
        assert path.startswith("/Áreas/") and client.get("download", path)[0] == 404
        assert client.get("picture", path)[1]["content-type"] == "image/webp", "not a thumbnail"
        headers = {"Host": "us-demo.hf.space", "Origin": "https://us-demo.hf.space"}
        assert client.ask("search", {"text": "azul"}, **headers)[0] == 200
    finally:
        server.terminate()
        server.wait(timeout=30)


# --- Push to the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path):
    with hub_commands(tmp_path / "hub") as run_command:
        yield run_command


@pytest.mark.slow
def test_a_space_is_pushed_and_old_files_are_deleted(commands, flags, tmp_path):
    main([*flags, "--space", str(tmp_path / "demo")])
    (tmp_path / "demo" / "capivara_search" / "x.pyc").write_bytes(b"bytecode")

    def run(*more, **options):
        return commands("--model", tmp_path / "demo", "--repo-type", "space", "--repo-id", "us/demo", *more, **options)

    preview = run()
    assert preview.code == 0 and "Nothing was sent" in preview.out and "app.py" in preview.out, preview.err
    assert ("spaces", "us/demo") not in commands.hub.storage.repos
    sent = run("--push", "--private")
    assert sent.code == 0 and "Pushed in one commit" in sent.out, sent.err
    remote_files = set(commands.hub.files("us/demo", kind="spaces"))
    assert {"app.py", "README.md", "requirements.txt", "Dockerfile", "capivara_search/__init__.py"} <= remote_files
    fragment = next(name for name in remote_files if name.startswith("index.lance/pictures.lance/data/"))
    assert commands.hub.repo("us/demo", "spaces").private and not [
        name for name in remote_files if name.endswith(".pyc")
    ]
    (tmp_path / "demo" / fragment).rename(tmp_path / "demo" / f"{fragment}.new")
    assert run("--push").code == 0
    assert set(commands.hub.files("us/demo", kind="spaces")) == remote_files - {fragment} | {f"{fragment}.new"}


WRONG_FLAGS = [
    ([], "--space FOLDER .*--static FOLDER"),
    (["--space", "x", "--picture", "areas"], "`--picture`.*`--pictures`"),
    (["--space", "x", "--pictures", "areas"], "--pictures areas .*capivara index FOLDER"),
    (["--space", "x", "--model", "./no-model"], "no-model"),
]


def test_wrong_flags_are_refused_in_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, message in WRONG_FLAGS:
        with pytest.raises(ValueError, match=message) as error:
            main([*flags, *more])
        assert "\n" not in str(error.value)
