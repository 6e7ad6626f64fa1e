"""What the Tab key offers: every command and flag, by click's own completion of the shells."""

import os
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete

from capivara_search.command import capivara, main
from capivara_search.messages import COMMAND_NAMES, Messages

COMPLETE = "_CAPIVARA_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


def offered(*words: str) -> set[str]:
    """What fits the last of some words."""
    complete = BashComplete(capivara, {"obj": Messages("en")}, "capivara", COMPLETE)
    return {
        item.value if item.type == "plain" else item.type
        for item in complete.get_completions(list(words[:-1]), words[-1])
    }


def test_commands_flags_and_choices_are_offered():
    assert offered("") == {*COMMAND_NAMES, *COMMAND_NAMES.values()}
    assert offered("s") == {"search", "seguir", "status"}
    assert {"--lang", "--version"} <= offered("--")
    assert offered("buscar", "um", "gato", "--thr") == set() and offered("duplicates", "--thr") == {"--threshold"}
    assert offered("--lang", "en", "search", "--s") == {"--since"}
    assert offered("search", "--line", "") == {"auto", "yes", "no"}
    assert offered("completar", "") == set(SHELLS)
    assert offered("index", "fo") == {"dir"} and offered("search", "--like", "x") == {"file"}


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_its_script(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert ended.value.code == 0 and f"{COMPLETE}={shell}_complete" in capsys.readouterr().out


def test_bash_asks_the_command(tmp_path):
    program = tmp_path / "capivara"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m capivara_search "$@"\n')
    program.chmod(0o755)
    ask = 'eval "$(capivara completion bash)"; COMP_WORDS=(capivara buscar --sin); COMP_CWORD=2; '
    ask += '_capivara_completion capivara; echo "${COMPREPLY[@]}"'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["--since"], done.stderr
