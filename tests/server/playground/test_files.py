"""The playground's files: their paths, and the headers that they are sent with."""

import hashlib
import mimetypes
import re

import pytest

from server.routes.playground import PLAYGROUND
from tests.server.live import Live
from tests.server.replies import refusal

STATIC = sorted(str(path.relative_to(PLAYGROUND / "static")) for path in (PLAYGROUND / "static").rglob("*") if path.is_file())
VENDOR = PLAYGROUND / "static" / "vendor"


def test_the_page_is_at_the_root(live: Live) -> None:
    reply = live.client.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.content == (PLAYGROUND / "index.html").read_bytes()
    assert live.client.head("/").headers["content-length"] == reply.headers["content-length"]


@pytest.mark.parametrize("name", STATIC)
def test_a_static_file_has_the_content_type_of_its_name(live: Live, name: str) -> None:
    reply = live.client.get(f"/static/{name}")
    assert reply.content == (PLAYGROUND / "static" / name).read_bytes()
    assert reply.headers["content-type"].partition(";")[0] == mimetypes.guess_type(name)[0]


def test_vendored_libraries_are_as_published_with_their_licences() -> None:
    noted: set[str] = set()
    for licence in VENDOR.glob("*.LICENSE.txt"):
        text = licence.read_text()
        assert "Permission is hereby granted, free of charge" in text
        for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.MULTILINE):
            assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
            noted.add(name)
    assert noted == {path.name for path in VENDOR.iterdir() if not path.name.endswith(".LICENSE.txt")}


@pytest.mark.parametrize("path", ["/", "/docs", "/static/main.js", "/static/style.css", "/static/vendor/uPlot.iife.min.js"])
def test_pages_load_nothing_external_and_types_are_not_sniffed(live: Live, path: str) -> None:
    headers = live.client.get(path).headers
    rules = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/static/main.js"])
def test_an_unchanged_file_is_not_sent_again(live: Live, path: str) -> None:
    first = live.client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = live.client.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/static/docs/swagger-ui.css"])
@pytest.mark.parametrize("asked", ["bytes=-", "bytes=9999999-", "lines=1-2", "bytes=0-9", "bytes=0-1,5-9"])
def test_range_requests_are_ignored(live: Live, path: str, asked: str) -> None:
    """Regression: invalid ranges were refused in another shape than that of errors."""
    reply = live.client.get(path, headers={"range": asked})
    assert (reply.status_code, reply.content) == (200, live.client.get(path).content)
    assert reply.headers["accept-ranges"] == "none"


@pytest.mark.parametrize("path", ["/static/", "/static/none.js", "/static/..%2findex.html", "/static/%00", "/index.html"])
def test_an_unknown_static_path_is_404(live: Live, path: str) -> None:
    refusal(live.client.get(path), 404)


@pytest.mark.parametrize("path", ["/", "/static/main.js"])
def test_the_files_are_read_only(live: Live, path: str) -> None:
    reply = live.client.post(path)
    refusal(reply, 405)
    assert {method.strip() for method in reply.headers["allow"].split(",")} == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/openapi.json", "/static/docs/swagger-ui.css"])
def test_no_reply_is_sniffed_for_another_type(live: Live, path: str) -> None:
    assert live.client.get(path).headers["x-content-type-options"] == "nosniff"


def test_the_viewer_has_no_inline_script(live: Live) -> None:
    reply = live.client.get("/docs")
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert not re.search("<script[^>]*>[^<]", reply.text)


def test_the_page_does_not_replace_the_api_s_description(live: Live) -> None:
    assert "swagger" in live.client.get("/docs").text
    assert "/" not in live.client.get("/openapi.json").json()["paths"]
