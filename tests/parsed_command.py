"""A command line of `capivara` up to where its flags are taken."""

from collections.abc import Sequence
from unittest import mock

import click

from capivara_search.command import capivara
from capivara_search.messages import Messages


def parsed(argv: Sequence[str], language: str = "en") -> click.Context:
    """What click has made of it; nothing is run. Raises click.UsageError, or click.exceptions.Exit after `--help`."""
    found: list[click.Context] = []
    with (
        mock.patch.object(click.Command, "invoke", lambda self, ctx: found.append(ctx)),
        capivara.make_context("capivara", list(argv), obj=Messages(language)) as context,
    ):
        capivara.invoke(context)
    return found[-1]
