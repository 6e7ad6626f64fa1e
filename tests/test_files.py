"""Files appear whole or not at all."""

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


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": "ação"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ação"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    with path.open(encoding="utf-8") as reader:  # whoever reads has the old file whole
        write_json(path, {"b": 1})
        assert json.load(reader) == {"a": "ação"}
    with pytest.raises(RuntimeError), atomic_file(path) as new:
        new.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"b": 1} and [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_every_byte_of_a_file_with_a_digest_counts(tmp_path):
    path, data = tmp_path / "x", bytes(range(200, 256))
    assert not digest_matches(path)
    path.write_bytes(data)
    append_digest(path)
    assert digest_matches(path) and path.read_bytes()[:-DIGEST_HEX_LENGTH] == data
    whole = path.read_bytes()
    for place in range(len(whole)):
        for mask in (1, 0x20, 0xFF):  # 0x20 makes a small letter of the digest a capital
            path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            assert not digest_matches(path), (place, mask)
        path.write_bytes(whole[:place])
        assert not digest_matches(path), f"{place} bytes"
    path.write_bytes(whole + b"\0")
    assert not digest_matches(path)


def test_json_that_is_none_is_named(tmp_path):
    path = tmp_path / "x.json"
    deep = sys.getrecursionlimit()  # of this process: libraries raise it
    for content in ("", "{", "[" * 1000, '{"a": ' * deep + "1" + "}" * deep, "\udc80"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"x\.json is not JSON"):
            read_json(path)
    for content in ("[]", "null", "7", "{}", '{"a": null}', '{"a": "1"}', '{"a": true}'):
        path.write_text(content)
        read_json(path)
        with pytest.raises(ValueError, match=r"x\.json(:| must hold).*\ba\b"):
            read_json(path, a=int)
    path.write_text('{"a": 1}')
    assert read_json(path, a=int) == {"a": 1}


def test_weights_are_as_readable_as_their_neighbours(tmp_path):
    """safetensors makes files that only their owner reads."""
    with atomic_folder(tmp_path / "out") as folder:
        save_file({"a": np.ones(1)}, folder / "model.safetensors")
        write_json(folder / "sub" / "config.json", {})
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~UMASK, path


def test_old_folder_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite_output_dir"), atomic_folder(out):
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


def test_another_process_tidies_up_between_the_two_renames(tmp_path, monkeypatch):
    """The old folder has another name then, and no other folder has its own."""
    out, rename = tmp_path / "out", Path.rename
    write_json(out / "a", "old")

    def renamed(self, target):
        rename(self, target)
        remove_leftovers(out)

    monkeypatch.setattr(Path, "rename", renamed)
    with atomic_folder(out, overwrite=True) as folder:
        write_json(folder / "a", "new")
    assert read_json(out / "a") == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replaced_folder_that_is_half_removed_is_never_put_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_json(out / "a", "old")
    write_json(tmp_path / ".out.old-01234567" / "a", "older")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed as it begins
    with atomic_folder(out, overwrite=True):  # removes what is older, then what is old
        pass
    monkeypatch.undo()
    out.rename(tmp_path / "kept")
    check_output_folder(out)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_disk_full(small_disk, tiny_model):
    with (
        pytest.raises(OSError, match="No space left on the disk") as caught,
        atomic_folder(small_disk / "out") as folder,
    ):
        (folder / "filler").write_bytes(b"0" * 900_000)
        tiny_model.save_pretrained(folder)  # safetensors says so in words, not by errno
    assert caught.value.errno == errno.ENOSPC
    assert not list(small_disk.iterdir())


def test_an_output_file_that_cannot_be(tmp_path):
    (tmp_path / "notes").write_text("")
    for path in (tmp_path / "notes", tmp_path / "new" / "x.json"):
        check_output_file(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"), atomic_folder(tmp_path / "notes", overwrite=True):
        pass
    faults = {tmp_path: "is a folder", Path("/"): "is a folder"}
    faults |= {tmp_path / name / "x.json": f"{name} is not a folder" for name in ("notes", "link")}
    for path, fault in faults.items():
        with pytest.raises(ValueError, match=fault):
            check_output_file(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "notes"]


@pytest.mark.parametrize("place", [Path("/proc"), Path("/sys")])  # nobody may write there, root included
def test_where_nobody_may_write(place):
    if not place.is_dir():
        pytest.skip(f"there is no {place} here")
    for check, what in ((check_output_file, "file"), (check_output_folder, "folder")):
        with pytest.raises(ValueError, match=f"The output {what} .* can.t be written: {place} can't be written to"):
            check(place / "new" / "out")


def whole(word: str, folder: str = "out") -> dict[str, str]:
    return {f"{folder}/{name}": word for name in ("a", "c", "inner/b")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "finish"])
def test_sigkill_at_any_step_of_a_replacement(tmp_path, kind):
    """A whole output is there at any time, the next run finds it under its name, and nothing else stays."""
    command = [sys.executable, "tests/killed_overwrite.py", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 15, "steps"
    for step, then in enumerate(found, 1):
        folders = {name.removesuffix("/c") for name in then["killed"] if name.endswith("/c")}
        assert any(
            whole(word, folder).items() <= then["killed"].items()
            for word in ("old", "new", "newer")
            for folder in folders
        ), (step, then["killed"])
        unfinished = {name for name in then["failed"] if name.startswith("out.partial/")}
        assert kind == "finish" or not unfinished
        kept = {name: word for name, word in then["failed"].items() if name not in unfinished}
        assert kept in [whole(word) for word in ("old", "new", "newer")], (step, then["failed"])
        assert then["done"] == whole("newest"), (step, then["done"])


def test_what_a_living_process_works_in_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with atomic_folder(out, overwrite=True) as first:
        (first / "a").write_text("first")
        with atomic_folder(out, overwrite=True) as second:
            (second / "a").write_text("second")
            assert first.is_dir() and first != second
    assert (out / "a").read_text() == "first"
    (tmp_path / ".out.tmp-notes").mkdir()  # eight letters are needed
    (tmp_path / ".out.old.tmp-01234567").mkdir()  # of another output, "out.old"
    remove_leftovers(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old.tmp-01234567", ".out.tmp-notes", "out"]
