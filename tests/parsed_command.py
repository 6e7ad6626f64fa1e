"""Parse a command line of `capivara` without running the command."""

from collections.abc import Sequence
from unittest import mock

import click

from capivara_search.command import capivara
from capivara_search.messages import Messages


def parsed(argv: Sequence[str], language: str = "en") -> click.Context:
    """Return the context of the command that click would run, with the values of its flags.

    Raises:
        click.UsageError: If the command line is wrong.
        click.exceptions.Exit: After `--help`.
    """
    contexts: list[click.Context] = []
    with (
        mock.patch.object(click.Command, "invoke", lambda self, ctx: contexts.append(ctx)),
        capivara.make_context("capivara", list(argv), obj=Messages(language)) as context,
    ):
        capivara.invoke(context)
    return contexts[-1]
