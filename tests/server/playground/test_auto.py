"""The playground in a browser: weights that the prompt gives, shown while somebody writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.server.live import serve_here
from tests.server.playground.conftest import Visit, Visiting, visits_of
from tests.server.service.weighed import make_service, prompts


@pytest.fixture(scope="module")
def url(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server of which `math` and `safety` have statistics of their prompts, and `intent` has none."""
    with serve_here(make_service(writer_model, tmp_path_factory.mktemp("auto"), has_keys=False)) as client:
        yield f"{str(client.base_url).rstrip('/')}/"


def expect_weights(visit: Visit, math: str, safety: str) -> None:
    for name, weight in (("math", math), ("safety", safety)):
        expect(visit.page.get_by_role("spinbutton", name=f"Exact weight of {name}")).to_have_value(weight)


def test_the_weights_follow_the_prompt(visiting: Visiting, url: str) -> None:
    visit = visiting(url)
    auto, base = visit.page.get_by_role("checkbox", name="Weights from the prompt"), visit.page.locator("#base-share")
    expect(auto).to_be_hidden()
    visit.pick("math")
    expect(auto).not_to_be_checked()
    expect(base).to_be_hidden()
    visit.pick("safety")
    expect(auto).to_be_checked()
    expect(base).to_have_text("Write a prompt: it gives the weights.")
    slider = visit.page.get_by_role("slider", name="Weight of math")
    expect(slider).to_be_disabled()
    [sums], [letters], [nobody] = (prompts(name, 1) for name in ("math", "safety", None))
    for prompt, shares in ((sums, ("1", "0", "0")), (letters, ("0", "1", "0")), (nobody, ("0", "0", "1"))):
        visit.page.locator("#prompt").fill(prompt)
        expect_weights(visit, *shares[:2])
        expect(base).to_have_text(f"Base model: {shares[2]}")
    asked = [body["prompt"] for body in visit.bodies()]
    assert asked == [sums, letters, nobody], "asked for each prompt once"
    visit.ask(prompt=sums, max_tokens="4")
    assert [body["weights"] for body in visit.bodies() if body.get("stream") and "adapter" in body] == ["auto"]
    expect(visit.answer("mix", "h3")).to_have_text("Answer: 1.00 math")
    auto.uncheck()
    expect(slider).to_be_enabled()
    expect_weights(visit, "0.5", "0.5")
    visit.ask()
    assert [body["weights"] for body in visit.bodies() if body.get("stream") and "adapter" in body] == ["auto", [0.5, 0.5]]


def test_weights_that_somebody_chose_stay(visiting: Visiting, url: str) -> None:
    visit = visiting(url)
    box, weight = visit.page.locator("#auto"), visit.page.get_by_role("spinbutton", name="Exact weight of math")
    visit.pick("math")
    weight.fill("0.7")
    visit.pick("safety")
    expect(box).not_to_be_checked()
    expect_weights(visit, "0.7", "0.5")
    visit.page.get_by_role("button", name="Remove math").click()
    visit.page.get_by_role("button", name="Remove safety").click()
    visit.pick("math", "safety")
    expect(box).to_be_checked()
    visit.page.get_by_role("button", name="1/n each").click()
    expect(box).not_to_be_checked()
    expect_weights(visit, "0.5", "0.5")


def test_several_adapters_get_the_server_s_default(browser: Browser, writer_model: Path, tmp_path: Path) -> None:
    service = make_service(writer_model, tmp_path, has_keys=False, default_merge="linear")
    with serve_here(service) as client, visits_of(browser) as open_page:
        visit = open_page(f"{str(client.base_url).rstrip('/')}/")
        box = visit.page.locator("#auto")
        visit.pick("math", "safety")
        expect(box).to_be_enabled()
        expect(box).not_to_be_checked()
        expect_weights(visit, "0.5", "0.5")
        box.check()
        visit.page.locator("#prompt").fill(prompts("math", 1)[0])
        expect_weights(visit, "1", "0")


