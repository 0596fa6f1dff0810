"""DNS rebinding in a real browser: a web page whose own host name resolves to this machine."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.needs import chromium, need
from tests.server.live import Live

pytestmark = pytest.mark.browser

PAGE = "page.example"


@pytest.fixture(scope="module")
def rebound() -> Iterator[Browser]:
    """Yield a browser that resolves the page's name to this machine."""
    need("chromium")
    with sync_playwright() as playwright:
        rules = f"--host-resolver-rules=MAP {PAGE} 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.mark.parametrize(("name", "status"), [(PAGE, 421), ("localhost", 200), ("lori.localhost", 200), ("127.0.0.1", 200)])
def test_a_page_reads_nothing_under_its_own_name(rebound: Browser, live: Live, name: str, status: int) -> None:
    page = rebound.new_page()
    reply = page.goto(f"http://{name}:{live.port}/adapters")
    assert reply is not None
    assert reply.status == status
    assert ("math" in page.content()) is (status == 200)
    ask = "async (options) => (await fetch('/generate', options)).status"
    body = {"method": "POST", "headers": {"content-type": "application/json"}, "body": '{"prompt": "a", "max_tokens": 2}'}
    assert page.evaluate(ask, body) == status
    page.close()
