"""The playground in a browser, on a real server: its requests, the answers and figures that it shows, and refusals."""

import ast
import json
import re
import shlex

import pytest
from playwright.sync_api import expect

from tests.server.live import Live
from tests.server.playground.conftest import Visit, Visiting
from tests.server.replies import FOR_EVER, FOX

FAULTS = ":is(#ask, .settings, .mix) .fault:visible"


def test_the_adapters_are_listed_and_searched(visit: Visit) -> None:
    names = visit.page.locator("#adapters .name")
    expect(names).to_have_text(["intent", "math", "safety"])
    expect(visit.page.locator("#base-model")).to_have_text("tiny-writer")
    search = visit.page.get_by_role("searchbox", name="Search adapters")
    search.fill("AF")
    expect(names).to_have_text(["safety"])
    expect(visit.page.locator("#adapters-note")).to_have_text("1 of 3 adapters")
    search.fill("nobody")
    expect(names).to_have_count(0)
    expect(visit.page.locator("#adapters-note")).to_have_text("None is called so.")


def test_the_base_and_the_mix_answer_side_by_side(visit: Visit, live: Live) -> None:
    visit.pick("math", "safety")
    visit.ask(prompt=FOX, max_tokens="40")
    assert visit.text("base") == live.generate(prompt=FOX, max_tokens=40)["text"]
    assert visit.text("mix") == live.generate(prompt=FOX, max_tokens=40, adapter=["math", "safety"])["text"]
    assert visit.bodies() == [
        {"prompt": FOX, "max_tokens": 40, "adapter": ["math", "safety"], "weights": [0.5, 0.5], "stream": True},
        {"prompt": FOX, "max_tokens": 40, "stream": True},
    ]
    assert visit.figure("mix", "Tokens") == f"{len(FOX)} in, 40 out"
    assert visit.figure("mix", "Ended") == "max tokens"
    assert visit.figure("base", "First token").endswith("s")
    assert float(visit.figure("base", "Tokens/s")) > 0
    expect(visit.answer("mix", "h3")).to_have_text("Answer: 0.50 math + 0.50 safety")
    expect(visit.answer("base", "h3")).to_have_text("Answer: Base model")


def test_without_a_pick_the_base_answers_alone(visit: Visit) -> None:
    visit.ask(prompt=FOX, max_tokens="5")
    assert len(visit.bodies()) == 1
    assert len(visit.text("base")) == 5
    expect(visit.answer("mix")).to_have_count(0)


def test_the_base_model_is_asked_only_for_a_comparison(visit: Visit) -> None:
    visit.pick("math")
    beside = visit.page.get_by_role("checkbox", name="Base model beside it")
    expect(beside).to_be_checked()
    beside.uncheck()
    visit.ask(prompt=FOX, max_tokens="5")
    assert [body["adapter"] for body in visit.bodies()] == ["math"]
    expect(visit.page.locator(".answer")).to_have_count(1)


def test_before_a_run_no_empty_answer_is_shown(visit: Visit) -> None:
    parts = visit.page.locator(".answer .text, .answer dl").filter(visible=True)
    empty = visit.page.locator("#empty")
    expect(empty).to_contain_text("Write a text below.")
    expect(parts).to_have_count(0)
    visit.ask(prompt=FOX, max_tokens="5")
    expect(empty).to_be_hidden()
    expect(parts).to_have_count(2)
    visit.pick("math")
    visit.ask()
    expect(parts).to_have_count(4)
    visit.pick("safety")
    expect(visit.page.get_by_role("region", name="Answer: 1.00 math")).to_be_visible()
    visit.page.get_by_role("button", name="Clear").click()
    expect(parts).to_have_count(0)
    expect(empty).to_be_visible()
    expect(visit.page.locator("#prompt")).to_be_focused()
    expect(visit.page.locator("#prompt")).to_have_value(FOX)


