"""Windows and macOS: what only POSIX systems have is not needed, and paths of Windows are judged correctly."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import yaml

from capivara_common import files, image_files
from capivara_common.cli import configure_console
from capivara_common.files import (
    acquire_folder_lock,
    atomic_folder,
    find_windows_path_fault,
    remove_or_restore_leftovers,
    write_json,
)
from capivara_common.image_files import BadImage, open_regular_file_safe_from_link_swaps
from capivara_search import folder_scan, watch
from capivara_search.index_progress import PROGRESS_FILE, read_progress_of_running_update
from capivara_search.page import decoder
from capivara_search.table import PictureTable
from capivara_search.terminal import shorten_and_escape_path

ROOT = Path(__file__).resolve().parent.parent


def run_like_windows(*words: object) -> object:
    """Run tests/windows_like_process.py and return the JSON that it prints."""
    command = [sys.executable, str(ROOT / "tests" / "windows_like_process.py"), *map(str, words)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_module_can_be_imported_without_posix_modules():
    names = run_like_windows("imports")
    assert {"capivara_common.files", "capivara_search.page.guard", "training.loop", "train_accelerate"} <= set(names)


@pytest.mark.slow
def test_an_index_works_without_posix_modules(model, tmp_path):
    result = run_like_windows("search", model, tmp_path)
    assert result == {
        "new": 2, "hits": ["blue.png", "red.png"], "left": 1, "size": [8, 9], "folder": 2, "connections": 400,
        "progress": None,
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"fotos", "i.lance", "out"}


def test_the_project_imports_posix_modules_only_if_they_exist():
    """Fast stand-in for the slow test above."""
    pattern = r"^(import|from) (fcntl|resource|pwd|grp|termios|tty|pty|readline|syslog|curses)\b"
    command = ["git", "grep", "-lE", pattern, "--", "*.py", ":!tests"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, ""), "1: git has found nothing"


# --- Locks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_folder_descriptors(monkeypatch, tmp_path_factory):
    """Folders can't be opened, as on Windows. Returns the folder of the lock files."""
    temporary = tmp_path_factory.mktemp("temporary")
    for module in (files, sys.modules["capivara_search.table"]):
        monkeypatch.setattr(module, "CAN_OPEN_FOLDERS", False)
    monkeypatch.setattr(files.tempfile, "tempdir", str(temporary))
    return temporary


def test_a_folder_is_locked_without_opening_it(without_folder_descriptors, tmp_path):
    lock = acquire_folder_lock(tmp_path)
    with pytest.raises(BlockingIOError):
        acquire_folder_lock(tmp_path)
    os.close(lock)
    os.close(acquire_folder_lock(tmp_path))
    assert not list(tmp_path.iterdir()) and len(list(without_folder_descriptors.iterdir())) == 1


def test_folders_in_use_stay_where_only_names_are_locked(without_folder_descriptors, tmp_path, monkeypatch):
    """Another process cleans up after each rename."""
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()  # Windows does not rename a folder to the name of an empty one
    with atomic_folder(out) as new:
        remove_or_restore_leftovers(out)
        write_json(new / "a", "old")

    def rename_and_clean(self, target):
        if target.is_dir():
            raise FileExistsError(target)
        rename(self, target)
        remove_or_restore_leftovers(out)

    monkeypatch.setattr(Path, "rename", rename_and_clean)
    with atomic_folder(out, overwrite=True) as new:
        write_json(new / "a", "new")
    assert files.read_json(out / "a") == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_an_index_needs_no_open_folder(without_folder_descriptors, tmp_path):
    table = PictureTable(tmp_path / "i.lance")
    with table.locked():
        write_json(tmp_path / "i.lance" / PROGRESS_FILE, {"done": 1, "total": 2})
        assert read_progress_of_running_update(table.where)["done"] == 1
    assert read_progress_of_running_update(table.where) is None and not (tmp_path / "i.lance" / PROGRESS_FILE).exists()


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_nofollow(monkeypatch):
    """Files can't be opened relative to a folder, as on Windows."""
    monkeypatch.setattr(image_files, "_FOLDER_OPEN_FLAGS", None)
    monkeypatch.setattr(image_files, "_FILE_OPEN_FLAGS", os.O_RDONLY)


