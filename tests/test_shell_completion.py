"""Completion with the Tab key: every command and flag is offered, by click's completion scripts of the shells."""

import os
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete

from capivara_search.command import capivara, main
from capivara_search.messages import COMMAND_NAMES, Messages

COMPLETE = "_CAPIVARA_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


def completions(*words: str) -> set[str]:
    """Return the completions of the last word of a command line; "dir" and "file" stand for paths."""
    complete = BashComplete(capivara, {"obj": Messages("en")}, "capivara", COMPLETE)
    return {
        item.value if item.type == "plain" else item.type
        for item in complete.get_completions(list(words[:-1]), words[-1])
    }


def test_commands_flags_and_choices_are_offered():
    assert completions("") == {*COMMAND_NAMES, *COMMAND_NAMES.values()}
    assert completions("s") == {"search", "seguir", "status"}
    assert {"--lang", "--version"} <= completions("--")
    assert completions("buscar", "um", "gato", "--thr") == set()
    assert completions("duplicates", "--thr") == {"--threshold"}
    assert completions("--lang", "en", "search", "--s") == {"--since"}
    assert completions("search", "--relevance-threshold", "") == {"auto", "on", "off", "sim", "não"}
    assert completions("completar", "") == set(SHELLS)
    assert completions("index", "fo") == {"dir"} and completions("search", "--like", "x") == {"file"}


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_its_script(shell, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["completion", shell])
    assert caught.value.code == 0 and f"{COMPLETE}={shell}_complete" in capsys.readouterr().out


@pytest.mark.slow
def test_bash_completes_with_the_command(tmp_path):
    program = tmp_path / "capivara"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m capivara_search "$@"\n')
    program.chmod(0o755)
    script = 'eval "$(capivara completion bash)"; COMP_WORDS=(capivara buscar --sin); COMP_CWORD=2; '
    script += '_capivara_completion capivara; echo "${COMPREPLY[@]}"'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["--since"], done.stderr
