"""Files appear whole or not at all."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from artifacts import (
    check_free_space,
    check_output_file,
    next_numbered_folder,
    package_versions,
    whole_folder,
    write_json,
)


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": "ação"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ação"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_folder_appears_at_the_end(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("umask", ["022", "007"])
def test_weights_are_as_readable_as_their_neighbours(tmp_path, umask):
    code = """
from pathlib import Path
import torch
from safetensors.torch import save_file
from artifacts import finish_folder, partial_folder, whole_folder, write_text
def fill(folder):
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    write_text(folder / "sub" / "config.json", "{}")
with whole_folder(Path("whole")) as folder:
    fill(folder)
partial_folder(Path("run")).mkdir(mode=0o700)
fill(partial_folder(Path("run")))
finish_folder(Path("run"))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = f"umask {umask}; exec {sys.executable} -c '{code}'"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=True)
    allowed = 0o777 & ~int(umask, 8)
    for path in [
        *(tmp_path / "whole").rglob("*"),
        *(tmp_path / "run").rglob("*"),
        tmp_path / "whole",
        tmp_path / "run",
    ]:
        assert path.stat().st_mode & 0o777 == allowed & (0o777 if path.is_dir() else 0o666), path


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite_output_dir"), whole_folder(out):
        pass
    with pytest.raises(RuntimeError), whole_folder(out, overwrite=True):
        raise RuntimeError
    assert [p.name for p in out.iterdir()] == ["old"]
    with whole_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("1")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("1")
    with pytest.raises(ValueError, match="is a file"), whole_folder(tmp_path / "out", overwrite=True):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_disk_full(small_disk, tiny_model):
    with (
        pytest.raises(OSError, match="No space left on the disk") as caught,
        whole_folder(small_disk / "out") as folder,
    ):
        (folder / "filler").write_bytes(b"0" * 900_000)
        tiny_model.save_pretrained(folder)  # safetensors says so in words, not by errno
    assert caught.value.errno == errno.ENOSPC
    assert not list(small_disk.iterdir())


def test_free_space_is_checked_beforehand(tmp_path):
    check_free_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(OSError, match=r"needs about .* MB"):
        check_free_space(tmp_path, 2**60)


def test_an_output_file_that_cannot_be(tmp_path):
    (tmp_path / "notes").write_text("")
    for path in (tmp_path / "notes", tmp_path / "new" / "x.json"):
        check_output_file(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    faults = {tmp_path: "is a folder", Path("/"): "is a folder"}
    faults |= {tmp_path / name / "x.json": f"{name} is no folder" for name in ("notes", "link")}
    for path, fault in faults.items():
        with pytest.raises(ValueError, match=fault):
            check_output_file(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "notes"]


def test_a_folder_that_may_not_be_written_to(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match="can't be written to"):
        check_output_file(small_disk / "new" / "x.json")


def test_numbered_folders(tmp_path):
    assert next_numbered_folder(tmp_path, "x") == tmp_path / "x-001"
    (tmp_path / "x-001").mkdir()
    assert next_numbered_folder(tmp_path, "x") == tmp_path / "x-002"


def test_versions():
    assert {"python", "torch", "transformers"} <= set(package_versions())
    assert Path(__file__).exists()
