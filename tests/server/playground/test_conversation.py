"""A conversation in the playground, on a real server: the messages sent, the names over the answers, and their visibility."""

import json
import string
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.live import Live
from tests.server.playground.conftest import Visit, Visiting, overflows
from tests.server.playground.fake_api import FakeApi, done, served, token

SIZES = [{"width": 1366, "height": 768}, {"width": 1920, "height": 1080}, {"width": 390, "height": 844}]
# The corners of an element's box that are not visible: outside of the window, or covered by something else.
COVERED = """
(element) => {
  const { left, right, top, bottom } = element.getBoundingClientRect();
  return [[left + 9, top + 3], [right - 9, top + 3], [left + 9, bottom - 3], [right - 9, bottom - 3]].filter(
    ([x, y]) => !element.contains(document.elementFromPoint(x, y)),
  );
}
"""


def message(role: str, content: str) -> dict[str, str]:
    """Return a chat message."""
    return {"role": role, "content": content}


def begin(visiting: Visiting, url: str, view: str = "Plain text", **options: Any) -> Visit:
    """Return a visit that begins a conversation, in the template that all adapters and the base have in common."""
    visit = visiting(url, asks="messages", **options)
    visit.page.get_by_role("combobox", name="Template").select_option("plain")
    visit.page.get_by_role("radio", name=view).check()
    return visit


@pytest.fixture
def fake() -> FakeApi:
    return FakeApi()


@pytest.fixture
def url(fake: FakeApi) -> Iterator[str]:
    """Yield the URL of the fake, which sends answers in larger pieces. It must start before any page opens, and outlive it."""
    with served(fake) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture
def talk(visiting: Visiting, live: Live) -> Visit:
    return begin(visiting, live.url)


def test_each_turn_sends_the_earlier_turns_and_names_its_adapters(talk: Visit, live: Live) -> None:
    page = talk.page
    talk.pick("math")
    talk.ask(prompt="one", max_tokens="12")
    first = {side: talk.text(side) for side in ("mix", "base")}
    page.get_by_role("checkbox", name="math").uncheck()
    talk.pick("safety")
    talk.ask(prompt="two")
    second = {side: talk.text(side) for side in ("mix", "base")}
    talk.pick("math")
    page.get_by_role("spinbutton", name="Exact weight of safety").fill("0.75")
    talk.ask(prompt="three")

    assert [body.get("adapter") for body in talk.bodies()] == ["math", None, "safety", None, ["safety", "math"], None]
    *_, mixed, base = talk.bodies()
    for side, body in (("mix", mixed), ("base", base)):
        assert body["messages"] == [
            message("user", "one"), message("assistant", first[side]), message("user", "two"), message("assistant", second[side]),
            message("user", "three"),
        ]  # fmt: skip
        assert talk.text(side) == live.generate(**{**body, "stream": False})["text"]
    expect(page.locator(".turn h3")).to_have_text(
        [
            f"Answer {number}: {name}"
            for number, mix in enumerate(("1.00 math", "1.00 safety", "0.75 safety + 0.50 math"), 1)
            for name in (mix, "Base model")
        ]
    )
    expect(page.locator(".message")).to_have_text(["one", "two", "three"])
    expect(page.locator("#prompt")).to_have_value("")


def test_a_merge_that_is_no_sum_is_named(talk: Visit) -> None:
    talk.pick("math", "safety")
    talk.page.get_by_role("combobox", name="Merge").select_option("ties")
    talk.ask(prompt="one", max_tokens="4")
    expect(talk.answer("mix", "h3")).to_have_text("Answer 1: ties of 0.50 math + 0.50 safety")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['width']}x{size['height']}")
def test_the_answer_is_in_sight(visiting: Visiting, live: Live, size: Any) -> None:
    visit = begin(visiting, live.url, view="Markdown", viewport=size, reduced_motion="reduce")
    visit.pick("math")
    # On the first turn there is little to scroll. A long answer ends no lower than a short one.
    for prompt, num_tokens in (("one", "20"), ("two", "600"), ("three", "20")):
        visit.ask(prompt=prompt, max_tokens=num_tokens)
        for part in (".answer[data-side=mix] .text", ".answer[data-side=base] .text"):
            box = visit.page.locator(f".turn:last-child {part}")
            expect(box).to_be_in_viewport(ratio=1)
            assert box.evaluate(COVERED) == []
        expect(visit.page.locator("#run")).to_be_in_viewport(ratio=1)
        if size["width"] > 1000:
            assert visit.page.evaluate("scrollY") == 0
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= size["width"]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['width']}x{size['height']}")
@pytest.mark.parametrize("view", ["Markdown", "Plain text"])
def test_nothing_shifts_while_a_later_turn_comes(url: str, fake: FakeApi, visiting: Visiting, size: Any, view: str) -> None:
    visit = begin(visiting, url, view=view, viewport=size, reduced_motion="reduce")
    page = visit.page
    visit.pick("math")
    text = "".join(Random(0).choices(string.printable[:95] + "\n", k=3000))
    fake.stream = [token(text[:200]), done(200)]
    visit.ask(prompt="one")
    visit.ask(prompt="two")
    fake.stream = [*(token(text[i : i + 10]) for i in range(0, len(text), 10)), done(3000)]
    fake.may_go_on.clear()
    page.locator("#prompt").fill("three")
    page.evaluate("document.getElementById('ask').requestSubmit()")
    expect(visit.answer("mix", "h3")).to_have_text("Answer 3: 1.00 math")
    # A browser ignores shifts for half a second after user input. The shift at the beginning of a turn is intended.
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    page.evaluate("window.shifts.length = 0")
    expect(page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "false")
    fake.may_go_on.set()
    visit.wait()
    assert visit.figure("mix", "Tokens").endswith(", 3,000 out")
    assert overflows(visit.answer("mix", ".text"))
    assert page.evaluate("window.shifts") == []


