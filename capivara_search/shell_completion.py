"""Scripts that complete the flags and commands of `capivara` in a shell.

    eval "$(capivara completion bash)"

    from capivara_search.command_flags import parser
    from capivara_search.shell_completion import completion
    from capivara_search.terminal import Words

    print(completion(parser(Words("pt")), "fish"))

The scripts hold every name, so that the Tab key starts no Python. What is no flag is completed as a file.
"""

import argparse
import re
import shlex

from capivara_search.command_flags import COMMANDS, Parser

BASH = """\
_capivara() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} word command= words=
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case $word in {commands}) command=$word; break ;; esac
  done
  case "$before" in
{choices}
  esac
  if [[ -z $words && $current == -* ]]; then
    case "$command" in
{flags}
    esac
  elif [[ -z $words && -z $command ]]; then
    words={names}
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -o bashdefault -F _capivara capivara
"""
ZSH = """\
#compdef capivara
_capivara() {{
  local -a commands=({names})
  if (( CURRENT > 2 )); then
    case $words[2] in
{flags}
    esac
  fi
  _arguments -s {shared} '1: :{{_describe command commands}}' '*:file:_files'
}}
compdef _capivara capivara
"""


def completion(main: Parser, shell: str) -> str:
    """The script for a shell, bash, zsh or fish, with the texts of the parser's language."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](main)


def _names(command: str) -> tuple[str, str]:
    return command, COMMANDS[command]


def _flags(one: Parser) -> list[argparse.Action]:
    return [action for action in one._actions if action.option_strings]


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices or ()]


def _bash(main: Parser) -> str:
    choices: dict[str, list[str]] = {}
    flags = [f'      "") words={shlex.quote(" ".join(main.flags_of(None)))} ;;']
    for command, one in main.by_name.items():
        flags.append(f"      {'|'.join(_names(command))}) words={shlex.quote(' '.join(one.flags_of(command)))} ;;")
        for action in one._actions:
            if action.choices:  # of an argument, such as the shell: after the command's name
                choices |= dict.fromkeys(action.option_strings or _names(command), _choices(action))
    return BASH.format(
        commands="|".join(name for command in COMMANDS for name in _names(command)),
        names=shlex.quote(" ".join(name for command in COMMANDS for name in _names(command))),
        choices="\n".join(f"    {name}) words={shlex.quote(' '.join(some))} ;;" for name, some in choices.items()),
        flags="\n".join(flags),
    )


def _zsh(main: Parser) -> str:
    flags = []
    for command, one in main.by_name.items():
        specs = [_zsh_spec(action, name) for action in _flags(one) for name in action.option_strings]
        arguments = [_choices(action) for action in one._actions if action.choices and not action.option_strings]
        specs += [f"'1: :({' '.join(arguments[0])})'" if arguments else "'*:file:_files'"]
        names = "|".join(_names(command))
        flags.append(f"      {names}) shift words; (( CURRENT-- )); _arguments -s {' '.join(specs)}; return ;;")
    names = [f"{name}:{main.texts[command]}" for command in COMMANDS for name in _names(command)]
    return ZSH.format(
        names=" ".join(shlex.quote(name) for name in names),
        flags="\n".join(flags),
        shared=" ".join(_zsh_spec(action, name) for action in _flags(main) for name in action.option_strings),
    )


def _zsh_spec(action: argparse.Action, name: str) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", action.help)
    value = "" if action.nargs == 0 else f": :({' '.join(_choices(action))})" if action.choices else ":value:_files"
    return shlex.quote(f"{name}[{text}]{value}")


def _fish(main: Parser) -> str:
    every = " ".join(name for command in COMMANDS for name in _names(command))
    lines = []
    for command in COMMANDS:
        for name in _names(command):
            text = shlex.quote(main.texts[command])
            lines.append(f"complete -c capivara -f -n 'not __fish_seen_subcommand_from {every}' -a {name} -d {text}")
    for command, one in [(None, main), *main.by_name.items()]:
        seen = (
            f"__fish_seen_subcommand_from {' '.join(_names(command))}"
            if command
            else f"not __fish_seen_subcommand_from {every}"
        )
        for action in one._actions:
            if command and action.choices and not action.option_strings:
                lines.append(f"complete -c capivara -f -n '{seen}' -a {shlex.quote(' '.join(_choices(action)))}")
            if not action.option_strings:
                continue
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in action.option_strings)
            value = (
                ""
                if action.nargs == 0
                else f" -x -a {shlex.quote(' '.join(_choices(action)))}"
                if action.choices
                else " -r"
            )
            lines.append(f"complete -c capivara -n '{seen}' {names}{value} -d {shlex.quote(action.help)}")
    return "\n".join(lines) + "\n"
