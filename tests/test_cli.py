"""Commands answer `--help` and wrong flags before their heavy imports, and Ctrl-C in one line."""

import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sampling import one_in

import capivara_common.cli

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "datasets", "accelerate", "pandas", "sklearn", "matplotlib", "gradio", "open_clip"}
# Every command that the documentation names, with flags that it takes.
COMMANDS = {
    "train_accelerate.py": "--model m --dataset d",
    "captions.build": "--config c.yaml",
    "captions.generate": "--dataset d --output o",
    "captions.translate": "--dataset d --output o --language pt",
    "captions.score": "--dataset d --output o --model m",
    "captions.select": "--dataset d --output o",
    "eval.retrieval": "--model m --dataset d --output o.json",
    "eval.classification": "--model m --benchmark cifar-10 --images i --output o.json",
    "eval.linear_probe": "--model m --benchmark cifar-10 --images i --output o.json",
    "eval.suite": "paper --model m",
    "eval.report": "results --output o",
    "hub_upload.export": "--model m --output o",
    "hub_upload.immich": "--check f",
    "hub_upload.card": "--model m",
    "hub_upload.push": "--model . --repo_id a/b",
    "hub_upload.space": "--model m --space s",
    "modeling_capivara.convert_open_clip": "s o",
    "modeling_capivara.trim_vocabulary": "m o --languages pt",
    "training.interpolate": "a b --output o",
    "training.rotate": "m --dataset d --dims 8 --output o",
    "examples.openmoji.prepare": "",
    "examples.openmoji.fit_miniature": "",
    "examples.openmoji.captions": "",
    "examples.openmoji.proxies": "",
    "examples.real_images": "--model m",
    "examples.fine_tune_classifier": "",
    "examples.exchange_text_side": "--text_side t",
    "examples.tune_sentence_transformers": "--model m --dataset d",
    "examples.caption": "",
    "examples.guide_generation": "--sentence s",
}
# Python imports the package before the module, and this one imports torch.
LATE = {name for name in COMMANDS if name.startswith("modeling_capivara.")}
INTERRUPTED = ("train_accelerate.py", "captions.score", "modeling_capivara.convert_open_clip")
INTERRUPTED += ("examples.real_images", "examples.fine_tune_classifier")


def words(command: str) -> list[str]:
    name = [str(ROOT / command)] if command.endswith(".py") else ["-m", command]
    return [sys.executable, "-X", "importtime", *name]


def answer(command: str, *flags: str, **options: Any) -> tuple[subprocess.CompletedProcess, set[str], str]:
    """The process, the packages that it imported, and what it said to stderr beside them."""
    done = subprocess.run([*words(command), *flags], cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    return done, imported, re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)


def test_no_documented_command_is_left_out():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    named = set(re.findall(r"python -m ((?:captions|eval|hub_upload|modeling_capivara|training)\.\w+)", "".join(texts)))
    assert named and named <= set(COMMANDS)


@pytest.mark.parametrize("command", one_in(5, COMMANDS))
def test_help_comes_before_the_heavy_imports(command):
    called = command if command.endswith(".py") else f"python -m {command}"
    done, imported, said = answer(command, "--help")
    assert (done.returncode, said) == (0, "") and done.stdout.startswith(f"usage: {called} [-h]")
    assert "argparse" in imported and (command in LATE or not imported & HEAVY)


