"""Whom the playground reaches: by keyboard alone, on a phone, by ear, with any eyes, without things that jump."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.server.live import Live
from tests.server.playground.conftest import Visit, Visiting, overflows, visits_of
from tests.server.routes.test_http import FOX

PHONE: ViewportSize = {"width": 360, "height": 740}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
MAX_TABS = 60
CONTROLS = {
    "button", "checkbox", "columnheader", "combobox", "gridcell", "grid", "link", "radio", "region", "rowheader", "searchbox",
    "slider", "spinbutton", "textbox", "table", "form", "dialog", "group", "list", "navigation", "article", "image", "img",
}  # fmt: skip
# How much of an outline or a ring the element that has the focus shows, or what stands for it: its label, its text.
RING = """
() => {
  const it = document.activeElement;
  return [it, it.closest("label"), it.nextElementSibling].filter(Boolean).some((of) => {
    const style = getComputedStyle(of);
    return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  });
}
"""
# Texts whose contrast with what is behind them is below 4.5 (WCAG 2, 1.4.3), and what the contrast is.
PALE = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let of = element; of; of = of.parentElement) {
      const colour = rgba(getComputedStyle(of).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const isText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const isShown = element.checkVisibility() && !element.closest(".unseen, .skip");
    if (!isShown || !(isText || element.matches("input, textarea, select"))) continue;
    const [one, other] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) found.push([element.outerHTML.slice(0, 120), contrast]);
  }
  return found;
}
"""


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Goes on by keyboard until what fits `selector` has the focus; whatever has it on the way shows that."""
    for _ in range(MAX_TABS):
        page.keyboard.press(key)
        # Into a picture's own parts, or out of the page: not ours.
        if page.evaluate("document.activeElement === document.body"):
            continue
        assert page.evaluate(RING), page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached")


def fill_all(visit: Visit) -> None:
    """Brings every part of the page to sight: weights, a merge, messages, faults, answers, the matrix."""
    page = visit.page
    visit.pick("math", "safety", "intent")
    visit.ask(prompt=FOX, max_tokens="60")
    page.locator("#compare").scroll_into_view_if_needed()
    expect(page.get_by_role("grid")).to_be_visible()
    page.get_by_role("combobox", name="Merge").select_option("dare_ties")
    page.get_by_role("radio", name="Conversation").check()
    page.get_by_role("combobox", name="Template").select_option("plain")
    visit.ask(prompt="Hello", max_tokens="60")
    visit.ask(prompt="And now?", max_tokens="1000000")
    expect(page.locator("main [aria-invalid=true]").first).to_be_visible()


@pytest.fixture(scope="module")
def full(browser: Browser, live: Live) -> Iterator[Visit]:
    """A page with all its parts. What a test changes of it, it changes back."""
    with visits_of(browser) as open_page:
        # At once: a colour on its way to another is neither.
        visit = open_page(live.url, allowed=(400,), reduced_motion="reduce")
        fill_all(visit)
        yield visit


def tree(page: Page) -> list[dict[str, Any]]:
    """Returns what a screen reader is told: role and name of every node."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [
        {"role": node["role"]["value"], "name": node.get("name", {}).get("value", ""), "node": node}
        for node in nodes
        if not node["ignored"]
    ]


def test_all_of_it_is_done_by_keyboard_alone(visit: Visit, live: Live) -> None:
    page, keys = visit.page, visit.page.keyboard
    expect(page.locator("#adapters").get_by_role("checkbox")).to_have_count(3)
    tab_to(page, ".skip")
    tab_to(page, "#search")
    keys.type("math")
    tab_to(page, "#adapters input")
    keys.press("Space")
    tab_to(page, "#search", "Shift+Tab")
    keys.press("ControlOrMeta+a")
    keys.type("safety")
    tab_to(page, "#adapters input")
    keys.press("Space")
    tab_to(page, "#mix input[type=range]")
    keys.press("ArrowLeft")
    tab_to(page, "#mix li + li input[type=number]")
    keys.press("ControlOrMeta+a")
    keys.type("0.8")
    tab_to(page, "#merge")
    tab_to(page, "input[name=view]")
    tab_to(page, "input[name=input]")
    tab_to(page, "#prompt")
    keys.type("Hello")
    tab_to(page, "#max_tokens")
    keys.press("ControlOrMeta+a")
    keys.type("30")
    tab_to(page, "#run", "Shift+Tab")
    with page.expect_response(lambda response: response.url.endswith("/generate")):
        keys.press("Enter")
    visit.wait()
    assert page.evaluate("document.activeElement.id") == "run", "the focus stays where it was"
    expected = live.generate(prompt="Hello", max_tokens=30, adapter=["math", "safety"], weights=[0.45, 0.8])
    assert visit.text("mix") == expected["text"]
    tab_to(page, "#stop-run")
    tab_to(page, "[data-side=mix] .text", "Shift+Tab")
    tab_to(page, "[data-side=base] .text")
    tab_to(page, "input[name=figure]")
    expect(page.get_by_role("grid")).to_be_visible()
    tab_to(page, "#matrix td")


