"""Test of the browser helper: it records what a page must not do."""

import pytest
from browser import open_browser


@pytest.mark.slow
def test_the_browser_records_external_requests_errors_and_dialogs(tmp_path):
    page = "<img src='http://example.org/a.png'><script>alert(1); console.error('no'); throw Error('thrown')</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><div style='width: 3000px'>wide</div>{page}", encoding="utf-8")
    with open_browser() as opened:
        opened.open_file(tmp_path / "page.html")
        assert opened.refused == ["http://example.org/a.png"] and opened.dialogs == ["1"]
        assert "no" in opened.errors and "thrown" in opened.errors and opened.scrolls_sideways()
