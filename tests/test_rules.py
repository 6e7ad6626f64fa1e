"""Rules for ignoring files, and the counts of ignored files. test_picture_files.py tests the scan of folders."""

import subprocess
from pathlib import Path

from made_index import expect_error

from capivara_search.folder_scan import find_pictures_and_unreadable_files
from capivara_search.ignore_rules import IgnoreRules

PATTERNS = ("*.gif", "/so aqui/", "rascunhos/", "**/cache/*.png", "a/b*", "!a/bom.jpg", "a/**/z.jpg", r"\#x.jpg")
NAMES = (
    *("a.gif", "a.jpg", "so aqui/a.jpg", "a/so aqui/a.jpg", "rascunhos/a.jpg", "a/rascunhos/a.jpg", "a/cache/a.png"),
    *("a/cache/a.jpg", "a/bola.jpg", "a/bom.jpg", "b/bom.jpg", "a/b/bom.jpg", "a/c/d/z.jpg", "#x.jpg", "x.GIF"),
)


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def scan(folder: Path, *roots: Path, rules: IgnoreRules | None = None) -> tuple[set[str], dict[str, dict[str, int]]]:
    """Return the pictures in a folder, or in roots below it, relative to the folder, and the ignored counts by root."""
    counts = {}
    files, _ = find_pictures_and_unreadable_files(roots or [folder], rules, counts)
    return {str(Path(file.path).relative_to(folder)) for file in files}, counts


def test_patterns_ignore_the_files_that_git_ignores(tmp_path):
    write_files(tmp_path, *NAMES)
    git = ["git", "-C", str(tmp_path), "-c", "core.quotePath=false", "-c", "core.excludesFile=/dev/null"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / ".gitignore").write_text("\n".join(PATTERNS), encoding="utf-8")
    listed = subprocess.run([*git, "ls-files", "-o", "--exclude-standard"], capture_output=True, text=True, check=True)
    expected = {name for name in listed.stdout.splitlines() if name != ".gitignore"}
    names, counts = scan(tmp_path, rules=IgnoreRules(PATTERNS))
    assert names == expected and 5 < len(expected) < len(NAMES) - 5
    assert counts[str(tmp_path)]["excluded"] > 5


def test_hidden_system_and_video_files_are_counted_by_folder(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_files(
        first, "a.jpg", ".hidden.jpg", ".notes", ".thumbnails/x.jpg", "@eaDir/a.jpg", "node_modules/x/y.png", "b.txt"
    )
    write_files(first, "filme.mp4", "2024/filme.MOV", ".x/filme.mp4")
    write_files(second, "a.jpg", "b/.c/x.jpg", "b/filme.webm")
    names, counts = scan(tmp_path, first, second)
    assert names == {"first/a.jpg", "second/a.jpg"}
    assert counts == {str(first): {"hidden": 3, "system": 2, "video": 2}, str(second): {"hidden": 1, "video": 1}}


def test_forgotten_paths_stay_ignored_until_they_or_a_parent_are_included(tmp_path):
    write_files(tmp_path, "a/b/c.jpg", "a/b/d.jpg", "a/e.jpg", "f.jpg", "g.jpg")
    rules = IgnoreRules(
        forgotten=frozenset(str(tmp_path / name) for name in ("a/b/c.jpg", "a/e.jpg", "f.jpg", "gone.jpg"))
    )
    assert scan(tmp_path, rules=rules) == ({"a/b/d.jpg", "g.jpg"}, {str(tmp_path): {"forgotten": 3}})
    expected = {"a/b/c.jpg", "a/b/d.jpg", "a/e.jpg", "g.jpg"}
    assert scan(tmp_path, rules=rules.updated(include=[tmp_path / "a"]))[0] == expected
    folder = IgnoreRules(forgotten=frozenset([str(tmp_path / "a")]))
    with expect_error("folder_forgotten", path=tmp_path / "a" / "b", forgotten=tmp_path / "a"):
        folder.updated(include=[tmp_path / "a" / "b"])
    with expect_error("nothing_to_include", path="*.gif"):
        folder.updated(include=["*.gif"])
    assert folder.updated(["*.gif"]).updated(["x/"], ["*.gif", tmp_path / "a"]) == IgnoreRules(("x/",))


def test_links_lead_neither_to_forgotten_paths_nor_out_of_the_folder(tmp_path):
    fotos, home = tmp_path / "disk" / "fotos", tmp_path / "home"
    write_files(fotos, "a.jpg", "privado/b.jpg", "privado/c/d.jpg", "e.jpg")
    home.symlink_to(fotos)
    for name, target in (("l1", "privado"), ("l2", "privado/c"), ("l3.jpg", "privado/b.jpg"), ("l4.jpg", "e.jpg")):
        (fotos / name).symlink_to(fotos / target)
    rules = IgnoreRules(forgotten=frozenset([str(home / "privado"), str(home / "l4.jpg")]))
    assert scan(home, rules=rules)[0] == {"a.jpg", "e.jpg"}, "forgetting a link also ignored its target"
    for root in (home / "privado", fotos / "privado", fotos / "privado" / "c"):
        with expect_error("folder_forgotten", forgotten=home / "privado"):  # the path in the index, not the real path
            find_pictures_and_unreadable_files([root, home], rules)


def test_forgotten_and_excluded_folders_are_counted_in_pictures(tmp_path):
    """It makes no difference whether a rule matches a folder, its subfolders or its pictures."""
    write_files(
        tmp_path, "a.jpg", "b/1.jpg", "b/2.png", "b/c/3.jpg", "b/notes.txt", "b/.x/4.jpg", "b/@eaDir/5.jpg", "d/6.gif"
    )
    write_files(tmp_path, "d/7.jpg", "e/f/8.jpg", "e/f/9.jpg", "empty/notes.txt")
    (tmp_path / "b" / "link.jpg").symlink_to(tmp_path / "a.jpg")
    rules = IgnoreRules(("*.gif", "f/", "empty/"), frozenset([str(tmp_path / "b")]))
    assert scan(tmp_path, rules=rules) == ({"a.jpg", "d/7.jpg"}, {str(tmp_path): {"forgotten": 3, "excluded": 3}})


def test_a_picture_in_a_forgotten_folder_is_included_with_the_folder_alone(tmp_path):
    """Even if the picture itself was forgotten before its folder."""
    write_files(tmp_path, "a/b.jpg", "a/c.jpg")
    rules = IgnoreRules(forgotten=frozenset([str(tmp_path / "a"), str(tmp_path / "a" / "b.jpg")]))
    for name in ("b.jpg", "c.jpg"):
        with expect_error("folder_forgotten", path=tmp_path / "a" / name, forgotten=tmp_path / "a"):
            rules.updated(include=[tmp_path / "a" / name])


def test_negated_patterns_are_refused():
    with expect_error("negated_pattern", pattern="!x"):
        IgnoreRules().updated(["!x"])
    assert IgnoreRules(("!x",)).updated(include=["!x"]) == IgnoreRules(), (
        "an index of an earlier version may contain a negated pattern"
    )
    assert IgnoreRules().updated([r"\!x"]).exclude == (r"\!x",)


def test_invalid_patterns_are_refused():
    for pattern in ("", " ", "# x", "/", "!"):
        with expect_error("bad_pattern", pattern=pattern):
            IgnoreRules().updated([pattern])