def test_a_new_conversation_knows_nothing_of_the_last(talk: Visit) -> None:
    talk.ask(prompt="one", max_tokens="4")
    talk.ask(prompt="two")
    talk.page.get_by_role("button", name="New conversation").click()
    expect(talk.page.locator(".turn")).to_have_count(0)
    expect(talk.page.locator("#prompt")).to_be_focused()
    expect(talk.page.locator("#say")).to_have_text("A new conversation.")
    talk.ask(prompt="three")
    assert talk.bodies()[-1]["messages"] == [message("user", "three")]
    expect(talk.answer("base", "h3")).to_have_text("Answer 1: Base model")


def test_a_text_stands_alone_and_the_conversation_goes_on_after_it(talk: Visit) -> None:
    talk.ask(prompt="one", max_tokens="4")
    first = talk.text("base")
    talk.page.get_by_role("radio", name="Text", exact=True).check()
    expect(talk.page.get_by_label("System message")).to_be_hidden()
    talk.ask(prompt="alone")
    assert talk.bodies()[-1] == {"prompt": "alone", "max_tokens": 4, "stream": True}
    expect(talk.page.locator("#prompt")).to_have_value("alone")
    talk.page.get_by_role("radio", name="Conversation").check()
    expect(talk.page.locator(".message").filter(visible=True)).to_have_text("one")
    talk.ask(prompt="two")
    assert talk.bodies()[-1]["messages"] == [message("user", "one"), message("assistant", first), message("user", "two")]


def test_editing_a_message_discards_the_later_ones(talk: Visit) -> None:
    for text in ("one", "two", "three"):
        talk.ask(prompt=text, max_tokens="4")
    talk.page.get_by_role("button", name="Edit message 2").click()
    expect(talk.page.locator("#prompt")).to_have_value("two")
    expect(talk.page.locator("#prompt")).to_be_focused()
    expect(talk.page.locator(".message")).to_have_text(["one"])
    talk.ask(prompt="other")
    assert [turn["content"] for turn in talk.bodies()[-1]["messages"][::2]] == ["one", "other"]


def test_a_turn_that_failed_is_not_sent_on_and_can_be_sent_again(visiting: Visiting, live: Live) -> None:
    visit = begin(visiting, live.url, allowed=(400,))
    visit.ask(prompt="one", max_tokens="4")
    visit.ask(prompt="two", max_tokens="1000000")
    expect(visit.answer("base", ".end dd")).to_have_text("failed")
    expect(visit.page.locator("#prompt")).to_have_value("two")
    visit.ask(max_tokens="4")
    assert [turn["content"] for turn in visit.bodies()[-1]["messages"][::2]] == ["one", "two"]
    expect(visit.page.locator(".message")).to_have_text(["one", "two"])


def test_a_side_that_failed_goes_on_from_the_other_sides_answer(visiting: Visiting, live: Live) -> None:
    visit = begin(visiting, live.url, allowed=(400,))
    visit.pick("math")
    exact = visit.page.get_by_role("spinbutton", name="Exact weight of math")
    exact.fill("17")
    visit.ask(prompt="one", max_tokens="4")
    first = visit.text("base")
    exact.fill("1")
    visit.ask(prompt="two")
    mixed, base = visit.bodies()[-2:]
    assert mixed["messages"] == base["messages"] == [message("user", "one"), message("assistant", first), message("user", "two")]


def test_an_empty_message_is_not_sent(talk: Visit) -> None:
    talk.page.locator("#prompt").fill("")
    talk.run()
    expect(talk.page.locator("#prompt")).to_have_attribute("aria-invalid", "true")
    expect(talk.page.locator("#ask .fault:visible")).to_have_text("The message is empty.")
    assert talk.bodies() == []


def test_a_system_message_comes_first(talk: Visit) -> None:
    talk.page.get_by_label("System message").fill("Be brief.")
    talk.ask(prompt="one", max_tokens="4")
    assert talk.bodies() == [
        {
            "messages": [message("system", "Be brief."), message("user", "one")],
            "template": "plain",
            "max_tokens": 4,
            "stream": True,
        }
    ]


def test_the_last_request_is_copied_if_nothing_new_is_written(visiting: Visiting, live: Live) -> None:
    visit = begin(visiting, live.url, permissions=["clipboard-read", "clipboard-write"])
    visit.ask(prompt="one", max_tokens="4")
    visit.ask(prompt="two")
    asked = visit.bodies()[-1]["messages"]
    answer = visit.text("base")

    def copied() -> Any:
        visit.page.locator("#say").evaluate("(element) => { element.textContent = ''; }")
        visit.page.get_by_role("button", name="Copy as curl").click()
        expect(visit.page.locator("#say")).to_have_text("Copied.")
        command = visit.page.evaluate("navigator.clipboard.readText()")
        return json.loads(command.rpartition("-d ")[2].strip("'"))["messages"]

    assert copied() == asked
    visit.page.locator("#prompt").fill("three")
    assert copied() == [*asked, message("assistant", answer), message("user", "three")]
