"""Accessibility of the playground: keyboard, phone, screen reader, contrast, and a stable layout."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.server.live import Live
from tests.server.playground.conftest import Visit, Visiting, overflows, visits_of
from tests.server.replies import FOX

PHONE: ViewportSize = {"width": 360, "height": 740}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
MAX_TABS = 60
CONTROLS = {
    "button", "checkbox", "columnheader", "combobox", "gridcell", "grid", "link", "radio", "region", "rowheader", "searchbox",
    "slider", "spinbutton", "textbox", "table", "form", "dialog", "group", "list", "navigation", "article", "image", "img",
}  # fmt: skip
# Whether the focused element shows an outline, or its label or the text beside it does.
RING = """
() => {
  const active = document.activeElement;
  return [active, active.closest("label"), active.nextElementSibling].filter(Boolean).some((element) => {
    const style = getComputedStyle(element);
    return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  });
}
"""
# Texts whose contrast with their background is below 4.5 (WCAG 2, 1.4.3), and that contrast.
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
    for (let box = element; box; box = box.parentElement) {
      const colour = rgba(getComputedStyle(box).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const isText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const isShown = element.checkVisibility() && !element.closest(".unseen, .skip");
    if (!isShown || !(isText || element.matches("input, textarea, select"))) continue;
    const [one, other] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) pale.push([element.outerHTML.slice(0, 120), contrast]);
  }
  return pale;
}
"""


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Press `key` until an element that matches `selector` has the focus. Check that every focused element shows its focus."""
    for _ in range(MAX_TABS):
        page.keyboard.press(key)
        # The focus is inside a picture or outside of the page, where the ring is not ours.
        if page.evaluate("document.activeElement === document.body"):
            continue
        assert page.evaluate(RING), page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached")


def fill_all(visit: Visit) -> None:
    """Show every part of the page: weights, a merge, messages, faults, answers, the matrix."""
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
    """Yield a page that shows all its parts. A test undoes its own changes of the page."""
    with visits_of(browser) as open_page:
        # Without transitions: a colour amid a transition has no meaningful contrast.
        visit = open_page(live.url, allowed=(400,), reduced_motion="reduce")
        fill_all(visit)
        yield visit


def tree(page: Page) -> list[dict[str, Any]]:
    """Return the accessibility tree that a screen reader gets: role and name of every node."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [
        {"role": node["role"]["value"], "name": node.get("name", {}).get("value", ""), "node": node}
        for node in nodes
        if not node["ignored"]
    ]


def test_the_whole_page_works_by_keyboard_alone(visit: Visit, live: Live) -> None:
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
    nameless = [node for node in nodes if node["role"] in CONTROLS and not node["name"].strip()]
    # The empty corner of the table and mere groupings may be nameless.
    assert [node["role"] for node in nameless if node["role"] not in ("group", "list", "gridcell")] == []
    roles = Counter(node["role"] for node in nodes)
    assert roles["heading"] >= 6
    assert roles["slider"] == 3
    assert roles["gridcell"] >= 9
    assert roles["status"] >= 2
    assert {"banner", "main", "navigation", "form"} <= roles.keys()


def test_accessible_names_are_unique(full: Visit) -> None:
    roles = ("button", "textbox", "slider", "spinbutton")
    named = [(node["role"], node["name"]) for node in tree(full.page) if node["role"] in roles]
    assert [name for name, number in Counter(named).items() if number > 1] == []


def test_ids_are_unique_and_references_resolve(full: Visit) -> None:
    ids = full.page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len({*ids})
    referred = full.page.evaluate(
        "['aria-labelledby', 'aria-describedby', 'for'].flatMap((name) =>"
        " [...document.querySelectorAll(`[${name}]`)].flatMap((element) => element.getAttribute(name).split(' ')))"
    )
    assert referred
    assert {*referred} <= {*ids}


def test_headings_skip_no_level(full: Visit) -> None:
    levels = full.page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((heading) => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert {*levels[1:]} == {2, 3}
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_all_text_has_enough_contrast(full: Visit) -> None:
    """Check the light and the dark colours, which must differ."""
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


def test_the_page_starts_dark_if_the_user_prefers_dark(visiting: Visiting, live: Live, full: Visit) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert visiting(live.url, color_scheme="dark").page.evaluate(background) != full.page.evaluate(background)


def test_nothing_moves_if_the_user_prefers_reduced_motion(full: Visit) -> None:
    is_moving = "(element) => parseFloat(getComputedStyle(element).transitionDuration) > 0"
    moving = f"[...document.querySelectorAll('*')].filter({is_moving}).length"
    assert full.page.evaluate(moving) == 0
    full.page.emulate_media(reduced_motion="no-preference")
    assert full.page.evaluate(moving) > 0
    full.page.emulate_media(reduced_motion="reduce")


@pytest.mark.parametrize(("motion", "behavior"), [("no-preference", "smooth"), ("reduce", "instant")])
def test_a_run_scrolls_the_answers_into_view(visiting: Visiting, live: Live, motion: Any, behavior: str) -> None:
    """Regression: the answers began 1200 pixels below the top of a phone, so that a press of Run had no visible effect."""
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


def test_nothing_scrolls_if_the_answers_are_in_view(visiting: Visiting, live: Live) -> None:
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
        ".filter((part) => part.checkVisibility() && part.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((part) => part.outerHTML)"
    )
    assert beyond == []


def test_pressable_controls_are_large_enough(full: Visit) -> None:
    """Check WCAG 2.2, 2.5.8: a control, or the label that presses it, has at least 24 by 24 pixels."""
    before = full.page.viewport_size
    assert before is not None
    full.page.set_viewport_size(PHONE)
    small = full.page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, [role=grid] td[tabindex]')]"
        ".filter((control) => control.checkVisibility()).map((control) => (control.closest('label') ?? control))"
        ".filter((target) => { const box = target.getBoundingClientRect(); return box.width < 24 || box.height < 24; })"
        ".map((target) => target.outerHTML)"
    )
    full.page.set_viewport_size(before)
    assert small == []


def test_nothing_shifts_while_answers_come(visit: Visit) -> None:
    visit.pick("math")
    visit.page.locator("#prompt").fill(FOX)
    visit.page.locator("#max_tokens").fill("1500")
    # By script: after a real click a browser ignores shifts for half a second. The shift of the opening panes is intended.
    visit.page.evaluate("document.getElementById('ask').requestSubmit()")
    expect(visit.answer("mix", ".text")).to_be_visible()
    visit.page.evaluate("new Promise((done) => setTimeout(done, 100))")
    visit.page.evaluate("window.shifts.length = 0")
    expect(visit.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "false")
    visit.wait()
    assert len(visit.text("mix")) == 1500
    assert overflows(visit.answer("mix", ".text"))
    assert visit.page.evaluate("window.shifts") == []


def test_a_screen_reader_is_told_the_beginning_and_the_end(visit: Visit) -> None:
    visit.page.evaluate(
        "window.announced = [];"
        "new MutationObserver(() => window.announced.push(document.getElementById('say').textContent))"
        ".observe(document.getElementById('say'), { childList: true })"
    )
    visit.ask(prompt=FOX, max_tokens="50")
    assert visit.page.evaluate("window.announced") == ["Running.", f"Base model answers: {visit.text('base')}"]
    expect(visit.page.locator(".log").locator("[aria-live], [role=status], [role=log]")).to_have_count(0)