def test_a_weight_is_moved_by_keyboard(visit: Visit, live: Live) -> None:
    visit.pick("math", "safety")
    slider = visit.page.get_by_role("slider", name="Weight of math")
    exact = visit.page.get_by_role("spinbutton", name="Exact weight of math")
    expect(exact).to_have_value("0.5")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    expect(exact).to_have_value("0.65")
    slider.press("Home")
    expect(exact).to_have_value("-2")
    expect(slider).to_have_attribute("aria-valuetext", "-2")
    visit.ask(prompt=FOX, max_tokens="20")
    assert visit.bodies()[0]["weights"] == [-2, 0.5]
    expected = live.generate(prompt=FOX, max_tokens=20, adapter=["math", "safety"], weights=[-2, 0.5])
    assert visit.text("mix") == expected["text"]


def test_a_weight_is_written_exactly_beyond_the_slider_too(visit: Visit) -> None:
    visit.pick("math")
    exact = visit.page.get_by_role("spinbutton", name="Exact weight of math")
    exact.fill("-3.125")
    expect(visit.page.get_by_role("slider")).to_have_value("-2")
    visit.ask(prompt=FOX, max_tokens="3")
    assert visit.bodies()[0]["weights"] == [-3.125]
    assert visit.bodies()[0]["adapter"] == "math"


def test_an_adapter_is_dropped_and_the_others_share_evenly_again(visit: Visit) -> None:
    visit.pick("math", "safety", "intent")
    exact = visit.page.get_by_role("spinbutton", name="Exact weight")
    assert [box.input_value() for box in exact.all()] == ["0.3333"] * 3
    visit.page.get_by_role("button", name="Remove safety").click()
    expect(visit.page.get_by_role("checkbox", name="safety")).not_to_be_checked()
    assert [box.input_value() for box in exact.all()] == ["0.5"] * 2
    exact.first.fill("2")
    visit.page.get_by_role("button", name="1/n each").click()
    expect(exact.first).to_have_value("0.5")


def test_stop_ends_both_answers_and_frees_their_places(visit: Visit, live: Live) -> None:
    live.wait_for(running=0, waiting=0)
    visit.pick("math")
    visit.page.locator("#prompt").fill("a")
    visit.page.locator("#max_tokens").fill(str(FOR_EVER - 1))
    visit.run()
    for side in ("base", "mix"):
        expect(visit.answer(side, ".said")).not_to_be_empty()
    visit.page.get_by_role("button", name="Stop").click()
    for side in ("base", "mix"):
        expect(visit.answer(side, ".end dd")).to_have_text("stopped")
    live.wait_for(running=0, waiting=0)


def test_a_second_run_replaces_the_first(visit: Visit, live: Live) -> None:
    visit.page.locator("#prompt").fill("a")
    visit.page.locator("#max_tokens").fill(str(FOR_EVER - 1))
    visit.run()
    expect(visit.answer("base", ".said")).not_to_be_empty()
    visit.ask(prompt=FOX, max_tokens="9")
    assert visit.text("base") == live.generate(prompt=FOX, max_tokens=9)["text"]
    assert visit.figure("base", "Ended") == "max tokens"
    live.wait_for(running=0)


def test_a_refusal_is_shown_beside_its_field(visiting: Visiting, live: Live) -> None:
    visit = visiting(live.url, allowed=(400,))
    visit.pick("math")
    for field, value, message in (
        ("max_tokens", "1000000", "exceeds the context of 4096"),
        ("max_tokens", "2.5", "found 2.5"),
        ("temperature", "-1", "found -1"),
        ("seed", "-1", "found -1"),
        ("stop", "\n".join("abcdefghijklmnopq"), "at most 16"),
        ("prompt", "", "is empty"),
    ):
        control = visit.page.locator(f"#{field}")
        visit.ask(**{"prompt": FOX, field: value})
        expect(control).to_have_attribute("aria-invalid", "true")
        described = visit.page.locator(f"#{control.get_attribute('aria-describedby')}")
        expect(described).to_contain_text(message)
        expect(visit.page.locator(FAULTS)).to_have_count(1)
        for side in ("base", "mix"):
            expect(visit.answer(side, ".fault")).to_contain_text(message)
            expect(visit.answer(side, ".end dd")).to_have_text("failed")
        control.fill("1")
        expect(described).to_have_count(0)
        expect(control).not_to_have_attribute("aria-invalid", "true")


