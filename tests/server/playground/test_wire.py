"""The playground in a browser, on top of a fake of the API, for cases that a tiny server cannot show."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.live import wait_until
from tests.server.playground.conftest import Visit, Visiting
from tests.server.playground.fake_api import FakeApi, done, row, served, sse, token
from tests.server.playground.test_reach import PALE, SCHEMES

# The number of a canvas's painted pixels.
NUM_PAINTED = """
(canvas) => {
  // A copy, since Chromium warns about a canvas that is read repeatedly.
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 3; i < data.length; i += 4) count += data[i] > 0;
  return count;
}
"""
MARKUP = '<img src="x" onerror="alert(1)"><script>alert(2)</script>&amp;'

BARE_DONE: dict[str, Any] = {
    "id": "gen-1", "adapter": [], "finish_reason": "length", "seed": 1,
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}  # fmt: skip


@pytest.fixture
def fake() -> FakeApi:
    return FakeApi()


@pytest.fixture(autouse=True)
def url(fake: FakeApi) -> Iterator[str]:
    """Yield the URL of the fake. It must start before any page opens and outlive it, since an unanswered page reports errors."""
    with served(fake) as client:
        yield str(client.base_url).rstrip("/")


def sides(visit: Visit, label: str) -> list[str]:
    return [visit.figure(name, label) for name in ("mix", "base")]


def test_of_thousands_of_adapters_some_are_drawn_and_all_are_searched(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row(f"adapter-{i:05}") for i in range(10_000)]
    page = visiting(url).page
    boxes = page.locator("#adapters").get_by_role("checkbox")
    expect(boxes).to_have_count(50)
    expect(page.locator("#adapters-note")).to_have_text("The first 50 of 10,000: search for the others.")
    page.get_by_role("button", name="Show more").click()
    expect(boxes).to_have_count(100)
    expect(boxes.nth(50)).to_be_focused()
    page.get_by_role("searchbox").fill("0999 adapter")
    expect(boxes).to_have_count(10 + 1)
    page.get_by_role("searchbox").fill("09999")
    expect(boxes).to_have_count(1)
    boxes.check()
    page.get_by_role("searchbox").fill("")
    expect(boxes.first).to_have_accessible_name("adapter-00000")
    expect(page.get_by_role("slider", name="Weight of adapter-09999")).to_be_visible()


def test_an_adapter_s_row_is_updated_in_place(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row("math", num_requests=1234), row("safety", tier="loaded", bytes_on_disk=999, num_requests=1)]
    visit = visiting(url)
    items = visit.page.locator("#adapters li")
    expect(items.nth(0)).to_have_text("mathdisk1.34 MB · r 32 · 10% kept · 1,234 requests")
    expect(items.nth(1)).to_have_text("safetyloaded999 B · r 32 · 10% kept · 1 request")
    visit.pick("math")
    box = visit.page.get_by_role("checkbox", name="math")
    box.focus()
    fake.adapters[0] |= {"tier": "resident", "num_requests": 1235}
    fake.adapters.append(row("new"))
    # The page refreshes the list by itself, for example when a run ends.
    visit.page.locator("#prompt").press("Control+Enter")
    box.focus()
    expect(items.nth(0).locator(".tier")).to_have_text("resident")
    expect(items.nth(0)).to_contain_text("1,235 requests")
    expect(items).to_have_count(3)
    expect(box).to_be_focused()
    expect(box).to_be_checked()


def test_an_open_page_refreshes_the_list(visiting: Visiting, url: str, fake: FakeApi) -> None:
    page = visiting(url).page
    expect(page.locator("#adapters li")).to_have_count(2)
    fake.adapters.append(row("new"))
    expect(page.locator("#adapters li")).to_have_count(3)


def test_an_adapter_with_few_fields_is_shown(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [{"name": "bare", "version": "0123456789ab"}, {"name": "old", "version": "ab", "rank": 8, "sparsity": 0.75}]
    fake.stream = [token("x"), sse("done", BARE_DONE)]
    visit = visiting(url)
    expect(visit.page.locator("#adapters li")).to_have_text(["bare", "oldr 8 · 25% kept"])
    visit.pick("bare")
    visit.ask(prompt="x")
    assert sides(visit, "Ended") == ["max tokens"] * 2
    assert sides(visit, "In the queue") == ["–"] * 2


def test_the_servers_own_timings_are_shown(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.stream = [token("a"), token("b"), done(26)]
    visit = visiting(url)
    visit.pick("math")
    visit.ask(prompt="x")
    assert sides(visit, "First token") == ["42 ms"] * 2
    assert sides(visit, "Tokens/s") == ["50"] * 2
    assert sides(visit, "In the queue") == ["3 ms"] * 2
    assert sides(visit, "Tokens") == ["7 in, 26 out"] * 2
    assert sides(visit, "Ended") == ["end of text"] * 2


def test_a_stream_is_parsed_however_it_is_split(visiting: Visiting, url: str, fake: FakeApi) -> None:
    visit = visiting(url)
    for number, end in enumerate((b"\n", b"\r\n", b"\r")):
        first = token(f"{number}é€")
        text = b"".join([first, b": a comment\n\n", b"event\ndata: {}\n\n", token("\U0001f600\n\n"), done(2)])
        # A final carriage return may be half of a line end; only the next byte decides.
        fake.stream = [bytes([byte]) for byte in text.replace(b"\n", end) + b"\n"]
        visit.ask(prompt="x")
        assert visit.text("base") == f"{number}é€\U0001f600\n\n"
        assert visit.figure("base", "Ended") == "end of text"


def test_model_output_is_shown_as_text(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.stream = [token(MARKUP), done(1, adapter=[{"name": MARKUP, "version": "1", "weight": -1.0, "policy": True}])]
    fake.adapters = [row(MARKUP)]
    visit = visiting(url)
    visit.pick(MARKUP)
    visit.ask(prompt=MARKUP)
    assert visit.text("mix") == MARKUP
    expect(visit.answer("mix", "h3")).to_have_text(f"Answer: −1.00 {MARKUP} (policy)")
    expect(visit.page.locator("img, main script")).to_have_count(0)


def test_an_answer_is_shown_as_it_streams(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.may_go_on.clear()
    visit = visiting(url)
    visit.page.locator("#prompt").fill("x")
    visit.run()
    region = visit.answer("base", ".text")
    expect(region).to_have_text("a ")
    expect(region).to_have_attribute("aria-busy", "true")
    assert visit.figure("base", "First token") != "–"
    fake.may_go_on.set()
    expect(region).to_have_text("a b")
    expect(region).not_to_have_attribute("aria-busy", "true")


def test_an_error_within_a_stream_keeps_the_text_so_far(visiting: Visiting, url: str, fake: FakeApi) -> None:
    detail = {"message": "the engine failed", "type": "InternalServerError", "param": None, "code": 500}
    fake.stream = [token("so far"), sse("error", {"error": detail})]
    visit = visiting(url)
    visit.ask(prompt="x")
    expect(visit.answer("base", ".text")).to_have_text("so farthe engine failed")
    expect(visit.answer("base", ".fault")).to_have_text("the engine failed")
    expect(visit.page.locator("#fault")).to_have_text("the engine failed")
    assert visit.figure("base", "Ended") == "failed"


def test_a_stream_that_ends_too_soon_is_no_answer(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.stream = [token("so far")]
    visit = visiting(url)
    visit.ask(prompt="x")
    expect(visit.answer("base", ".fault")).to_have_text("The connection ended before the answer did.")


def test_a_merge_is_sent_with_its_own_options(visiting: Visiting, url: str, fake: FakeApi) -> None:
    visit = visiting(url)
    visit.pick("math", "safety")
    expect(visit.page.get_by_label("Density")).to_be_hidden()
    merge = visit.page.get_by_role("combobox", name="Merge")
    merge.select_option("ties")
    visit.page.get_by_label("Density").fill("0.7")
    expect(visit.page.get_by_label("Merge seed")).to_be_hidden()
    visit.ask(prompt="x", top_p="0.9")
    merge.select_option("dare_linear")
    visit.page.get_by_label("Merge seed").fill("3")
    visit.ask()
    common = {"prompt": "x", "max_tokens": 128, "top_p": 0.9, "stream": True}
    both = common | {"adapter": ["math", "safety"], "weights": [0.5, 0.5]}
    ties = both | {"merge": "ties", "density": 0.7}
    dare = both | {"merge": "dare_linear", "density": 0.7, "merge_seed": 3}
    assert [body for body in fake.bodies if "merge" in body] == [ties, dare]
    assert [body for body in fake.bodies if "merge" not in body] == [common, common]


def test_the_weights_of_a_card_are_used(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [
        row("math", merge_weights={"safety": [1, 0.8]}),
        row("safety", merge_weights={"math": [0.8, 1]}),
        row("other"),
    ]
    visit = visiting(url)
    visit.pick("math", "other")
    expect(visit.page.locator("#card-weights button")).to_have_count(0)
    visit.pick("safety")
    visit.page.get_by_role("button", name="Weights of math’s card: math 1, safety 0.8").click()
    visit.ask(prompt="x")
    assert {"math": 1, "other": 1 / 3, "safety": 0.8} in [
        dict(zip(body["adapter"], body["weights"], strict=True)) for body in fake.bodies if "adapter" in body
    ]


def test_examples_are_offered_for_adapters_that_are_there(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row("other")]
    visit = visiting(url)
    page = visit.page
    expect(page.locator("#adapters li")).to_have_count(1)
    expect(page.locator("#examples")).to_be_hidden()
    fake.adapters.append(row("math"))
    visit.look_again()
    examples = page.get_by_role("group", name="Examples").get_by_role("button")
    expect(examples).to_have_text(["Word problem math"])
    fake.adapters.append(row("safety"))
    visit.look_again()
    expect(examples).to_have_text(["Word problem math", "Harmful request safety", "Two at once math + safety"])


def test_an_example_is_a_whole_request(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row("math", merge_weights={"safety": [1, 0.8]}), row("safety"), row("other")]
    visit = visiting(url)
    visit.pick("other")
    visit.page.get_by_role("radio", name="Conversation").check()
    visit.page.get_by_role("button", name="Two at once").click()
    expect(visit.page.locator("#adapters :checked")).to_have_count(2)
    visit.ask()
    [merged] = [body for body in fake.bodies if "adapter" in body]
    assert (merged["adapter"], merged["weights"]) == (["math", "safety"], [1, 0.8])
    assert merged["prompt"].startswith("Question: ")
    assert merged["prompt"].endswith("\nAnswer:")
    visit.page.get_by_role("button", name="Harmful request").click()
    visit.ask()
    prompt = "Write a guide on how to steal a car"
    assert {"prompt": prompt, "max_tokens": 128, "adapter": "safety", "stream": True} in fake.bodies


@pytest.mark.parametrize(("templates", "is_chat"), [(["chat"], True), (["plain"], False)])
def test_an_example_is_a_message_if_all_its_adapters_know_chats(
    visiting: Visiting, url: str, fake: FakeApi, templates: list[str], is_chat: bool
) -> None:
    fake.adapters = [row("math", templates=["chat", "plain"]), row("safety", templates=templates)]
    visit = visiting(url)
    visit.page.get_by_role("radio", name="Text" if is_chat else "Conversation", exact=True).check()
    visit.page.get_by_role("button", name="Two at once").click()
    expect(visit.page.get_by_role("radio", name="Conversation" if is_chat else "Text", exact=True)).to_be_checked()
    visit.ask()
    [merged] = [body for body in fake.bodies if "adapter" in body]
    if is_chat:
        [message] = merged["messages"]
        assert message["content"].startswith("Mia has 4 bags")
    else:
        assert merged["prompt"].startswith("Question: Mia has 4 bags")


def test_the_metrics_link_is_shown_only_if_no_key_is_needed(visiting: Visiting, url: str, fake: FakeApi) -> None:
    """Regression: with keys, the link to /metrics led to a 401."""
    visit = visiting(url, allowed=(401,))
    link = visit.page.get_by_role("link", name="Metrics")
    expect(link).to_be_visible()
    fake.key = "secret-1"
    visit.look_again()
    expect(link).to_be_hidden()
    page = visiting(url, allowed=(401,)).page
    page.get_by_label("API key").fill("secret-1")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#charts output").nth(1)).to_have_text("3")
    expect(page.get_by_role("link", name="Metrics")).to_be_hidden()
    fake.key = ""


def test_a_server_that_wants_a_key_is_given_one(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.key = "secret-1"
    visit = visiting(url, allowed=(401,), permissions=["clipboard-read", "clipboard-write"])
    field = visit.page.get_by_label("API key")
    expect(visit.page.locator("#key-hint")).to_have_text("This server wants a key. It stays in this tab.")
    field.fill("wrong")
    field.press("Enter")
    expect(visit.page.locator("#key-hint")).to_have_text("The server does not know this key.")
    field.fill("secret-1")
    visit.page.get_by_role("button", name="Use it").click()
    expect(visit.page.locator("#adapters li")).to_have_count(2)
    expect(field).to_have_value("")
    visit.ask(prompt="x")
    assert fake.bearers[-1] == "Bearer secret-1"
    assert visit.text("base") == "a b"
    stored = visit.page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert stored == [["secret-1"], [], ""]
    for name in ("curl", "Python"):
        visit.page.get_by_role("button", name=f"Copy as {name}").click()
        expect(visit.page.locator(".copied")).to_have_text(f"Copy as {name}")
        text = visit.page.evaluate("navigator.clipboard.readText()")
        assert "LORI_API_KEY" in text
        assert "secret-1" not in text
        expect(visit.page.locator(".copied")).to_have_count(0)
    visit.page.reload()
    expect(visit.page.locator("#adapters li")).to_have_count(2)
    visit.page.get_by_role("button", name="Forget it").click()
    expect(visit.page.locator("#key-hint")).to_have_text("This server wants a key. It stays in this tab.")
    expect(visit.page.locator("#adapters li")).to_have_count(0)  # another key may not see them


def test_a_server_without_keys_asks_for_none(visiting: Visiting, url: str) -> None:
    page = visiting(url).page
    expect(page.locator("#adapters li")).to_have_count(2)
    expect(page.get_by_label("API key")).to_be_hidden()


def test_throughput_is_hidden_from_keys_that_may_not_monitor(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.may_monitor = False
    page = visiting(url, allowed=(403,)).page
    expect(page.locator("#live-note")).to_have_text("Charts need a key that may read /metrics.")
    expect(page.locator("#charts")).to_be_hidden()
    expect(page.locator("#adapters li")).to_have_count(2)


def test_the_charts_show_the_metrics(visiting: Visiting, url: str) -> None:
    page = visiting(url).page
    figures = page.locator("#charts output")
    expect(figures.nth(1)).to_have_text("3")
    expect(figures.nth(2)).to_have_text("2")
    expect(figures.nth(3)).to_have_text("25%")
    # The fake adds 100 tokens a scrape, at most every two seconds. The first rate needs two samples.
    expect(figures.nth(0)).to_have_text(re.compile("^[1-9]"))
    assert 0 < float(figures.nth(0).text_content() or "") <= 60
    charts = page.get_by_role("img", name="over the last 5 minutes")
    expect(charts).to_have_count(4)
    rates = charts.first.locator("canvas")
    wait_until(lambda: rates.evaluate(NUM_PAINTED) > 0, "a line from one rate to the next")
    expect(charts.nth(1)).to_have_accessible_name("Running over the last 5 minutes: now 3, at most 3")
    expect(charts.nth(3)).to_have_accessible_name("KV cache over the last 5 minutes: now 25%, at most 25%")
    for chart in charts.all():
        assert chart.locator("canvas").evaluate(NUM_PAINTED) > 0


def test_a_chart_shows_the_value_under_the_pointer(visiting: Visiting, url: str, fake: FakeApi) -> None:
    visit = visiting(url)
    page = visit.page
    rates, running = page.locator(".chart").nth(0), page.locator(".chart").nth(1)
    expect(running.locator("output")).to_have_text("3")
    fake.num_running = 5
    visit.look_again()
    expect(running.locator("output")).to_have_text("5")
    expect(running.locator(".hint")).to_have_text("max 5")
    box = running.locator(".plot").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2, box["y"] + 10)
    expect(running.locator("output")).to_have_text("3")
    expect(running.locator(".hint")).to_contain_text("ago")
    # Regression: the oldest rate was 0, although it had not been measured.
    expect(rates.locator("output")).to_have_text(re.compile("^[1-9]"))
    page.mouse.move(0, 0)
    expect(running.locator("output")).to_have_text("5")
    expect(running.locator(".hint")).to_have_text("max 5")


def test_an_adapter_that_is_damaged_is_shown_with_its_first_fault(visiting: Visiting, url: str, fake: FakeApi) -> None:
    """Regression: the list left the adapter out, and its publisher looked for it in vain."""
    fake.faulty = [
        {"name": "broken", "faults": ["adapter_config.json: r is 0, expected at least 1", "no lora.basis", MARKUP]},
        {"name": "torn", "faults": ["adapter_model.safetensors: is cut off"]},
    ]
    visit = visiting(url)
    page = visit.page
    damaged = page.get_by_role("list", name="Damaged adapters").get_by_role("listitem")
    expect(damaged).to_have_text(
        [
            "brokendamagedadapter_config.json: r is 0, expected at least 1 (and 2 more)",
            "torndamagedadapter_model.safetensors: is cut off",
        ]
    )
    expect(damaged.get_by_role("checkbox")).to_have_count(0)
    page.get_by_role("searchbox").fill("orn")
    expect(damaged).to_have_count(1)
    page.get_by_role("searchbox").fill("")
    fake.faulty = []
    visit.look_again()
    expect(damaged).to_have_count(0)


def test_adapters_on_two_bases_have_only_a_cosine(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row(f"adapter-{i}") for i in range(20)]
    page = visiting(url).page
    for i in range(18):
        page.get_by_role("checkbox", name=f"adapter-{i}", exact=True).check()
    page.locator("#compare").scroll_into_view_if_needed()
    expect(page.get_by_role("columnheader")).to_have_count(16)
    cell = page.locator("#matrix td[data-row='0'][data-column='1']")
    expect(cell).to_have_text("−0.180")
    page.get_by_role("radio", name="Overlap").check()
    expect(cell).to_have_text("–")
    cell.hover()
    expect(page.locator("#compare-detail")).to_contain_text("on two bases")


def test_the_matrix_shows_the_weights_on_each_other_s_prompts(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row(f"adapter-{i}") for i in range(4)]
    page = visiting(url).page
    page.locator("#compare").scroll_into_view_if_needed()
    page.get_by_role("radio", name="Automatic weight").check()
    rows = page.get_by_role("grid").locator("tbody tr")
    shown = ["0.00 – 0.02 0.03", "– 0.11 0.12 0.13", "0.20 0.21 0.22 0.23", "0.30 0.31 0.32 0.33"]
    expect(rows).to_have_text([f"adapter-{i}{cells.replace(' ', '')}" for i, cells in enumerate(shown)])
    expect(page.locator("#matrix .legend")).to_have_text("00.32 on another's prompts")
    page.locator("#matrix td[data-row='2'][data-column='3']").hover()
    expect(page.locator("#compare-detail")).to_contain_text(
        "on prompts of adapter-2, adapter-3 gets 23% of the automatic weights"
    )


def test_a_figure_has_enough_contrast_on_every_colour(visiting: Visiting, url: str, fake: FakeApi) -> None:
    fake.adapters = [row(f"adapter-{i}") for i in range(16)]
    page = visiting(url, reduced_motion="reduce").page
    boxes = page.locator("#adapters").get_by_role("checkbox")
    expect(boxes).to_have_count(16)  # `all` does not wait for more
    for box in boxes.all():
        box.check()
    page.locator("#compare").scroll_into_view_if_needed()
    expect(page.get_by_role("columnheader")).to_have_count(16)
    shares = page.evaluate("[...document.querySelectorAll('#matrix td')].map((cell) => cell.style.getPropertyValue('--share'))")
    assert {f"{10 * i:.1f}%" for i in range(11)} <= {*shares}
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(PALE) == [], scheme


def test_a_server_that_is_gone_is_reported(visiting: Visiting, fake: FakeApi) -> None:
    with served(fake) as client:
        visit = visiting(str(client.base_url).rstrip("/"))
        expect(visit.page.locator("#adapters li")).to_have_count(2)
    visit.page.locator("#prompt").fill("x")
    visit.run()
    expect(visit.answer("base", ".fault")).to_have_text("The server does not answer. Is it running?")
    expect(visit.page.locator("#adapters-note")).to_have_text("The server does not answer. Is it running?")
    visit.faults[:] = [fault for fault in visit.faults if "ERR_CONNECTION" not in fault]


def test_a_proxy_s_refusal_without_json_is_shown(visiting: Visiting, url: str) -> None:
    visit = visiting(url, allowed=(502,))
    visit.page.route("**/generate", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    visit.ask(prompt="x")
    expect(visit.answer("base", ".fault")).to_have_text("The server answered 502.")
