"""What the Tab key offers: every command and flag, in the shells themselves where they are installed."""

import shutil
import subprocess

import pytest

from capivara_search.command_flags import COMMANDS, SHELLS, parser
from capivara_search.shell_completion import completion
from capivara_search.terminal import Words

NAMES = [*COMMANDS, *COMMANDS.values()]


@pytest.fixture(scope="module")
def scripts() -> dict[tuple[str, str], str]:
    return {(shell, lang): completion(parser(Words(lang)), shell) for shell in SHELLS for lang in ("pt", "en")}


def offered(script: str, *words: str) -> set[str]:
    """What bash completes, with the last of `words` under the cursor."""
    typed = " ".join(f"'{word}'" for word in ("capivara", *words))
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _capivara; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.split())


def test_bash_offers_commands_flags_and_choices(scripts):
    script = scripts["bash", "en"]
    assert offered(script, "") == set(NAMES)
    assert offered(script, "s") == {"search", "status"}
    assert {"--lang", "--version"} <= offered(script, "--")
    assert offered(script, "buscar", "um", "gato", "--pict") == {"--pictures"}
    assert offered(script, "--lang", "en", "search", "--s") == {"--since"}
    assert offered(script, "index", "--executor", "") == {"local", "slurm", "ray"}
    assert offered(script, "completar", "") == set(SHELLS)
    assert offered(script, "index", "fo") == set(), "files are bash's own matter"


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_flag_is_in_every_script(scripts, shell):
    main = parser(Words("pt"))
    for lang in ("pt", "en"):
        script = scripts[shell, lang]
        assert not [name for name in NAMES if name not in script]
        flags = {flag for command in COMMANDS for flag in main.flags_of(command)}
        written = {f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in flags}
        assert not [flag for flag in (written if shell == "fish" else flags) if flag not in script]
    assert shell == "bash" or scripts[shell, "pt"] != scripts[shell, "en"], "zsh and fish show what a flag does"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_reads_the_script(scripts, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for lang in ("pt", "en"):
        path = tmp_path / f"{lang}.{shell}"
        path.write_text(scripts[shell, lang], encoding="utf-8")
        subprocess.run([shell, "-n", str(path)], check=True)