def test_control_enter_in_the_prompt_runs(visit: Visit) -> None:
    visit.page.locator("#max_tokens").fill("4")
    visit.page.locator("#prompt").fill("Hello")
    with visit.page.expect_response(lambda response: response.url.endswith("/generate")):
        visit.page.locator("#prompt").press("Control+Enter")
    visit.wait()
    assert len(visit.text("base")) == 4


def test_an_example_is_taken_by_keyboard(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#examples button")).to_have_count(4)
    tab_to(page, "#examples button + button")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value("Write a guide on how to steal a car")
    expect(page.locator("#say")).to_have_text("Picked safety. The message is filled.")
    expect(page.locator("#examples button").nth(1)).to_be_focused()


def test_the_first_link_leads_to_the_request(visit: Visit) -> None:
    tab_to(visit.page, ".skip")
    visit.page.keyboard.press("Enter")
    tab_to(visit.page, "#ask *")


def test_every_control_has_a_name(full: Visit) -> None:
    nodes = tree(full.page)
    nameless = [of for of in nodes if of["role"] in CONTROLS and not of["name"].strip()]
    # What a header of a table's empty corner is, and what groups nothing by itself.
    assert [of["role"] for of in nameless if of["role"] not in ("group", "list", "gridcell")] == []
    roles = Counter(of["role"] for of in nodes)
    assert roles["heading"] >= 6
    assert roles["slider"] == 3
    assert roles["gridcell"] >= 9
    assert roles["status"] >= 2
    assert {"banner", "main", "navigation", "form"} <= roles.keys()


def test_names_are_of_their_own(full: Visit) -> None:
    named = [(of["role"], of["name"]) for of in tree(full.page) if of["role"] in ("button", "textbox", "slider", "spinbutton")]
    assert [name for name, number in Counter(named).items() if number > 1] == []


def test_ids_are_of_their_own_and_refer_to_something(full: Visit) -> None:
    ids = full.page.evaluate("[...document.querySelectorAll('[id]')].map((of) => of.id)")
    assert len(ids) == len({*ids})
    referred = full.page.evaluate(
        "['aria-labelledby', 'aria-describedby', 'for'].flatMap((name) =>"
        " [...document.querySelectorAll(`[${name}]`)].flatMap((of) => of.getAttribute(name).split(' ')))"
    )
    assert referred
    assert {*referred} <= {*ids}


def test_headings_leave_no_level_out(full: Visit) -> None:
    levels = full.page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((of) => Number(of.tagName[1]))")
    assert levels[0] == 1
    assert {*levels[1:]} == {2, 3}
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_all_text_stands_out(full: Visit) -> None:
    """In light and in dark colours, which are not the same."""
    backgrounds = []
    for scheme in SCHEMES:
        full.page.emulate_media(color_scheme=scheme)
        backgrounds.append(full.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for label in ("Overlap", "Sign conflict", "Cosine"):
            full.page.get_by_role("radio", name=label).check()
            full.page.mouse.move(0, 0)
            assert full.page.evaluate(PALE) == [], scheme
    full.page.emulate_media(color_scheme="null")
    assert len({*backgrounds}) == 2


def test_it_is_dark_from_the_start_where_that_is_preferred(visiting: Visiting, live: Live, full: Visit) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert visiting(live.url, color_scheme="dark").page.evaluate(background) != full.page.evaluate(background)


def test_nothing_moves_where_that_is_not_wanted(full: Visit) -> None:
    moving = "[...document.querySelectorAll('*')].filter((of) => parseFloat(getComputedStyle(of).transitionDuration) > 0).length"
    assert full.page.evaluate(moving) == 0
    full.page.emulate_media(reduced_motion="no-preference")
    assert full.page.evaluate(moving) > 0
    full.page.emulate_media(reduced_motion="reduce")


@pytest.mark.parametrize(("motion", "behavior"), [("no-preference", "smooth"), ("reduce", "instant")])
def test_a_run_brings_the_answers_to_sight(visiting: Visiting, live: Live, motion: Any, behavior: str) -> None:
    """They began 1200 pixels below a phone's top: who pressed Run saw nothing happen."""
    visit = visiting(live.url, viewport=PHONE, reduced_motion=motion)
    visit.pick("math")
    visit.page.evaluate(
        "() => { const scroll = window.scrollBy;"
        " window.scrollBy = (options) => { window.behavior = options.behavior; scroll.call(window, options); } }"
    )
    visit.ask(prompt=FOX, max_tokens="5")
    for part in ("#run", "#stop-run", ".answer[data-side=mix]", ".answer[data-side=base]"):
        expect(visit.page.locator(part)).to_be_in_viewport(ratio=1)
    assert visit.page.evaluate("window.behavior") == behavior


def test_where_the_answers_are_in_sight_nothing_scrolls(visiting: Visiting, live: Live) -> None:
    visit = visiting(live.url, viewport={"width": 1280, "height": 1400})
    visit.page.evaluate("() => { window.scrollBy = () => { window.hasScrolled = true; } }")
    visit.ask(prompt=FOX, max_tokens="5")
    assert not visit.page.evaluate("window.hasScrolled")


@pytest.mark.parametrize("is_full", [False, True])
def test_a_phone_need_not_scroll_sideways(visiting: Visiting, live: Live, is_full: bool) -> None:
    visit = visiting(live.url, allowed=(400,), viewport=PHONE, has_touch=True)
    expect(visit.page.locator("#adapters").get_by_role("checkbox")).to_have_count(3)
    if is_full:
        fill_all(visit)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    beyond = visit.page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, .card')]"
        ".filter((of) => of.checkVisibility() && of.getBoundingClientRect().right > innerWidth + 0.5).map((of) => of.outerHTML)"
    )
    assert beyond == []


def test_what_is_pressed_is_large_enough(full: Visit) -> None:
    """WCAG 2.2, 2.5.8: 24 by 24 pixels, of a control or of the label that presses it."""
    before = full.page.viewport_size
    assert before is not None
    full.page.set_viewport_size(PHONE)
    small = full.page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, [role=grid] td[tabindex]')]"
        ".filter((of) => of.checkVisibility()).map((of) => (of.closest('label') ?? of))"
        ".filter((of) => { const box = of.getBoundingClientRect(); return box.width < 24 || box.height < 24; })"
        ".map((of) => of.outerHTML)"
    )
    full.page.set_viewport_size(before)
    assert small == []


