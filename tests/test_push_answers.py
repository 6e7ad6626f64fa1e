"""Answers that are none of the Hub: the push ends in one line, and nothing is taken for success."""

import json
import re

import pytest
from hub_client import hub_commands
from hub_storage import Faults
from sampling import one_in
from test_push import CARD, weights

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
    "other types": (200, JSON, json.dumps(OTHER_TYPES).encode()),
    "not utf-8": (200, JSON, b"\xff\xfe{"),
    "too deep": (200, JSON, b"[" * 100_000),
    "elsewhere": (302, {"Location": "/login"}, b""),
}
FORM = "has answered in another form than the Hub does"
ANSWERS = [
    ("whoami", "null", FORM), ("whoami", "html", FORM), ("create", "other types", FORM), ("info", "list", FORM),
    ("info", "elsewhere", r"The Hub refused \(404\)|There is no"), ("refs", "list", FORM),
    ("tree", "other types", FORM), ("tree", "not utf-8", FORM),
    ("preupload", "null", FORM), ("preupload", "too deep", FORM),
    ("lfs_batch", "list", FORM), ("commit", "truncated", FORM), ("validate_yaml", "null", FORM),
]  # fmt: skip


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with hub_commands(tmp_path_factory.mktemp("answers")) as found:
        yield found


@pytest.mark.parametrize(("call", "answer", "message"), one_in(3, ANSWERS))
def test_what_is_no_answer_of_the_hub_is_one_line(commands, tmp_path, call, answer, message):
    hub = commands.hub
    hub.storage.repos.clear()
    for path in (hub.storage.folder / "lfs").iterdir():
        path.unlink()
    (tmp_path / "model.safetensors").write_bytes(weights(b"m", 3_000))
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    hub.faults = Faults(answers={call: BODIES[answer]})
    done = commands("--model", tmp_path, "--repo-id", "us/model", "--push")
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and len(lines) == 1 and done.err.rstrip().endswith(lines[0]), done.err
    assert "Traceback" not in done.err and re.search(message, lines[0]), lines
    assert not hub.storage.repos or not hub.commits("us/model")