def test_a_weight_that_is_too_large_is_refused_beside_its_field(visiting: Visiting, live: Live) -> None:
    visit = visiting(live.url, allowed=(400,))
    visit.pick("math", "safety")
    exact = visit.page.get_by_role("spinbutton", name="Exact weight of safety")
    exact.fill("17")
    visit.ask(prompt=FOX, max_tokens="3")
    expect(exact).to_have_attribute("aria-invalid", "true")
    expect(visit.page.locator("#mix li").nth(1).locator(".fault")).to_contain_text("found 17")
    assert len(visit.text("base")) == 3, "the base model's answer is there all the same"


def test_a_refusal_without_a_field_is_shown_above_the_buttons(visiting: Visiting, live: Live) -> None:
    visit = visiting(live.url, allowed=(400,), asks="messages")
    visit.pick("math", "intent")
    visit.ask(prompt="Hello?", max_tokens="3")
    expect(visit.page.locator("#template")).to_have_attribute("aria-invalid", "true")
    expect(visit.page.locator(FAULTS)).to_contain_text("no common template")


def test_stop_texts_and_sampling_are_sent(visit: Visit, live: Live) -> None:
    visit.ask(prompt=FOX, max_tokens="60", temperature="0.8", seed="7", stop="e\n\\n\\\\n")
    body = {"prompt": FOX, "max_tokens": 60, "temperature": 0.8, "seed": 7, "stop": ["e", "\n\\n"]}
    assert visit.bodies() == [body | {"stream": True}]
    assert visit.text("base") == live.generate(**body)["text"]
    assert visit.figure("base", "Ended") in ("stop text", "max tokens")
    assert visit.figure("base", "Seed") == "7"


def test_the_matrix_has_the_servers_figures(visit: Visit, live: Live) -> None:
    visit.page.locator("#compare").scroll_into_view_if_needed()
    table = visit.page.get_by_role("grid")
    expect(table.get_by_role("columnheader")).to_have_text(["intent", "math", "safety"])
    expect(table.get_by_role("rowheader")).to_have_text(["intent", "math", "safety"])
    reply = live.client.get("/adapters/compare?names=intent,math,safety").json()
    for figure, label in (("cosine", "Cosine"), ("overlap", "Overlap"), ("sign_conflict", "Sign conflict")):
        visit.page.get_by_role("radio", name=label).check()
        cells = [cell.text_content() or "" for cell in table.get_by_role("gridcell").all()]
        shown = [None if cell == "–" else float(cell.replace("−", "-")) for cell in cells if cell]
        assert shown == [pytest.approx(v, abs=0.006) if v is not None else None for row in reply[figure] for v in row]


def test_choosing_a_figure_scrolls_the_matrix_into_view(visiting: Visiting, live: Live) -> None:
    """Regression: the click was lost if the page scrolled away under the pointer."""
    page = visiting(live.url, viewport={"width": 1366, "height": 768}).page
    expect(page.get_by_role("grid")).to_have_count(0)
    box = page.locator("label", has_text="Overlap").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 5)
    expect(page.get_by_role("radio", name="Overlap")).to_be_checked()
    expect(page.get_by_role("grid")).to_be_in_viewport()


def test_the_matrix_shows_the_picked_adapters(visit: Visit) -> None:
    visit.pick("math", "safety")
    visit.page.locator("#compare").scroll_into_view_if_needed()
    expect(visit.page.get_by_role("columnheader")).to_have_text(["math", "safety"])
    visit.pick("intent")
    visit.page.locator("#compare").scroll_into_view_if_needed()  # picking may scroll the matrix out of view
    expect(visit.page.get_by_role("columnheader")).to_have_text(["math", "safety", "intent"])


