"""The viewer of the API's description in a browser, with our corrections of its own style."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.live import Live
from tests.server.playground.conftest import visits_of

WIDTHS = [360, 1280]


@pytest.fixture(scope="module")
def docs(browser: Browser, live: Live) -> Iterator[Page]:
    with visits_of(browser) as open_page:
        page = open_page(live.url).page
        page.goto(f"{live.url}/docs")
        expect(page.locator(".opblock").first).to_be_visible()
        yield page


@pytest.mark.parametrize("width", WIDTHS)
def test_code_does_not_reach_into_the_next_line(docs: Page, width: int) -> None:
    docs.set_viewport_size({"width": width, "height": 800})
    code = docs.locator(".info li code")
    expect(code).not_to_have_count(0)
    too_tall = code.evaluate_all(
        "(all) => all.filter((code) => [...code.getClientRects()]"
        ".some((box) => box.height > parseFloat(getComputedStyle(code.parentElement).lineHeight)))"
        ".map((code) => code.textContent)"
    )
    assert too_tall == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_summary_has_room(docs: Page, width: int) -> None:
    docs.set_viewport_size({"width": width, "height": 800})
    assert docs.evaluate("document.documentElement.scrollWidth") <= width
    height = "(part) => part.getBoundingClientRect().height / parseFloat(getComputedStyle(part).fontSize)"
    for part in (".opblock-summary-description", ".opblock-tag small"):
        heights = docs.locator(part).evaluate_all(f"(all) => all.map({height})")
        assert heights
        assert max(heights) < 5


def test_a_route_can_be_tried(docs: Page) -> None:
    """Try a route under the page's own content security policy; the browser would report violations."""
    docs.set_viewport_size({"width": 1280, "height": 800})
    route = docs.locator(".opblock", has=docs.locator('[data-path="/health"]'))
    route.locator(".opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    expect(route.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