def test_a_file_is_opened_where_links_can_not_be_excluded(without_nofollow, tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "inner").symlink_to(tmp_path)
    with open_regular_file_safe_from_link_swaps(tmp_path / "inner" / "a.png", "it", [tmp_path]) as file:
        assert file.read() == b"a"
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(BadImage) as caught:
            open_regular_file_safe_from_link_swaps(path, "it", [tmp_path])
        assert caught.value.reason == "no regular file"
    with pytest.raises(FileNotFoundError):
        open_regular_file_safe_from_link_swaps(tmp_path / "gone.png", "it", [tmp_path])


@pytest.mark.parametrize("swapped", ["2024/a.jpg", "2024"])
@pytest.mark.parametrize("moment", ["after the links are resolved", "before the file is opened"])
def test_a_link_that_appears_is_noticed_where_links_can_not_be_excluded(
    swapped, moment, without_nofollow, tmp_path, monkeypatch
):
    for folder, text in (("private", b"secret"), ("fotos", b"picture")):
        (tmp_path / folder / "2024").mkdir(parents=True)
        (tmp_path / folder / "2024" / "a.jpg").write_bytes(text)
    open_file, realpath = os.open, os.path.realpath

    def swap() -> None:
        patch.undo()
        (tmp_path / "fotos" / swapped).rename(tmp_path / "away")
        (tmp_path / "fotos" / swapped).symlink_to(tmp_path / "private" / swapped)

    with monkeypatch.context() as patch:
        if moment == "before the file is opened":
            patch.setattr(os, "open", lambda *args: (swap(), open_file(*args))[1])
        else:
            patch.setattr(os.path, "realpath", lambda path: (realpath(path), swap())[0])
        with pytest.raises((OSError, BadImage)):
            open_regular_file_safe_from_link_swaps(
                tmp_path / "fotos" / "2024" / "a.jpg", "it", [str(tmp_path / "fotos")]
            )
    assert (tmp_path / "fotos" / "2024" / "a.jpg").read_bytes() == b"secret", "the path was not replaced"


FOLDERS = ["C:\\Fotos", "\\\\nas\\fotos\\2024"]


@pytest.mark.parametrize(
    ("path", "is_safe"),
    [
        ("C:\\Fotos\\a.jpg", True), ("c:/fotos/A.JPG", True), ("D:\\outro\\a.jpg", True), ("a.jpg", True),
        ("..\\a.jpg", True), ("C:\\Fotos\\.oculto", True), ("C:\\Fotos\\console.jpg", True), ("COM10.png", True),
        ("\\\\NAS\\Fotos\\2024\\a.jpg", True), ("//nas/fotos/a.jpg", True), ("\\\\?\\C:\\Fotos\\a.jpg", True),
        ("\\\\?\\UNC\\nas\\fotos\\a.jpg", True), ("\\\\evil\\share\\a.jpg", False), ("//evil/share/a.jpg", False),
        ("\\\\?\\UNC\\evil\\share\\a.jpg", False), ("\\\\.\\PhysicalDrive0", False), ("\\\\.\\pipe\\x", False),
        ("C:\\Fotos\\NUL", False), ("C:\\Fotos\\nul.jpg", False), ("con.tar.gz", False), ("COM1", False),
        ("LPT².png", False), ("aux \\a.jpg", False), ("CONIN$", False), ("C:\\Fotos\\a.jpg.", False),
        ("C:\\Fotos \\a.jpg", False), ("C:\\Fotos\\a.jpg:secret", False), ("C:\\Fotos\\a.jpg::$DATA", False),
    ],
)  # fmt: skip
def test_paths_of_windows_are_judged_before_they_are_looked_up(path, is_safe):
    assert (find_windows_path_fault(path, FOLDERS) is None) == is_safe


def test_a_user_may_name_any_network_share():
    assert find_windows_path_fault("\\\\outro\\share\\a.jpg") is None and find_windows_path_fault(
        "\\\\outro\\share\\NUL"
    )


