"""The playground in a browser: named merges, which are listed beside the adapters and asked by their names."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from playwright.sync_api import Route, expect

from lori.base_model import load_base_model
from lori.named_merge import MergedAdapter
from lori.store.store import AdapterStore
from server.loading import load_service
from server.settings import Settings
from tests.server.live import serve_here
from tests.server.playground.conftest import Visiting
from tests.server.replies import FOX
from tests.server.rig import write_adapters, write_merge

TERMS = {"both": {"math": (0.75, []), "safety": (-0.25, [])}, "deep": {"math": (-0.5, [0.5, 1.5]), "safety": (1.0, [2.0, -1.0])}}


@pytest.fixture(scope="module")
def client(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a server with the merges `both` and `deep`; the weights of `deep` depend on the layer."""
    place = tmp_path_factory.mktemp("merges")
    base = load_base_model(str(writer_model), torch.float32, "eager")
    store = AdapterStore(write_adapters(place / "adapters", base))
    for name, terms in TERMS.items():
        adapters = [
            MergedAdapter(reference=f"{part}@{store.find(part).version}", weight=weight, block_weights=blocks)
            for part, (weight, blocks) in terms.items()
        ]
        write_merge(place / "merges", name, base.identity.digest, adapters)
    settings = Settings(
        model=str(writer_model),
        adapters=str(store.root),
        merges=place / "merges",
        demo_adapters=False,
        dtype="float32",
        kv_cache_gib=0.05,
    )
    with serve_here(load_service(settings)) as client:
        yield client


def test_named_merges_are_listed_and_searched(visiting: Visiting, client: httpx.Client) -> None:
    page = visiting(f"{str(client.base_url).rstrip('/')}/").page
    expect(page.locator("#adapters .name")).to_have_text(["both", "deep", "intent", "math", "safety"])
    expect(page.locator("#adapters-note")).to_have_text("3 adapters, 2 merges")
    details = page.locator("#adapters .detail")
    expect(details.nth(0)).to_have_text("named merge: 0.75 math − 0.25 safety")
    expect(details.nth(1)).to_have_text("named merge: −0.5 math + 1 safety · times weights in 2 blocks")
    page.get_by_role("searchbox", name="Search adapters").fill("dee")
    expect(page.locator("#adapters .name")).to_have_text(["deep"])
    expect(page.locator("#adapters-note")).to_have_text("1 of 5 adapters and merges")


def test_a_named_merge_is_asked_by_its_name(visiting: Visiting, client: httpx.Client) -> None:
    visit = visiting(f"{str(client.base_url).rstrip('/')}/")
    for name in TERMS:
        visit.page.get_by_role("checkbox", name=name, exact=True).check()
        visit.ask(prompt=FOX, max_tokens="12")
        reply = client.post("/generate", json={"prompt": FOX, "max_tokens": 12, "adapter": name}).raise_for_status().json()
        assert visit.text("mix") == reply["text"]
        assert [body["adapter"] for body in visit.bodies() if "adapter" in body][-1] == name
        visit.page.get_by_role("checkbox", name=name, exact=True).uncheck()


def test_the_comparison_leaves_out_merges(visiting: Visiting, client: httpx.Client) -> None:
    visit = visiting(f"{str(client.base_url).rstrip('/')}/")
    visit.page.locator("#compare").scroll_into_view_if_needed()
    names = visit.page.locator("#matrix thead th")
    expect(names).to_have_text(["intent", "math", "safety"])
    visit.pick("both", "math")
    expect(names).to_have_text(["intent", "math", "safety"])
    visit.pick("safety")
    visit.page.locator("#compare").scroll_into_view_if_needed()
    expect(names).to_have_text(["math", "safety"])


def test_a_merge_whose_adapters_are_not_there_says_so(visiting: Visiting, client: httpx.Client) -> None:
    visit = visiting(f"{str(client.base_url).rstrip('/')}/")

    def without(route: Route) -> None:
        reply = client.get("/adapters").json()
        reply["merges"][0]["missing"] = ["safety@0123456789ab"]
        route.fulfill(json=reply)

    visit.page.route("**/adapters", without)
    visit.look_again()
    details = visit.page.locator("#adapters .detail")
    expect(details.nth(0)).to_contain_text("needs safety@0123456789ab, which the server cannot serve")
    expect(visit.page.get_by_role("checkbox", name="both", exact=True)).to_be_disabled()
    expect(visit.page.get_by_role("checkbox", name="deep", exact=True)).to_be_enabled()
