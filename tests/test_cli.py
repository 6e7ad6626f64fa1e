"""Commands: `--help`, wrong flags and values in one line, YAML files with flags on top, and Ctrl-C."""

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from sampling import one_in

import capivara_common.cli
from capivara_common.cli import check_at_least, check_between, flag, parse_arguments

ROOT = Path(__file__).resolve().parent.parent
# Every command that the documentation names.
COMMANDS = (
    *("train_accelerate.py", "training.interpolate", "training.rotate", "capivara_search.workers"),
    *(f"captions.{name}" for name in ("build", "generate", "translate", "score", "select")),
    *(f"eval.{name}" for name in ("retrieval", "classification", "linear_probe", "suite", "report")),
    *(f"hub_upload.{name}" for name in ("export", "card", "push", "space")),
    *(f"modeling_capivara.{name}" for name in ("convert_open_clip", "trim_vocabulary")),
    *(f"examples.openmoji.{name}" for name in ("prepare", "fit_miniature", "captions", "proxies")),
    *("examples.real_images", "examples.fine_tune_classifier", "examples.exchange_text_side", "examples.caption"),
    *("examples.tune_sentence_transformers", "examples.guide_generation"),
)


def main_of(command: str):
    name = command.removesuffix(".py")
    return import_module(name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else f"{name}.__main__").main


def test_no_documented_command_is_left_out():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    named = set(re.findall(r"python -m ((?:captions|eval|hub_upload|modeling_capivara|training)\.\w+)", "".join(texts)))
    assert named and named <= set(COMMANDS)


@pytest.mark.parametrize("command", one_in(5, COMMANDS))
def test_help_says_what_a_command_does_and_a_wrong_flag_is_told_in_one_line(command, capsys):
    main = main_of(command)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith("usage: ") and "show this help message" in said
    assert "(default: None)" not in said
    with pytest.raises(capivara_common.cli.UsageError, match=r"^Unknown flag: `--no_such_flag`[^\n]*$"):
        main(["--no_such_flag", "1"])


WRONG_USE = {  # of the command -> what it says
    "train_accelerate.py --model m --dataset d --max_steps 0": "max_steps must be at least 1, got 0",
    "train_accelerate.py --model m --dataset d --towers both": "`--towers` is gone: the image tower is always frozen",
    "captions.generate --dataset d --shard 1/2": "`--shard` is gone: ",
    "hub_upload.push --model . --repo_id a/b --deadline_hours 1": "`--deadline_hours` is gone: a call ends after 300 s",
    "hub_upload.export --model m --output o --recall_split test": "`--recall_split` is gone: onnx/quantisation.json",
    "benchmarks.recipe --only paper": "`--only` is gone: three shares of the weights are measured, from one training",
    "examples.guide_generation --sentence a --steps 0": "steps must be at least 1, got 0",
    "hub_upload.card --model m --repo-idd a/b": "Unknown flag: `--repo-idd`. Did you mean `--repo_id`?",
}


@pytest.mark.parametrize("line", one_in(3, WRONG_USE))
def test_wrong_use_ends_with_2_in_one_line(line, monkeypatch, capsys):
    command, *words = line.split()
    monkeypatch.setattr(sys, "argv", [command, *words])
    monkeypatch.setattr(capivara_common.cli, "configure_progress_bars", lambda: None)
    with pytest.raises(SystemExit) as ended:
        capivara_common.cli.run_command(main_of(command))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(WRONG_USE[line], said) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "resumes", "code", "said"),
    [
        (KeyboardInterrupt(), False, 130, "\nStopped.\n"),
        (KeyboardInterrupt(), True, 130, "\nStopped. Run the same command again to go on.\n"),
        (ValueError("a value"), False, 1, "error: a value\n"),
        (ImportError("a package"), False, 1, "error: a package\n"),
        (capivara_common.cli.UsageError("a flag"), False, 2, "error: a flag\n"),
    ],
)
def test_errors_of_a_user_and_ctrl_c_are_one_line(monkeypatch, capsys, error, resumes, code, said):
    def main():
        raise error

    monkeypatch.setattr(capivara_common.cli, "configure_progress_bars", lambda: None)
    with pytest.raises(SystemExit) as ended:
        capivara_common.cli.run_command(main, resumes)
    assert ended.value.code == code and capsys.readouterr().err == said


