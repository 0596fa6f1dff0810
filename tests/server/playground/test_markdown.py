"""Answers as Markdown: the supported elements, and that model output never becomes a program, a request or its own markup."""

from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.live import Live
from tests.server.playground.conftest import Visit, Visiting
from tests.server.playground.fake_api import done, token

RICH = """# Title

Some *emphasis*, **strength** and `code`,
on two lines.

3. three
4. four
   - deeper

> quoted

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<b>")
```

[a page](https://example.org/a?b=c&d=e) and <mailto:a@example.org>

---
"""
HOSTILE = """<script>window.hit = 1</script>

<img src="x" onerror="window.hit = 2"> <svg onload="window.hit = 3"></svg>

<iframe src="javascript:parent.hit = 4"></iframe>

[one](javascript:window.hit=5) [two](JaVaScRiPt:window.hit=6) [three](data:text/html,<script>window.hit=7</script>)
[four](vbscript:x) [five](/adapters) [six](//elsewhere.example/) [seven](&#106;avascript:window.hit=8) [eight](\tjavascript:hit)
<javascript:window.hit=9>

![a picture](http://elsewhere.example/p.png) ![another](x" onerror="window.hit=10)

<style>body { display: none }</style> <a href="javascript:window.hit=11">nine</a>

```<img/src/onerror=window.hit=12>
</code></pre><script>window.hit = 13</script>
```

| <img src=x onerror=window.hit=14> |
|---|
| <b onmouseover=window.hit=15>cell</b> |
"""


def answered(visiting: Visiting, live: Live, text: str, **options: Any) -> Visit:
    """Return a visit to a real server's page on which `text` was answered, in pieces."""
    visit = visiting(live.url, asks="messages", **options)
    pieces = [token(text[i : i + 7]) for i in range(0, len(text), 7)]
    body = b"".join([*pieces, done(len(pieces))])
    visit.page.route("**/generate", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    visit.ask(prompt="x")
    return visit


def test_an_answer_is_drawn_as_markdown(visiting: Visiting, live: Live) -> None:
    answer = answered(visiting, live, RICH).answer("base", ".said")
    expect(answer.locator("h4")).to_have_text("Title")
    expect(answer.locator("em")).to_have_text("emphasis")
    expect(answer.locator("strong")).to_have_text("strength")
    expect(answer.locator("p code")).to_have_text("code")
    expect(answer.locator("p").first.locator("br")).to_have_count(1)
    expect(answer.locator("ol")).to_have_attribute("start", "3")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol ul > li")).to_have_text("deeper")
    expect(answer.locator("blockquote")).to_have_text("quoted")
    expect(answer.locator("th")).to_have_text(["a", "b"])
    expect(answer.locator("td.right")).to_have_text("2")
    expect(answer.locator("pre code")).to_have_text('print("<b>")\n')
    expect(answer.locator("hr")).to_have_count(1)
    links = answer.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/a?b=c&d=e", "mailto:a@example.org"]
    for link in links.all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        assert link.get_attribute("target") == "_blank"


def test_a_product_keeps_its_asterisk(visiting: Visiting, live: Live) -> None:
    """Regression: 4*3 and 5*2 lost their asterisks, since Markdown took the text between them for emphasis."""
    visit = answered(visiting, live, "4*3 = 12 and 5*2 = 10, *really* **so**")
    expect(visit.answer("base", ".said p")).to_have_text("4*3 = 12 and 5*2 = 10, really so")
    expect(visit.answer("base", "em")).to_have_text("really")
    expect(visit.answer("base", "strong")).to_have_text("so")


def test_an_answer_can_be_shown_as_plain_text(visiting: Visiting, live: Live) -> None:
    visit = answered(visiting, live, RICH)
    visit.page.get_by_role("radio", name="Plain text").check()
    assert visit.text("base") == RICH
    visit.page.get_by_role("radio", name="Markdown").check()
    expect(visit.answer("base", "h4")).to_have_text("Title")
    # Each input remembers its own view: a text is shown as plain text by default.
    visit.page.get_by_role("radio", name="Text", exact=True).check()
    expect(visit.page.get_by_role("radio", name="Plain text")).to_be_checked()
    visit.page.get_by_role("radio", name="Conversation").check()
    expect(visit.page.get_by_role("radio", name="Markdown")).to_be_checked()


@pytest.mark.parametrize("view", ["Markdown", "Plain text"])
def test_hostile_model_output_has_no_effect(visiting: Visiting, live: Live, view: str) -> None:
    visit = answered(visiting, live, HOSTILE)
    page = visit.page
    page.get_by_role("radio", name=view).check()
    log = page.locator("#log")
    expect(log.locator("script, img, svg, iframe, style, object, embed, form, input, [src]")).to_have_count(0)
    expect(log.locator("a")).to_have_count(0)
    names = log.locator("*").evaluate_all("(all) => all.flatMap((element) => element.getAttributeNames())")
    assert [name for name in names if name.startswith("on")] == []
    for text in ("one", "five", "nine", "cell"):
        log.get_by_text(text).first.click()
    assert page.url == f"{live.url}/"
    assert page.evaluate("window.hit") is None
    assert page.evaluate("window.violations") == []
    assert "<script>window.hit = 1</script>" in visit.text("base")


def test_the_policy_lets_no_text_become_markup(visiting: Visiting, live: Live) -> None:
    """Check the browser's own protection, which holds whatever a later change of the page does."""
    visit = visiting(live.url)
    page = visit.page
    write = "() => { try { document.body.innerHTML = '<b></b>'; return ''; } catch (error) { return error.name; } }"
    assert page.evaluate(write) == "TypeError"
    assert page.evaluate("new Promise((done) => setTimeout(() => done(window.violations)))") == ["require-trusted-types-for"]
    visit.faults[:] = [fault for fault in visit.faults if "TrustedHTML" not in fault]