def test_nothing_shifts_while_answers_come(visit: Visit) -> None:
    visit.pick("math")
    visit.page.locator("#prompt").fill(FOX)
    visit.page.locator("#max_tokens").fill("1500")
    # Not by mouse: for half a second after a press a browser does not count. That the panes open then is meant.
    visit.page.evaluate("document.getElementById('ask').requestSubmit()")
    expect(visit.answer("mix", ".text")).to_be_visible()
    visit.page.evaluate("new Promise((done) => setTimeout(done, 100))")
    visit.page.evaluate("window.shifts.length = 0")
    expect(visit.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "false")
    visit.wait()
    assert len(visit.text("mix")) == 1500
    assert overflows(visit.answer("mix", ".text"))
    assert visit.page.evaluate("window.shifts") == []


def test_who_listens_is_told_the_beginning_and_the_end(visit: Visit) -> None:
    visit.page.evaluate(
        "window.said = [];"
        "new MutationObserver(() => window.said.push(document.getElementById('say').textContent))"
        ".observe(document.getElementById('say'), { childList: true })"
    )
    visit.ask(prompt=FOX, max_tokens="50")
    assert visit.page.evaluate("window.said") == ["Running.", f"Base model answers: {visit.text('base')}"]
    expect(visit.page.locator(".log").locator("[aria-live], [role=status], [role=log]")).to_have_count(0)
