"""Mark the tests that CONTRIBUTING.md lists as expected failures; a listed test that passes counts as failed."""

import re
from pathlib import Path

import pytest

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
KNOWN_FAILURES = dict(re.findall(r"^\| `(\w+::\w+)` \| (.+) \|$", CONTRIBUTING.read_text(encoding="utf-8"), re.M))


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := KNOWN_FAILURES.get("::".join(item.nodeid.split("::")[-2:])):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
