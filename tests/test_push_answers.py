"""Answers that are none of the Hub, or lead away from it, or come a letter at a time: one line, within the time."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_client import hub_commands
from hub_server import HubServer
from hub_storage import Faults
from sampling import one_in
from test_push import CARD, weights

ROOT = Path(__file__).resolve().parent.parent
JSON = {"Content-Type": "application/json"}
OTHER_TYPES = {
    "id": 3, "sha": [1], "siblings": "x", "branches": {"a": 1}, "tags": 7, "files": [3], "objects": [{"oid": 1}],
    "commitOid": {}, "commitUrl": 5, "name": ["x"], "url": 9, "private": "no", "pullRequests": 3, "errors": 4,
}  # fmt: skip
BODIES = {
    "html": (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"),
    "truncated": (200, JSON, b'{"sha": "ab'),
    "null": (200, JSON, b"null"),
    "list": (200, JSON, b"[3, null, {}]"),
    "number": (200, JSON, b"3"),
    "other types": (200, JSON, json.dumps(OTHER_TYPES).encode()),
    "not utf-8": (200, JSON, b"\xff\xfe{"),
    "too deep": (200, JSON, b"[" * 100_000),
    "nowhere": (302, {}, b""),
    "no address": (302, {"Location": "http://[::1"}, b""),
    "a file": (302, {"Location": "file:///etc/passwd"}, b""),
    **{f"{status} of the Hub": (status, {"Location": "/login"}, b"") for status in (301, 302, 307, 308)},
    **{f"{status} elsewhere": (status, {"Location": "{other}/api"}, b"") for status in (301, 302, 307, 308)},
}
FORM, LED = "has answered in another form than the Hub does", "is not followed"
ANSWERS = [
    ("whoami", "null", FORM), ("whoami", "html", FORM), ("create", "other types", FORM),
    ("create", "302 elsewhere", LED),
    ("info", "list", FORM), ("info", "307 elsewhere", LED), ("info", "301 of the Hub", r"The Hub refused \(404\)"),
    ("refs", "number", FORM), ("refs", "loop", "TooManyRedirects"), ("tree", "other types", FORM),
    ("tree", "not utf-8", FORM), ("preupload", "null", FORM), ("preupload", "too deep", FORM),
    ("lfs_batch", "list", FORM), ("lfs_put", "307 elsewhere", LED), ("lfs_put", "301 of the Hub", LED),
    ("commit", "truncated", FORM), ("commit", "307 elsewhere", LED), ("commit", "302 of the Hub", LED),
    ("validate_yaml", "null", FORM), ("create_branch", "html", "made no branch"), ("create_tag", "null", "no such tag"),
    ("create_tag", "308 elsewhere", "but the tag v1 was not made.*is not followed"), ("resolve", "a file", LED),
]  # fmt: skip
CALLS = sorted({call for call, *_ in ANSWERS} | {"lfs_verify", "commits"})


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with hub_commands(tmp_path_factory.mktemp("answers")) as found:
        yield found


@pytest.fixture
def push(commands, tmp_path):
    """A push in which one call is answered by something else."""
    folder, hub = tmp_path / "model", commands.hub
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights(b"m", 3_000))

    def run(call, answer, *flags):
        hub.faults = Faults()
        hub.storage.repos.clear()
        for path in (hub.storage.folder / "lfs").iterdir():
            path.unlink()
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        if call in ("create_branch", "create_tag", "resolve", "commits"):  # asked of a repository that there is
            assert commands("--model", folder, "--repo-id", "us/model", "--push").code == 0
            hub.faults.concurrent_commit = call == "commits" or None
        if call in ("resolve", "commits"):
            (folder / "README.md").write_text(f"{CARD}\nMore.\n", encoding="utf-8")
        flags += {"create_branch": ("--revision", "next"), "create_tag": ("--tag", "v1")}.get(call, ())
        status, headers, body = answer
        other = hub.url.replace("127.0.0.1", "localhost")
        headers = {name: value.replace("{other}", other) for name, value in headers.items()}
        hub.faults.answers = {call: (status, headers, body)}
        return commands("--model", folder, "--repo-id", "us/model", "--push", *flags)

    return run


@pytest.mark.parametrize(("call", "answer", "message"), one_in(3, ANSWERS))
def test_what_is_no_answer_of_the_hub_is_one_line(commands, push, call, answer, message):
    loop = (302, {"Location": "/api/models/us/model/refs"}, b"")
    done = push(call, loop if answer == "loop" else BODIES[answer])
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and len(lines) == 1 and done.err.rstrip().endswith(lines[0]), done.err
    assert "Traceback" not in done.err and re.search(message, lines[0]), lines
    if call not in ("create_branch", "create_tag", "resolve"):
        assert not commands.hub.storage.repos or not commands.hub.commits("us/model")


@pytest.mark.slow
def test_nothing_goes_to_another_host(commands, push):
    """307 and 308 would send the content of the files on."""
    with HubServer(Path(commands.home) / "other") as other:
        for call in ("commit", "preupload", "lfs_batch", "lfs_put", "info"):
            done = push(call, (307, {"Location": f"{other.url}/api/models/us/model"}, b""))
            assert done.code == 1 and "is not followed" in done.err
        assert other.requests == []


@pytest.mark.slow
def test_a_file_may_lie_in_another_store_which_gets_no_token(commands, push, tmp_path):
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "README.md").write_text("# Of the store\n", encoding="utf-8")
    with HubServer(tmp_path / "other") as other:
        other.store("us/model", tmp_path / "stored")
        other.users.clear()  # so that it refuses any token
        done = push("resolve", (302, {"Location": f"{other.url}/us/model/resolve/main/README.md"}, b""))
        assert done.code == 0 and "-# Of the store" in done.out, done.err
        assert other.requests == [("GET", "/us/model/resolve/main/README.md")]


@pytest.mark.slow
def test_no_answer_to_any_call_ends_in_a_traceback(push):
    for number, call in enumerate(CALLS):
        for name in list(BODIES)[number % 9 :: 9]:
            done = push(call, BODIES[name])
            assert done.code in (0, 1) and "Traceback" not in done.err, (call, name, done.err)
            assert done.code == 0 or done.err.rstrip().splitlines()[-1].startswith("error: "), (call, name, done.err)


@pytest.mark.slow
def test_a_server_that_answers_a_letter_at_a_time(commands, push):
    """Each letter comes within the limit of silence."""
    hub, started = commands.hub, time.perf_counter()
    status, headers, body = BODIES["null"]
    push("validate_yaml", (200, JSON, b'{"errors": [], "warnings": []}'))  # the repository is there, the folder, too
    for call in ("info", "commit"):
        hub.faults = Faults(answers={call: (status, headers, body)}, drip_s=0.05)
        folder = commands.home.parent / "slow"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(f"{CARD}\n{call}\n", encoding="utf-8")
        done = commands("--model", folder, "--repo-id", "us/model", "--push", "--deadline_hours", "0.0006")
        assert done.code == 1 and "error: The push has not ended in the time that it has (--deadline_hours" in done.err
        assert "Traceback" not in done.err
    assert time.perf_counter() - started < 20


@pytest.mark.slow
def test_a_program_that_waits_for_something_else_ends_itself():
    code = "import time, hub_upload.limits as limits; limits.GRACE_S = 0.3\n"
    code += "with limits.program_limit(0.0001): time.sleep(100)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and done.stderr.strip().startswith("error: The push has not ended in the time")


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "1001"])
def test_a_deadline_that_is_none(commands, tmp_path, hours):
    done = commands("--model", tmp_path, "--repo-id", "us/model", "--deadline_hours", hours)
    assert done.code == 1 and "deadline_hours must be above 0" in done.err
