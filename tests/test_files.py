"""Atomic writes: files and folders appear complete or not at all, also if a process is killed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from capivara_common.files import (
    DIGEST_HEX_LENGTH,
    UMASK,
    append_digest,
    atomic_file,
    atomic_folder,
    check_output_file,
    check_output_folder,
    digest_matches,
    read_json,
    remove_leftovers,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_json_is_replaced_atomically(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": "ação"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ação"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    with path.open(encoding="utf-8") as reader:  # an open reader keeps the old content
        write_json(path, {"b": 1})
        assert json.load(reader) == {"a": "ação"}
    with pytest.raises(RuntimeError), atomic_file(path) as new:
        new.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"b": 1} and [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_the_digest_detects_any_changed_byte(tmp_path):
    path, data = tmp_path / "x", bytes(range(200, 256))
    assert not digest_matches(path)
    path.write_bytes(data)
    append_digest(path)
    assert digest_matches(path) and path.read_bytes()[:-DIGEST_HEX_LENGTH] == data
    whole = path.read_bytes()
    for position in range(len(whole)):
        for mask in (1, 0x20, 0xFF):  # 0x20 turns a lower-case letter of the digest into a capital
            path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
            assert not digest_matches(path), (position, mask)
        path.write_bytes(whole[:position])
        assert not digest_matches(path), f"{position} bytes"
    path.write_bytes(whole + b"\0")
    assert not digest_matches(path)


def test_invalid_json_is_reported_with_its_path(tmp_path):
    path = tmp_path / "x.json"
    deep = max(500_000, sys.getrecursionlimit())  # above the limit of C code, too, which Python 3.12 and newer have
    for content in ("", "{", "[" * 1000, '{"a": ' * deep + "1" + "}" * deep, "\udc80"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"x\.json\b"):
            read_json(path)
    for content in ("[]", "null", "7", "{}", '{"a": null}', '{"a": "1"}', '{"a": true}'):
        path.write_text(content)
        read_json(path)
        with pytest.raises(ValueError, match=r"x\.json\b.*\ba\b"):
            read_json(path, a=int)
    path.write_text('{"a": 1}')
    assert read_json(path, a=int) == {"a": 1}


def test_all_files_of_a_folder_get_the_default_permissions(tmp_path):
    """safetensors creates files that only their owner can read."""
    with atomic_folder(tmp_path / "out") as folder:
        save_file({"a": np.ones(1)}, folder / "model.safetensors")
        write_json(folder / "sub" / "config.json", {})
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~UMASK, path


def test_old_folder_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(ValueError, match="--overwrite_output_dir"), atomic_folder(out):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("1")
        raise KeyboardInterrupt
    assert [p.name for p in out.iterdir()] == ["old"] and [p.name for p in tmp_path.iterdir()] == ["out"]
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("1")
    monkeypatch.setattr(Path, "rename", lambda path, to: rename(path, "/no/such" if "tmp-" in path.name else to))
    with pytest.raises(FileNotFoundError), atomic_folder(out, overwrite=True):
        pass
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_cleanup_by_another_process_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    """At that moment, the old folder is renamed and no folder has the final name."""
    out, rename = tmp_path / "out", Path.rename
    write_json(out / "a", "old")

    def renamed(self, target):
        rename(self, target)
        remove_leftovers(out)

    monkeypatch.setattr(Path, "rename", renamed)
    with atomic_folder(out, overwrite=True) as folder:
        write_json(folder / "a", "new")
    assert read_json(out / "a") == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_partly_removed_old_folder_is_never_restored(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_json(out / "a", "old")
    write_json(tmp_path / ".out.old-01234567" / "a", "older")
    # As if the process was killed at the start of the removal.
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with atomic_folder(out, overwrite=True):  # removes the older folder, then the old one
        pass
    monkeypatch.undo()
    out.rename(tmp_path / "kept")
    check_output_folder(out)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_full_disk_leaves_nothing_behind(small_disk, tiny_model):
    with (
        pytest.raises(OSError, match="No space left") as caught,
        atomic_folder(small_disk / "out") as folder,
    ):
        (folder / "filler").write_bytes(b"0" * 900_000)
        tiny_model.save_pretrained(folder)  # safetensors reports the full disk in the message, not as an errno
    assert caught.value.errno == errno.ENOSPC
    assert not list(small_disk.iterdir())


def test_impossible_output_files_are_refused(tmp_path):
    (tmp_path / "notes").write_text("")
    for path in (tmp_path / "notes", tmp_path / "new" / "x.json"):
        check_output_file(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="notes"), atomic_folder(tmp_path / "notes", overwrite=True):
        pass
    codes = {tmp_path: "output_is_folder", Path("/"): "output_is_folder"}
    codes |= {tmp_path / name / "x.json": "no_output" for name in ("notes", "link")}
    for path, code in codes.items():
        with pytest.raises(ValueError, match=str(path)) as error:
            check_output_file(path)
        assert error.value.code == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "notes"]


@pytest.mark.parametrize("place", [Path("/proc"), Path("/sys")])  # not writable, even for root
def test_a_folder_that_is_not_writable_is_refused(place):
    if not place.is_dir():
        pytest.skip(f"{place} does not exist on this machine")
    for check, kind in ((check_output_file, "file"), (check_output_folder, "folder")):
        with pytest.raises(ValueError, match=f"{kind} {place}/new/out .*{place} ") as error:
            check(place / "new" / "out")
        assert error.value.code == "no_output"


def folder_with(word: str, folder: str = "out") -> dict[str, str]:
    """Return path -> content of a complete folder as `killed_overwrite.py` writes it."""
    return {f"{folder}/{name}": word for name in ("a", "c", "inner/b")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "finish"])
def test_sigkill_at_any_step_of_a_replacement_loses_nothing(tmp_path, kind):
    """A complete output exists at any time, the next run finds it under its name, and nothing else remains."""
    command = [sys.executable, "tests/killed_overwrite.py", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) > 15, "steps"
    for step, state in enumerate(states, 1):
        folders = {name.removesuffix("/c") for name in state["killed"] if name.endswith("/c")}
        assert any(
            folder_with(word, folder).items() <= state["killed"].items()
            for word in ("old", "new", "newer")
            for folder in folders
        ), (step, state["killed"])
        unfinished = {name for name in state["failed"] if name.startswith("out.partial/")}
        assert kind == "finish" or not unfinished
        output = {name: word for name, word in state["failed"].items() if name not in unfinished}
        assert output in [folder_with(word) for word in ("old", "new", "newer")], (step, state["failed"])
        assert state["done"] == folder_with("newest"), (step, state["done"])


def test_cleanup_leaves_folders_of_running_processes_alone(tmp_path):
    out = tmp_path / "out"
    with atomic_folder(out, overwrite=True) as first:
        (first / "a").write_text("first")
        with atomic_folder(out, overwrite=True) as second:
            (second / "a").write_text("second")
            assert first.is_dir() and first != second
    assert (out / "a").read_text() == "first"
    (tmp_path / ".out.tmp-notes").mkdir()  # not one of ours: the suffix must have eight characters
    (tmp_path / ".out.old.tmp-01234567").mkdir()  # belongs to another output, "out.old"
    remove_leftovers(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old.tmp-01234567", ".out.tmp-notes", "out"]