@dataclass
class Flags:
    """Arguments of no command."""

    names: list[str] = flag(["a"], "Names.")
    steps: int | None = flag(None, "Steps.")
    share: float = flag(0.5, "Share.")
    folder: Path | None = flag(None, "Folder.")
    sure: bool = flag(False, "Whether it is so.")
    gone = {"old_share": "say --share"}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps")
        check_between(self, 0, 1, "share")


def read(*words: object, **options: bool) -> Flags:
    return parse_arguments(Flags, None, list(map(str, words)), **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps many", r"^argument --steps: invalid int value: 'many' \(--help lists all\)$"),
        ("--steps 0", r"^steps must be at least 1, got 0\.$"),
        ("--share nan", "share must be from 0 to 1"),
        ("3", r"^There is a value without a flag \(--help"),
        ("--old-share=1", r"^`--old-share` is gone: say --share\.$"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(words, message):
    with pytest.raises(ValueError, match=message):
        read(*words.split())


@pytest.mark.parametrize(
    "words", ["--token={}", "--token {}", "{}", "--sure {}", "--share {}", "--steps={}", "--folder {}"]
)
def test_no_message_shows_a_token(words, monkeypatch, capsys):
    token = "hf_" + "aB3" * 11

    def main() -> None:
        raise OSError(f"The model folder {parse_arguments(Flags, None, config=True).folder} does not exist.")

    monkeypatch.setattr(sys, "argv", ["command", *words.format(token).split()])
    with pytest.raises(SystemExit) as raised:
        capivara_common.cli.run_command(main)
    message = capsys.readouterr().err
    assert raised.value.code and "error: " in message and token not in message


def test_null_is_none_where_none_is_the_default(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 3\nfolder: there\n", encoding="utf-8")
    assert read("--config", config, "--steps", "null", config=True) == Flags(steps=None, folder=Path("there"))
    with pytest.raises(ValueError, match="invalid float value: 'null'"):
        read("--share", "null")  # which has a number


def test_values_of_a_config_are_no_flags(tmp_path):
    config = tmp_path / "config.yaml"
    for text, said in (
        ("share: -1e-3", r"^share must be from 0 to 1, got -0\.001\.$"),
        ("names: [x, --steps=7]", "be a flag"),
    ):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read("--config", config, config=True)
    config.write_text(f"names: !!python/object/apply:os.mkdir ['{tmp_path}/made', '-1']\n", encoding="utf-8")
    assert read("--config", config, config=True).names == [f"{tmp_path}/made", "-1"]
    assert not (tmp_path / "made").exists(), "a file makes no objects"


def test_flags_config_and_rules_are_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("share: 1e-4\nsteps: 007\nnames: [x, no]\nsure: true\nfolder:\n", encoding="utf-8")
    first = read()
    first.names.append("b")
    assert (read().names, read().steps) == (["a"], None), "a default is shared by two command lines"
    found = read("--config", config, "--steps", "5", config=True)
    assert found == Flags(["x", "no"], 5, 1e-4, None, True), "flags win over the file, and words stay words"
    assert read("--config", config, config=True).steps == 7
    assert read("--config", config, "--sure", "no", config=True).sure is False
    with pytest.raises(ValueError, match="Unknown flag: `--config`"):  # where none is taken
        read("--config", config)
    config.write_text("old_share: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(config))}: `old_share` is gone: say --share\.$"):
        read("--config", config, config=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is loaded")
@pytest.mark.parametrize("words", [["-m", "eval.retrieval"], ["-m", "captions.score"], ["train_accelerate.py"]])
def test_ctrl_c_while_torch_is_imported_is_one_line(words):
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, *words, "--help"], cwd=root, stderr=subprocess.PIPE, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert (process.communicate()[1], process.returncode) == ("\nStopped.\n", 130)