def test_paths_are_judged_on_windows_only(monkeypatch, tmp_path):
    (tmp_path / "nul.png").write_bytes(b"a")
    open_regular_file_safe_from_link_swaps(tmp_path / "nul.png", "it").close()
    assert files.AllowedFolders(tmp_path).contains(tmp_path / "nul.png")
    for module in (files, image_files):
        monkeypatch.setattr(module, "IS_WINDOWS", True)
    with pytest.raises(BadImage) as caught:
        open_regular_file_safe_from_link_swaps(tmp_path / "nul.png", "it")
    assert caught.value.reason == "no regular file" and "nul.png" in caught.value.detail
    assert not files.AllowedFolders(tmp_path).contains(tmp_path / "nul.png")


def test_a_folder_has_one_path_where_case_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / "Fotos").mkdir()
    (tmp_path / "fotos").symlink_to(tmp_path / "Fotos")  # stands for a file system that ignores case
    assert folder_scan.to_absolute_path_with_disk_case(tmp_path / "fotos") == tmp_path / "fotos"
    monkeypatch.setattr(os.path, "normcase", lambda path: str(path).lower())
    assert folder_scan.to_absolute_path_with_disk_case(tmp_path / "fotos") == tmp_path / "Fotos"


def test_junctions_count_as_links():
    for link, junction in ((False, False), (True, False), (False, True)):
        entry = SimpleNamespace(is_symlink=lambda link=link: link, is_junction=lambda junction=junction: junction)
        assert folder_scan.is_link_or_junction(entry) == (link or junction)


def test_paths_are_shortened_with_the_separator_of_the_system(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os, "getcwd", lambda: "C:\\Fotos")
    monkeypatch.setattr(os.path, "expanduser", lambda _: "C:\\Users\\ana")
    paths = ("C:\\Fotos\\2024\\a.jpg", "C:\\Users\\ana\\b.jpg", "D:\\c.jpg")
    assert [*map(shorten_and_escape_path, paths)] == ["2024\\a.jpg", "~\\b.jpg", "D:\\c.jpg"]


def test_network_shares_of_windows_are_scanned(monkeypatch):
    monkeypatch.setattr(watch, "IS_WINDOWS", True)
    assert watch.is_network_folder("\\\\nas\\fotos\\2024") and not watch.is_network_folder("C:\\Fotos")


# --- Output and processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("platform", "expected"), [("win32", "ação → 🦫".encode()), ("linux", b"a\xe7\xe3o \\u2192 ")])
def test_output_to_files_is_utf8_on_windows_and_never_an_error(platform, expected, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", newline="\n")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)  # as in a program without a console
    configure_console()
    print("ação → 🦫", flush=True)
    assert stream.buffer.getvalue().startswith(expected)


def test_messages_of_the_decoder_are_whole_and_bounded():
    pipe = io.BytesIO()
    decoder._send_messages(pipe, b"header", b"")
    data = pipe.getvalue()
    assert [decoder._receive_message(read := io.BytesIO(data)), decoder._receive_message(read)] == [b"header", b""]
    for broken in (b"", data[:5], data[:10], b"\xff" * 8 + b"x", struct.pack(">Q", decoder.MAX_IMAGE_BYTES + 1)):
        with pytest.raises(EOFError):
            decoder._receive_message(io.BytesIO(broken))


@pytest.mark.slow
def test_a_picture_that_takes_too_long_ends_the_decoder(monkeypatch):
    PIL.Image.effect_noise((3000, 3000), 90).save(data := io.BytesIO(), "PNG")
    monkeypatch.setattr(decoder, "DECODE_TIMEOUT_S", 0.02)
    process = decoder.DecoderProcess()
    first = process._process
    try:
        with pytest.raises(BadImage) as caught:
            process.decode(data.getvalue())
        assert caught.value.reason == "unreadable image" and first.returncode == 1
    finally:
        process.close()


# --- Continuous integration ------------------------------------------------------------------------------------------


def test_the_workflow_file_is_valid_and_covers_all_systems_and_versions():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow[True] or workflow["on"], "YAML reads the key `on` as True"
    jobs = workflow["jobs"]
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} == set(matrix["os"])
    assert set(matrix["python"]) == {"3.11", "3.12", "3.13", "3.14"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    commands = "\n".join(step.get("run", "") for step in steps)
    assert ".ci/run" in commands and "ruff check" in commands and "make dist" in commands
