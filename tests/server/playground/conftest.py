"""A Chromium of the system, and what every visit to the playground must keep to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Response, expect, sync_playwright

from tests.needs import chromium, need
from tests.server.live import LIMIT_S, Live

# Its threads and processes start slowly on a busy machine.
expect.set_options(timeout=LIMIT_S * 1000)
SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shifts.push([entry.value, ...entry.sources.map((of) => of.node?.nodeName)]);
}).observe({ type: "layout-shift", buffered: true });
window.violations = [];
addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@dataclass
class Visit:
    """A page that is open, what it asked for, and what it complained of."""

    page: Page
    url: str
    allowed: tuple[int, ...] = ()
    """Statuses that are meant to come: a browser complains of each on the console."""
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Keeps what the page asks for and complains of."""
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: self._hear(message))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(f"status of {status} " in message.text for status in self.allowed):
            self.faults.append(message.text)

    def bodies(self) -> list[dict[str, Any]]:
        """Returns what POST /generate was sent."""
        return [request.post_data_json for request in self.requests if request.url.endswith("/generate")]

    def pick(self, *names: str) -> None:
        for name in names:
            self.page.get_by_role("checkbox", name=name, exact=True).check()

    def run(self) -> None:
        self.page.get_by_role("button", name="Run").click()

    def ask(self, **fields: str) -> None:
        """Writes in the fields of these ids and runs, and waits for the end."""
        for name, value in fields.items():
            self.page.locator(f"#{name}").fill(value)
        with self.page.expect_response(is_answer):
            self.run()
        self.wait()

    def look_again(self) -> None:
        """Comes back to the tab, so that the page asks at once."""
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def wait(self) -> None:
        """Waits until nothing runs."""
        expect(self.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")

    def answer(self, side: str, part: str = "") -> Locator:
        """Returns the last turn's answer of "mix" or "base", or the part of it that a selector says."""
        return self.page.locator(f".turn:last-child .answer[data-side={side}] {part}").filter(visible=True)

    def text(self, side: str) -> str:
        """Returns the text of the last turn's answer on that side."""
        text = self.answer(side, ".text").text_content()
        assert text is not None
        return text

    def figure(self, side: str, label: str) -> str:
        """Returns what is told of that answer under `label`."""
        rows = self.answer(side, "dl > div")
        text = rows.filter(has=self.page.locator("dt", has_text=label)).last.locator("dd").text_content()
        assert text is not None
        return text


def overflows(box: Locator) -> bool:
    """Whether a box holds more than it shows at once."""
    is_more: bool = box.evaluate("(of) => of.scrollHeight > of.clientHeight")
    return is_more


def is_answer(response: Response) -> bool:
    """Whether it is one of POST /generate."""
    return response.url.endswith("/generate")


class Visiting(Protocol):
    """Opens the page of `url`, with that input chosen; all that it asks for and complains of is checked when the test ends."""

    def __call__(self, url: str, allowed: tuple[int, ...] = (), asks: str = "prompt", **options: Any) -> Visit: ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a file of tests: while it is open nobody else may run an event loop in this thread."""
    need("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visits_of(browser: Browser) -> Iterator[Visiting]:
    """Opens pages, which are closed and checked when the block ends."""
    visits: list[Visit] = []

    def open_page(url: str, allowed: tuple[int, ...] = (), asks: str = "prompt", **options: Any) -> Visit:
        context = browser.new_context(**options)
        context.set_default_timeout(LIMIT_S * 1000)
        context.add_init_script(SHIFTS)
        visit = Visit(context.new_page(), url, allowed)
        visits.append(visit)
        visit.listen()
        visit.page.goto(url)
        # Not by mouse, which would take the focus.
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
    """A visit to the session's server."""
    return visiting(live.url)