def test_the_matrix_is_walked_with_arrows(visit: Visit) -> None:
    visit.page.locator("#compare").scroll_into_view_if_needed()
    cells = visit.page.get_by_role("gridcell")
    cells.and_(visit.page.locator("[tabindex='0']")).focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("ArrowDown")
    visit.page.keyboard.press("ArrowRight")
    expect(visit.page.locator(":focus")).to_have_attribute("data-column", "2")
    expect(visit.page.locator(":focus")).to_have_attribute("data-row", "1")
    expect(visit.page.locator("#compare-detail")).to_contain_text("math and safety: cosine ")
    visit.page.keyboard.press("ArrowRight")
    expect(visit.page.locator(":focus")).to_have_attribute("data-column", "2")
    expect(visit.page.locator("#matrix td[tabindex='0']")).to_have_count(1)


def test_a_redrawn_matrix_keeps_the_focus(visit: Visit) -> None:
    """Regression: the focus was lost if the figures of another pick arrived late."""
    visit.page.locator("#compare").scroll_into_view_if_needed()
    cell = visit.page.locator("#matrix td[data-row='1'][data-column='0']")
    cell.focus()
    # By script, as when a pick's reply arrives: a real click would take the focus.
    pick = "for (const name of ['math', 'safety']) document.querySelector(`#adapters [title^=${name}] input`).click()"
    visit.page.evaluate(pick)
    expect(visit.page.get_by_role("columnheader")).to_have_text(["math", "safety"])
    expect(cell).to_be_focused()
    expect(visit.page.locator("#matrix td[tabindex='0']")).to_have_count(1)


def test_the_throughput_is_shown(visit: Visit) -> None:
    figures = visit.page.locator("#charts output")
    expect(figures.nth(1)).to_have_text("0")
    expect(figures.nth(3)).to_have_text("0%")
    visit.ask(prompt=FOX, max_tokens="200")
    expect(figures.first).to_have_text(re.compile("[1-9]"))


def test_the_request_is_copied_as_curl(visiting: Visiting, live: Live) -> None:
    visit = visiting(live.url, permissions=["clipboard-read", "clipboard-write"])
    visit.pick("math", "safety")
    visit.page.locator("#prompt").fill('It\'s "so"\n$HOME `x` \\ é')
    visit.page.get_by_role("button", name="Copy as curl").click()
    expect(visit.page.locator("#say")).to_have_text("Copied.")
    command = visit.page.evaluate("navigator.clipboard.readText()")
    words = shlex.split(command)
    assert words[:3] == ["curl", "-s", f"{live.url}/generate"]
    assert "Content-Type: application/json" in words
    body = json.loads(words[-1])
    assert body["prompt"] == 'It\'s "so"\n$HOME `x` \\ é'
    assert live.generate(**body)["adapter"][0]["name"] == "math"


def test_the_request_is_copied_as_python(visiting: Visiting, live: Live) -> None:
    visit = visiting(live.url, permissions=["clipboard-read", "clipboard-write"])
    visit.pick("math", "safety")
    visit.page.get_by_role("spinbutton", name="Exact weight of math").fill("1")
    visit.page.locator("#prompt").fill('Say "é"\n')
    visit.page.get_by_role("button", name="Copy as Python").click()
    expect(visit.page.locator("#say")).to_have_text("Copied.")
    program = ast.parse(visit.page.evaluate("navigator.clipboard.readText()"))
    calls = {ast.unparse(node.func): node for node in ast.walk(program) if isinstance(node, ast.Call)}
    assert {word.arg: ast.literal_eval(word.value) for word in calls["OpenAI"].keywords}["base_url"] == f"{live.url}/v1"
    assert {word.arg: ast.literal_eval(word.value) for word in calls["client.completions.create"].keywords} == {
        "model": "tiny-writer",
        "prompt": 'Say "é"\n',
        "max_tokens": 128,
        "temperature": 0,
        "extra_body": {"weights": [1, 0.5], "adapters": ["math", "safety"]},
    }


def test_without_a_clipboard_the_text_is_shown(visit: Visit) -> None:
    visit.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    visit.page.locator("#prompt").fill("Hello")
    visit.page.get_by_role("button", name="Copy as curl").click()
    shown = visit.page.get_by_role("dialog").get_by_role("textbox")
    expect(shown).to_have_value(f"""curl -s {visit.url}/generate \\
  -H 'Content-Type: application/json' \\
  -d '{{"prompt":"Hello","max_tokens":128}}'""")
    visit.page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