def test_the_first_locale_that_is_set_decides(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert not capivara_common.cli.locale_is_portuguese()
    monkeypatch.setenv("LANG", "pt_BR.UTF-8")
    assert capivara_common.cli.locale_is_portuguese()
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    assert not capivara_common.cli.locale_is_portuguese()


@pytest.mark.parametrize("command", one_in(5, COMMANDS))
def test_a_wrong_flag_is_told_in_one_line_before_the_heavy_imports(command):
    done, imported, said = answer(command, *COMMANDS[command].split(), "--no_such_flag", "1")
    assert done.returncode == 2 and "no_such_flag" in said
    assert command in LATE or not imported & HEAVY
    assert said.count("\n") == 1 or said.startswith("usage:")


WRONG_USE = {  # of the command -> what it says
    "train_accelerate.py --dataset d": "`model` is missing",
    "train_accelerate.py --model m --dataset d --max_steps 0": "max_steps must be at least 1, got 0",
    "captions.select --dataset d --outptu o": "required: --output.*Unknown flag: `--outptu`. Did you mean `--output`?",
    "captions.generate --dataset d --shard 1/2": "required: --output.*`--shard` is gone: ",
    "eval.retrieval --model m --dataset d --output o.json --recall_at x": "--recall_at.*: invalid int value: 'x'",
    "hub_upload.push --model m --deadline_hours x": "--deadline_hours.*: invalid float value: 'x'",
    "hub_upload.card --model m --repo-idd a/b": "Unknown flag: `--repo-idd`. Did you mean `--repo_id`?",
}


@pytest.mark.parametrize("line", one_in(3, WRONG_USE))
def test_wrong_use_ends_with_2_and_names_all_of_it(line):
    done, _, said = answer(*line.split())
    assert done.returncode == 2 and re.search(WRONG_USE[line], said) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "imported"),
    one_in(9, [(command, r"torch\._\w+") for command in INTERRUPTED] + [(command, "argparse") for command in COMMANDS]),
)
def test_ctrl_c_during_the_imports_is_one_line(command, imported):
    """While torch is imported, and while the flags are not read yet."""
    process = subprocess.Popen(
        [*words(command), *COMMANDS[command].split()],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ""
    for line in process.stderr:
        if re.search(rf"\| +{imported}$", line):
            process.send_signal(signal.SIGINT)
            break
        said += line
    said += process.communicate(timeout=60)[1]
    said = re.sub(r"^import time:.*\n", "", said, flags=re.MULTILINE)
    assert process.returncode == 130
    assert said.strip().startswith("Stopped") and said.strip().count("\n") == 0


@pytest.mark.parametrize(("resumes", "way"), [(False, ""), (True, " Run the same command again to go on.")])
def test_only_a_command_that_goes_on_says_so(monkeypatch, capsys, resumes, way):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(capivara_common.cli, "prepare_bars", lambda: None)
    with pytest.raises(SystemExit) as ended:
        capivara_common.cli.run_command(main, resumes)
    assert ended.value.code == 130 and capsys.readouterr().err == f"\nStopped.{way}\n"


@pytest.mark.parametrize(("name", "hint"), [("--step", " Did you mean `--steps`?"), ("--zzz", "")])
def test_only_a_near_name_is_proposed(name, hint):
    with pytest.raises(ValueError, match=rf"^Unknown flag: `{name}`\.{re.escape(hint)} `--help` lists all\.$"):
        capivara_common.cli.parse(Flags, None, [name, "1"])


def test_null_is_no_number(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 3\n", encoding="utf-8")
    read = lambda *words: capivara_common.cli.parse(Flags, None, ["--config", str(config), *words], config=True)  # noqa: E731
    assert (read().steps, read("--steps", "null").steps) == (3, None)
    with pytest.raises(SystemExit):
        read("--steps", "nul")
    assert "invalid int value: 'nul'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read("--share", "null")  # which has a number


@dataclass
class Flags:
    """Arguments of no command."""

    names: list[str] = capivara_common.cli.flag(["a"], "Names.")
    steps: int | None = capivara_common.cli.flag(None, "Steps.")
    share: float = capivara_common.cli.flag(0.5, "Share.")

    def __post_init__(self) -> None:
        capivara_common.cli.at_least(self, 1, "steps")
        capivara_common.cli.between(self, 0, 1, "share")


def test_flags_config_and_rules_are_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("share: 1e-4\nsteps: 3\nnames: [x, y]\n", encoding="utf-8")
    read = lambda *words, **options: capivara_common.cli.parse(Flags, None, list(words), **options)  # noqa: E731
    first = read()
    first.names.append("b")
    assert (read().names, read().steps) == (["a"], None), "a default is shared by two command lines"
    found = read("--config", str(config), "--steps", "5", config=True)
    assert (found.names, found.steps, found.share) == (["x", "y"], 5, 1e-4), "flags win over the file"
    for words, message in (
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--share nan", "share must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*words.split())
    with pytest.raises(ValueError, match="Unknown flag: `--config`"):  # where none is taken
        read("--config", str(config))


@pytest.mark.parametrize("error", [ValueError("a value"), OSError("a file"), ImportError("a package")])
def test_errors_of_a_user_are_one_line(error):
    @capivara_common.cli.user_errors
    def main(argv=None) -> None:
        raise error

    with pytest.raises(SystemExit, match=f"^error: {error}$"):
        main([])
