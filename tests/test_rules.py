"""What rules leave out of folders, and what is counted; how folders are looked through is in test_picture_files.py."""

import subprocess
from pathlib import Path

import pytest

from capivara_search.picture_files import IgnoreRules, find_pictures

PATTERNS = ("*.gif", "/so aqui/", "rascunhos/", "**/cache/*.png", "a/b*", "!a/bom.jpg", "a/**/z.jpg", r"\#x.jpg")
NAMES = (
    *("a.gif", "a.jpg", "so aqui/a.jpg", "a/so aqui/a.jpg", "rascunhos/a.jpg", "a/rascunhos/a.jpg", "a/cache/a.png"),
    *("a/cache/a.jpg", "a/bola.jpg", "a/bom.jpg", "b/bom.jpg", "a/b/bom.jpg", "a/c/d/z.jpg", "#x.jpg", "x.GIF"),
)


def made(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def found(folder: Path, *roots: Path, rules: IgnoreRules | None = None) -> tuple[set[str], dict[str, dict[str, int]]]:
    """Names below a folder of the pictures in it, or in roots, and what was left out of each."""
    counts = {}
    files, _ = find_pictures(roots or [folder], rules, counts)
    return {str(Path(file.path).relative_to(folder)) for file in files}, counts


def test_patterns_leave_out_what_git_ignores(tmp_path):
    made(tmp_path, *NAMES)
    git = ["git", "-C", str(tmp_path), "-c", "core.quotePath=false", "-c", "core.excludesFile=/dev/null"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / ".gitignore").write_text("\n".join(PATTERNS), encoding="utf-8")
    listed = subprocess.run([*git, "ls-files", "-o", "--exclude-standard"], capture_output=True, text=True, check=True)
    expected = {name for name in listed.stdout.splitlines() if name != ".gitignore"}
    names, counts = found(tmp_path, rules=IgnoreRules(PATTERNS))
    assert names == expected and 5 < len(expected) < len(NAMES) - 5
    assert counts[str(tmp_path)]["excluded"] > 5


def test_what_is_left_out_from_the_start_is_counted_by_folder(tmp_path):
    fotos, outras = tmp_path / "fotos", tmp_path / "outras"
    made(fotos, "a.jpg", ".hidden.jpg", ".notes", ".thumbnails/x.jpg", "@eaDir/a.jpg", "node_modules/x/y.png", "b.txt")
    made(fotos, "filme.mp4", "2024/filme.MOV", ".x/filme.mp4")
    made(outras, "a.jpg", "b/.c/x.jpg", "b/filme.webm")
    names, counts = found(tmp_path, fotos, outras)
    assert names == {"fotos/a.jpg", "outras/a.jpg"}
    assert counts == {str(fotos): {"hidden": 3, "system": 2, "video": 2}, str(outras): {"hidden": 1, "video": 1}}


def test_what_is_forgotten_stays_out_until_it_or_what_holds_it_is_included(tmp_path):
    made(tmp_path, "a/b/c.jpg", "a/b/d.jpg", "a/e.jpg", "f.jpg", "g.jpg")
    rules = IgnoreRules(
        forgotten=frozenset(str(tmp_path / name) for name in ("a/b/c.jpg", "a/e.jpg", "f.jpg", "gone.jpg"))
    )
    assert found(tmp_path, rules=rules) == ({"a/b/d.jpg", "g.jpg"}, {str(tmp_path): {"forgotten": 3}})
    back = {"a/b/c.jpg", "a/b/d.jpg", "a/e.jpg", "g.jpg"}
    assert found(tmp_path, rules=rules.changed(include=[tmp_path / "a"]))[0] == back
    folder = IgnoreRules(forgotten=frozenset([str(tmp_path / "a")]))
    with pytest.raises(ValueError, match=f"a/b stays out, since {tmp_path}/a was .* --include {tmp_path}/a$"):
        folder.changed(include=[tmp_path / "a" / "b"])
    with pytest.raises(ValueError, match="is no pattern of this index, nor was it forgotten; capivara status --all"):
        folder.changed(include=["*.gif"])
    assert folder.changed(["*.gif"]).changed(["x/"], ["*.gif", tmp_path / "a"]) == IgnoreRules(("x/",))


def test_no_link_leads_to_what_was_forgotten_or_out_of_the_folder(tmp_path):
    fotos, home = tmp_path / "disk" / "fotos", tmp_path / "home"
    made(fotos, "a.jpg", "privado/b.jpg", "privado/c/d.jpg", "e.jpg")
    home.symlink_to(fotos)
    for name, target in (("l1", "privado"), ("l2", "privado/c"), ("l3.jpg", "privado/b.jpg"), ("l4.jpg", "e.jpg")):
        (fotos / name).symlink_to(fotos / target)
    rules = IgnoreRules(forgotten=frozenset([str(home / "privado"), str(home / "l4.jpg")]))
    assert found(home, rules=rules)[0] == {"a.jpg", "e.jpg"}, "a forgotten link takes nothing else with it"
    for root in (home / "privado", fotos / "privado", fotos / "privado" / "c"):
        with pytest.raises(ValueError, match=f"--include {home}/privado$"):  # as the index has it
            find_pictures([root, home], rules)


def test_what_is_forgotten_or_excluded_is_counted_in_pictures(tmp_path):
    """Whether a rule names a folder, the folders in it or its pictures; what is left out anyway is not counted."""
    made(tmp_path, "a.jpg", "b/1.jpg", "b/2.png", "b/c/3.jpg", "b/notes.txt", "b/.x/4.jpg", "b/@eaDir/5.jpg", "d/6.gif")
    made(tmp_path, "d/7.jpg", "e/f/8.jpg", "e/f/9.jpg", "empty/notes.txt")
    (tmp_path / "b" / "link.jpg").symlink_to(tmp_path / "a.jpg")
    rules = IgnoreRules(("*.gif", "f/", "empty/"), frozenset([str(tmp_path / "b")]))
    assert found(tmp_path, rules=rules) == ({"a.jpg", "d/7.jpg"}, {str(tmp_path): {"forgotten": 3, "excluded": 3}})


def test_a_picture_in_a_forgotten_folder_is_included_with_the_folder_alone(tmp_path):
    """Also a picture that was forgotten itself, before its folder was."""
    made(tmp_path, "a/b.jpg", "a/c.jpg")
    rules = IgnoreRules(forgotten=frozenset([str(tmp_path / "a"), str(tmp_path / "a" / "b.jpg")]))
    for name in ("b.jpg", "c.jpg"):
        with pytest.raises(ValueError, match=f"--include {tmp_path}/a$") as refused:
            rules.changed(include=[tmp_path / "a" / name])
        assert refused.value.code == "folder_forgotten"


def test_a_pattern_that_leaves_nothing_out_is_refused():
    with pytest.raises(ValueError) as refused:
        IgnoreRules().changed(["!x"])
    assert (refused.value.code, refused.value.values) == ("negated_pattern", {"pattern": "!x"})
    assert IgnoreRules(("!x",)).changed(include=["!x"]) == IgnoreRules(), "an index may have one of before"
    assert IgnoreRules().changed([r"\!x"]).exclude == (r"\!x",)


def test_what_is_no_pattern_is_refused():
    for pattern in ("", " ", "# x", "/", "!"):
        with pytest.raises(ValueError, match=r"is no pattern of a \.gitignore\. Write one such as"):
            IgnoreRules().changed([pattern])
