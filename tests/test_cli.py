"""Every command answers `--help` and wrong flags before its heavy imports, and Ctrl-C in one line."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from pkgutil import resolve_name

import pytest

import common.cli

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
    "hub_upload.card": "--model m",
    "hub_upload.push": "--model . --repo_id a/b",
    "hub_upload.space": "--model m",
    "modeling_capivara.convert_open_clip": "s o",
    "training.interpolate": "a b --output o",
    "examples.openmoji.prepare": "",
    "examples.openmoji.captions": "",
    "examples.real_images": "--model m",
    "examples.fine_tune_classifier": "",
}
# Commands of people who only use a model, whose help is there in Portuguese, too, with their arguments.
IN_PORTUGUESE = {
    "hub_upload.space": "hub_upload.space.__main__:SpaceArguments",
    "eval.report": "eval.eval_arguments:ReportArguments",
    "examples.openmoji.prepare": "examples.example_arguments:PrepareArguments",
}
INTERRUPTED = ("train_accelerate.py", "captions.score", "modeling_capivara.convert_open_clip", "hub_upload.space")
INTERRUPTED += ("examples.real_images", "examples.fine_tune_classifier")


def words(command: str) -> list[str]:
    name = [str(ROOT / command)] if command.endswith(".py") else ["-m", command]
    return [sys.executable, "-X", "importtime", *name]


def answer(command: str, *flags: str) -> tuple[subprocess.CompletedProcess, set[str], str]:
    """The process, the packages that it imported, and what it said to stderr beside them."""
    done = subprocess.run([*words(command), *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    return done, imported, re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)


def test_no_documented_command_is_left_out():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    named = set(re.findall(r"python -m ((?:captions|eval|hub_upload|modeling_capivara|training)\.\w+)", "".join(texts)))
    assert named and named <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_before_the_heavy_imports(command):
    done, imported, said = answer(command, "--help")
    assert (done.returncode, said) == (0, "")
    called = command if command.endswith(".py") else f"python -m {command}"
    assert done.stdout.startswith(f"usage: {called} [-h]")
    assert "argparse" in imported and not imported & HEAVY


def help_in(locale: dict[str, str], command: str) -> str:
    """The help of a command in a locale, on lines of any length."""
    others = {key: value for key, value in os.environ.items() if key not in ("LC_ALL", "LC_MESSAGES", "LANG")}
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=others | locale | {"COLUMNS": "10000", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", IN_PORTUGUESE)
def test_help_is_portuguese_where_the_locale_is(command):
    module = command if command != "hub_upload.space" else "hub_upload.space.__main__"
    kind = resolve_name(IN_PORTUGUESE[command])
    portuguese, english = help_in({"LANG": "pt_BR.UTF-8"}, command), help_in({"LANG": "C"}, command)
    assert kind.help_pt[""].strip() in portuguese and "mostra esta ajuda" in portuguese
    assert resolve_name(module).__doc__.strip() in english and "show this help" in english
    for field in fields(kind):
        assert kind.help_pt[field.name] in portuguese and kind.help_pt[field.name] not in english
        assert field.metadata["help"] in english and field.metadata["help"] not in portuguese
    commands = [re.findall(r"^    (python -m [\w.]+)", text, re.MULTILINE) for text in (portuguese, english)]
    assert commands[0] == commands[1], "both show the same commands"


def test_the_first_locale_that_is_set_decides(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert not common.cli.locale_is_portuguese()
    monkeypatch.setenv("LANG", "pt_BR.UTF-8")
    assert common.cli.locale_is_portuguese()
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    assert not common.cli.locale_is_portuguese()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_told_in_one_line_before_the_heavy_imports(command):
    done, imported, said = answer(command, *COMMANDS[command].split(), "--no_such_flag", "1")
    assert done.returncode in (1, 2) and "no_such_flag" in said
    assert not imported & HEAVY
    assert said.count("\n") == 1 or said.startswith("usage:")


@pytest.mark.parametrize(
    ("command", "imported"),
    [(command, r"torch\._\w+") for command in INTERRUPTED] + [(command, "argparse") for command in COMMANDS],
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

    monkeypatch.setattr(common.cli, "bars_for_terminals_only", lambda: None)
    with pytest.raises(SystemExit) as ended:
        common.cli.run_command(main, resumes)
    assert ended.value.code == 130 and capsys.readouterr().err == f"\nStopped.{way}\n"


@dataclass
class Flags:
    """Arguments of no command."""

    names: list[str] = common.cli.flag(["a"], "Names.")
    steps: int | None = common.cli.flag(None, "Steps.")
    share: float = common.cli.flag(0.5, "Share.")

    def __post_init__(self) -> None:
        common.cli.at_least(self, 1, "steps")
        common.cli.between(self, 0, 1, "share")


def test_flags_config_and_rules_are_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("share: 1e-4\nsteps: 3\nnames: [x, y]\n", encoding="utf-8")
    read = lambda *words, **options: common.cli.parse(Flags, None, list(words), **options)  # noqa: E731
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
    @common.cli.user_errors
    def main(argv=None) -> None:
        raise error

    with pytest.raises(SystemExit, match=f"^error: {error}$"):
        main([])
