"""Run commands against the test server for the Hub, and check that they never print a token."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hub_server import READ_TOKEN, SIGNATURE, TOKEN, HubServer


@dataclass
class Done:
    """Result of a command: exit code, standard output and error, and the waits in seconds before its retries.

    The waits are only recorded, so that tests do not take this time.
    """

    code: int
    out: str
    err: str
    waits_s: list[float]


class HubCommands:
    """Process that runs `push_process.py`: it uses a test server as the Hub and runs commands one after another."""

    def __init__(self, hub: HubServer, home: Path):
        self.hub, self.home = hub, home
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("push_process.py"))],
            env={**os.environ, **hub.environment(home)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *argv, token: str | None = TOKEN, call: str = "hub_upload.push:main", **environment) -> Done:
        request = {"call": call, "argv": list(map(str, argv)), "environment": {"HF_TOKEN": token or "", **environment}}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        done = Done(**json.loads(self._process.stdout.readline()))
        for secret in (TOKEN, READ_TOKEN, SIGNATURE, token or TOKEN):
            assert secret not in done.out + done.err, "a secret was printed"
        return done

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextmanager
def hub_commands(folder: Path) -> Iterator[HubCommands]:
    """Start a test server and a process that runs commands against it, and stop both at the end of the block."""
    with HubServer(folder / "hub") as hub:
        commands = HubCommands(hub, folder / "home")
        try:
            yield commands
        finally:
            commands.close()
