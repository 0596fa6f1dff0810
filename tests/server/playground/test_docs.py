"""The viewer of the API's description in a browser: its own style leaves some things to mend."""

import pytest
from playwright.sync_api import Page, expect

from tests.server.live import Live
from tests.server.playground.conftest import Visiting

WIDTHS = [360, 1280]


def open_docs(visiting: Visiting, live: Live, width: int) -> Page:
    visit = visiting(live.url, viewport={"width": width, "height": 800})
    visit.page.goto(f"{live.url}/docs")
    expect(visit.page.locator(".opblock").first).to_be_visible()
    return visit.page


@pytest.mark.parametrize("width", WIDTHS)
def test_code_does_not_reach_into_the_next_line(visiting: Visiting, live: Live, width: int) -> None:
    code = open_docs(visiting, live, width).locator(".info li code")
    expect(code).not_to_have_count(0)
    too_tall = code.evaluate_all(
        "(all) => all.filter((of) => [...of.getClientRects()]"
        ".some((box) => box.height > parseFloat(getComputedStyle(of.parentElement).lineHeight))).map((of) => of.textContent)"
    )
    assert too_tall == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_summary_has_room(visiting: Visiting, live: Live, width: int) -> None:
    page = open_docs(visiting, live, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in (".opblock-summary-description", ".opblock-tag small"):
        for box in page.locator(part).all():
            assert box.evaluate("(of) => of.getBoundingClientRect().height / parseFloat(getComputedStyle(of).fontSize)") < 5


def test_a_route_can_be_tried(visiting: Visiting, live: Live) -> None:
    """Under the page's own policy, whose breaches the browser would tell of."""
    page = open_docs(visiting, live, 1280)
    route = page.locator(".opblock", has=page.locator('[data-path="/health"]'))
    route.locator(".opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    expect(route.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
