"""Command lines: `--help`, one-line errors for wrong flags and values, YAML configs with flags, and Ctrl-C."""

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
# All commands that the documentation names.
COMMANDS = (
    *("train_accelerate.py", "training.interpolate", "training.rotate", "capivara_search.workers"),
    *(f"captions.{name}" for name in ("build", "generate", "translate", "score", "select")),
    *(f"eval.{name}" for name in ("retrieval", "classification", "linear_probe", "suite", "report")),
    *(f"hub_upload.{name}" for name in ("export", "card", "push", "space")),
    *(f"modeling_capivara.{name}" for name in ("convert_open_clip", "trim_vocabulary")),
    *(f"examples.openmoji.{name}" for name in ("prepare", "fit_miniature", "captions", "chat", "proxies")),
    *("examples.real_images", "examples.fine_tune_classifier", "examples.exchange_text_side", "examples.caption"),
    *("examples.tune_sentence_transformers", "examples.guide_generation"),
)


def main_of(command: str):
    """Import the module of a command and return its `main`."""
    name = command.removesuffix(".py")
    return import_module(name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else f"{name}.__main__").main


def test_all_documented_commands_are_tested():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    named = set(re.findall(r"python -m ((?:captions|eval|hub_upload|modeling_capivara|training)\.\w+)", "".join(texts)))
    assert named and named <= set(COMMANDS)


@pytest.mark.parametrize("command", one_in(5, COMMANDS))
def test_help_is_complete_and_an_unknown_flag_is_one_line(command, capsys):
    main = main_of(command)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    help_text = capsys.readouterr().out
    assert ended.value.code == 0 and help_text.startswith("usage: ") and "show this help message" in help_text
    assert "(default: None)" not in help_text
    with pytest.raises(capivara_common.cli.UsageError, match=r"^[^\n]*--no_such_flag[^\n]*$"):
        main(["--no_such_flag", "1"])


def test_help_lists_required_flags_first_and_cluster_flags_last(capsys):
    with pytest.raises(SystemExit):
        main_of("captions.select")(["--help"])
    help_text = capsys.readouterr().out.partition("\noptions:\n")[2]
    # Python 3.13 and newer write "--max_pixels, --max-pixels VALUE", older versions repeat the value after each name.
    positions = [
        re.search(rf"  --{name}[ ,]", help_text).start()
        for name in ("dataset", "output", "max_pixels", "tasks", "partition")
    ]
    assert positions == sorted(positions)
    assert help_text.index("\ntasks:\n") < positions[3] < help_text.index("\nSlurm and Ray clusters:\n") < positions[4]


WRONG_COMMANDS = {  # command -> pattern of the error
    "train_accelerate.py --model m --dataset d --max_steps 0": r"max_steps\b.*\b1\b.*\b0\b",
    "train_accelerate.py --model m --dataset d --towers both": "--towers",
    "captions.generate --dataset d --shard 1/2": "--shard",
    "examples.guide_generation --sentence a --steps 0": r"steps\b.*\b1\b.*\b0\b",
    "hub_upload.card --model m --repo-idd a/b": "--repo-idd.*--repo_id",
}


@pytest.mark.parametrize("line", one_in(3, WRONG_COMMANDS))
def test_a_wrong_command_line_exits_with_2_and_one_line(line, monkeypatch, capsys):
    command, *words = line.split()
    monkeypatch.setattr(sys, "argv", [command, *words])
    monkeypatch.setattr(capivara_common.cli, "configure_progress_bars", lambda: None)
    with pytest.raises(SystemExit) as ended:
        capivara_common.cli.run_command(main_of(command))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(WRONG_COMMANDS[line], message) and message.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "resumable", "code", "message"),
    [
        (KeyboardInterrupt(), False, 130, "\nStopped.\n"),
        (KeyboardInterrupt(), True, 130, "\nStopped. Run the same command again to go on.\n"),
        (ValueError("a value"), False, 1, "error: a value\n"),
        (ImportError("a package"), False, 1, "error: a package\n"),
        (capivara_common.cli.UsageError("a flag"), False, 2, "error: a flag\n"),
    ],
)
def test_user_errors_and_ctrl_c_are_one_line(monkeypatch, capsys, error, resumable, code, message):
    def main():
        raise error

    monkeypatch.setattr(capivara_common.cli, "configure_progress_bars", lambda: None)
    with pytest.raises(SystemExit) as ended:
        capivara_common.cli.run_command(main, resumable)
    assert ended.value.code == code and capsys.readouterr().err == message


@dataclass
class Flags:
    """Arguments for these tests."""

    names: list[str] = flag(["a"], "Names.")
    steps: int | None = flag(None, "Steps.")
    share: float = flag(0.5, "Share.")
    folder: Path | None = flag(None, "Folder.")
    sure: bool = flag(False, "A switch.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps")
        check_between(self, 0, 1, "share")


def read(*words: object, **options: bool) -> Flags:
    return parse_arguments(Flags, None, list(map(str, words)), **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps many", r"^[^\n]*--steps: [^\n]*'many'[^\n]*--help[^\n]*$"),
        ("--steps 0", r"^steps\b.*\b1\b.*\b0\b"),
        ("--share nan", r"^share\b.*\b0\b.*\b1\b.*\bnan\b"),
        ("3", r"--help"),
        ("--old-share=1", r"`--old-share`.*`--share`"),
    ],
)
def test_an_error_names_the_wrong_value_and_the_rule(words, message):
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


def test_null_means_none_only_if_none_is_the_default(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 3\nfolder: there\n", encoding="utf-8")
    assert read("--config", config, "--steps", "null", config=True) == Flags(steps=None, folder=Path("there"))
    with pytest.raises(ValueError, match=r"--share.*'null'"):
        read("--share", "null")  # its default is a number


def test_config_values_are_never_read_as_flags(tmp_path):
    config = tmp_path / "config.yaml"
    for text, pattern in (("share: -1e-3", r"^share\b.*-0\.001"), ("names: [x, --steps=7]", "names.*--steps=7")):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=pattern):
            read("--config", config, config=True)
    config.write_text(f"names: !!python/object/apply:os.mkdir ['{tmp_path}/made', '-1']\n", encoding="utf-8")
    assert read("--config", config, config=True).names == [f"{tmp_path}/made", "-1"]
    assert not (tmp_path / "made").exists(), "a config file must not create objects"


def test_flags_override_the_config_and_follow_the_same_rules(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("share: 1e-4\nsteps: 007\nnames: [x, no]\nsure: true\nfolder:\n", encoding="utf-8")
    first = read()
    first.names.append("b")
    assert (read().names, read().steps) == (["a"], None), "two command lines share a default list"
    flags = read("--config", config, "--steps", "5", config=True)
    assert flags == Flags(["x", "no"], 5, 1e-4, None, True), "flags override the file, and `no` in a list stays text"
    assert read("--config", config, config=True).steps == 7
    assert read("--config", config, "--sure", "no", config=True).sure is False
    with pytest.raises(ValueError, match="`--config`"):  # this command line takes no config
        read("--config", config)
    config.write_text("old_share: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(str(config))}.*`old_share`.*`share`"):
        read("--config", config, config=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads from /proc which libraries are loaded")
@pytest.mark.parametrize("words", [["-m", "eval.retrieval"], ["-m", "captions.score"], ["train_accelerate.py"]])
def test_ctrl_c_while_torch_is_imported_is_one_line(words):
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, *words, "--help"], cwd=root, stderr=subprocess.PIPE, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert (process.communicate()[1], process.returncode) == ("\nStopped.\n", 130)
