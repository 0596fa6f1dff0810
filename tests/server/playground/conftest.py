"""The system's Chromium, and the checks that apply to every visit to the playground."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Response, expect, sync_playwright

from tests.needs import chromium, need
from tests.server.live import LIMIT_S, Live

# Chromium's threads and processes start slowly on a busy machine.
expect.set_options(timeout=LIMIT_S * 1000)
SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const { value, sources } of list.getEntries()) window.shifts.push([value, ...sources.map(({ node }) => node?.nodeName)]);
}).observe({ type: "layout-shift", buffered: true });
window.violations = [];
addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@dataclass
class Visit:
    """An open page, its requests, and the errors that it reported."""

    page: Page
    url: str
    allowed: tuple[int, ...] = ()
    """Statuses that the test expects. A browser logs each as an error on the console."""
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Record the page's requests and errors."""
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self._record(message))

    def _record(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(f"status of {status} " in message.text for status in self.allowed):
            self.faults.append(message.text)

    def bodies(self) -> list[dict[str, Any]]:
        """Return the bodies of all POST /generate requests."""
        return [request.post_data_json for request in self.requests if request.url.endswith("/generate")]

    def pick(self, *names: str) -> None:
        for name in names:
            self.page.get_by_role("checkbox", name=name, exact=True).check()

    def run(self) -> None:
        self.page.get_by_role("button", name="Run").click()

    def ask(self, **fields: str) -> None:
        """Fill the fields of these ids, run, and wait for the end of the answers."""
        for name, value in fields.items():
            self.page.locator(f"#{name}").fill(value)
        with self.page.expect_response(is_answer):
            self.run()
        self.wait()

    def look_again(self) -> None:
        """Signal that the tab is visible again, so that the page refreshes at once."""
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def wait(self) -> None:
        """Wait until nothing runs."""
        expect(self.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")

    def answer(self, side: str, part: str = "") -> Locator:
        """Return the last turn's answer of "mix" or "base", or the part of it that a selector matches."""
        return self.page.locator(f".turn:last-child .answer[data-side={side}] {part}").filter(visible=True)

    def text(self, side: str) -> str:
        """Return the text of the last turn's answer of "mix" or "base"."""
        text = self.answer(side, ".text").text_content()
        assert text is not None
        return text

    def figure(self, side: str, label: str) -> str:
        """Return the figure under `label` of the last turn's answer."""
        rows = self.answer(side, "dl > div")
        text = rows.filter(has=self.page.locator("dt", has_text=label)).last.locator("dd").text_content()
        assert text is not None
        return text


def overflows(box: Locator) -> bool:
    """Return whether a box holds more than it shows at once."""
    is_more: bool = box.evaluate("(element) => element.scrollHeight > element.clientHeight")
    return is_more


def is_answer(response: Response) -> bool:
    """Return whether `response` answers POST /generate."""
    return response.url.endswith("/generate")


class Visiting(Protocol):
    """A function that opens the page at `url` with the input `asks` chosen. Its requests and errors are checked at the end."""

    def __call__(self, url: str, allowed: tuple[int, ...] = (), asks: str = "prompt", **options: Any) -> Visit: ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield one browser for a file of tests. While it is open, no other event loop may run in this thread."""
    need("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visits_of(browser: Browser) -> Iterator[Visiting]:
    """Yield a function that opens pages. They are closed and checked when the block ends."""
    visits: list[Visit] = []

    def open_page(url: str, allowed: tuple[int, ...] = (), asks: str = "prompt", **options: Any) -> Visit:
        context = browser.new_context(**options)
        context.set_default_timeout(LIMIT_S * 1000)
        context.add_init_script(SHIFTS)
        visit = Visit(context.new_page(), url, allowed)
        visits.append(visit)
        visit.listen()
        visit.page.goto(url)
        # By script, since a mouse click would take the focus.
        visit.page.evaluate("asks => document.querySelector(`input[name=input][value=${asks}]`).click()", asks)
        return visit

    yield open_page
    for visit in visits:
        visit.page.context.close()
        assert [request.url for request in visit.requests if not request.url.startswith(visit.url)] == []
        assert visit.faults == []


@pytest.fixture
def visiting(browser: Browser) -> Iterator[Visiting]:
    with visits_of(browser) as open_page:
        yield open_page


@pytest.fixture
def visit(visiting: Visiting, live: Live) -> Visit:
    """Return a visit to the session's server."""
    return visiting(live.url)