def test_an_adapter_without_statistics_ends_automatic_weights_while_it_is_picked(visiting: Visiting, url: str) -> None:
    visit = visiting(url)
    box = visit.page.locator("#auto")
    visit.pick("math", "safety")
    expect(box).to_be_checked()
    visit.pick("intent")
    expect(box).not_to_be_checked()
    expect(visit.page.get_by_role("slider", name="Weight of intent")).to_be_enabled()
    visit.page.get_by_role("button", name="Remove intent").click()
    expect(box).to_be_checked()
    visit.page.get_by_role("button", name="Remove safety").click()
    expect(box).not_to_be_checked()
    expect(visit.page.get_by_role("spinbutton", name="Exact weight of math")).to_have_value("1")


def test_adapters_without_statistics_and_other_merges_have_none(visiting: Visiting, url: str) -> None:
    visit = visiting(url)
    row, box = visit.page.locator("#auto-row"), visit.page.locator("#auto")
    expect(row).to_be_hidden()
    visit.pick("math")
    box.check()
    visit.pick("intent")
    expect(row).to_have_text("Weights from the prompt intent has no statistics of its prompts")
    expect(box).to_be_disabled()
    visit.page.get_by_role("checkbox", name="intent", exact=True).uncheck()
    expect(row).to_have_text("Weights from the prompt ")
    expect(box).to_be_checked()
    expect(box).to_be_enabled()
    visit.pick("safety")
    visit.page.locator("#merge").select_option("ties")
    expect(row).to_have_text("Weights from the prompt not for ties")
    expect(box).to_be_disabled()


def test_the_server_may_select_the_adapters(visiting: Visiting, url: str) -> None:
    visit = visiting(url)
    visit.pick("intent", "auto")
    expect(visit.page.get_by_role("checkbox", name="intent", exact=True)).not_to_be_checked()
    expect(visit.page.locator("#mix")).to_contain_text("selected by the server")
    expect(visit.page.locator("#auto-row")).to_be_hidden()
    [sums], [nobody] = prompts("math", 1), prompts(None, 1)
    for prompt, selected in ((sums, "math: 1 · Base model: 0"), (nobody, "Base model: 1")):
        visit.page.locator("#prompt").fill(prompt)
        expect(visit.page.locator("#base-share")).to_have_text(selected)
    visit.ask(prompt=sums, max_tokens="4")
    expect(visit.answer("mix", "h3")).to_have_text("Answer: 1.00 math")
    asked = [body for body in visit.bodies() if "adapter" in body]
    assert [(body["adapter"], "weights" in body) for body in asked] == [("auto", False)] * 3
    visit.pick("safety")
    expect(visit.page.get_by_role("checkbox", name="auto", exact=True)).not_to_be_checked()
    expect(visit.page.get_by_role("spinbutton", name="Exact weight of safety")).to_have_value("1")


def test_after_a_passing_failure_the_weights_are_asked_for_again(visiting: Visiting, url: str) -> None:
    visit = visiting(url, allowed=(503,))
    visit.pick("math")
    visit.page.locator("#auto").check()
    answers = [503]

    def answer(route: Route) -> None:
        if not answers:
            route.fallback()
            return
        error = {"message": "not ready", "type": "ServiceUnavailableError", "param": None, "code": 503}
        route.fulfill(status=answers.pop(), json={"error": error})

    visit.page.route("**/generate", answer)
    visit.page.locator("#prompt").fill(prompts("math", 1)[0])
    base = visit.page.locator("#base-share")
    expect(base).to_have_text("not ready")
    visit.look_again()  # the list of adapters is read again, which the page does every few seconds
    expect(base).to_have_text("Base model: 0")


def test_a_refusal_is_shown_in_place_of_the_weights(visiting: Visiting, url: str) -> None:
    visit = visiting(url, allowed=(400,))
    visit.pick("math")
    visit.page.locator("#auto").check()
    visit.page.locator("#prompt").fill("1" * 100_000)
    expect(visit.page.locator("#base-share")).to_contain_text("prompt: ")
