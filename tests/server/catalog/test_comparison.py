"""GET /adapters/compare, and the pairs that it caches."""

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerFast

from lori.auto_weights import TEMPERATURE
from lori.base_model import BaseModel
from lori.compare.pairs import ModuleComparison, compare
from lori.errors import AdapterError
from lori.gaussians import joined
from lori.prompt_statistics import PromptStatistics
from lori.store.store import AdapterStore
from lori.summary import summarise
from server.access.caller import Caller
from server.catalog.comparison import Comparer
from server.engine.adapters.registry import Registered, Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.loading import make_registry
from server.routes import comparison
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.lori.features import make_adapters, make_background
from tests.server.keyed import ACME, OTHER, bearer, make_service, write_keys
from tests.server.live import LIMIT_S, Live, serve_here, wait_until
from tests.server.replies import refusal
from tests.server.rig import FakeEngine, write_adapter

NAMES = ("math", "safety", "intent")


@pytest.fixture
def store(adapters: Path, tmp_path: Path) -> Path:
    """Return a copy of the adapters, which may be changed."""
    return shutil.copytree(adapters, tmp_path / "adapters")


def registered(store: Path, base: BaseModel) -> list[Registered]:
    entries = AdapterStore(store).current()
    registry = make_registry(entries, summarise(entries, base.identity))
    return [registry.by_name[name] for name in NAMES]


def ask(live: Live, *names: str) -> dict[str, Any]:
    reply = live.client.get("/adapters/compare", params={"names": ",".join(names)})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_the_matrices_hold_the_values_of_lori_compare(live: Live, adapters: Path) -> None:
    reply = ask(live, *NAMES)
    assert set(reply) == {"names", "cosine", "overlap", "sign_conflict", "chance_overlap", "auto_weight"}
    assert reply["names"] == list(NAMES)
    loaded = [AdapterStore(adapters).find(name).load() for name in NAMES]
    for i, a in enumerate(loaded):
        for j, b in enumerate(loaded):
            total = compare(a, b).total
            for key in ("cosine", "overlap", "sign_conflict", "chance_overlap"):
                value, expected = reply[key][i][j], getattr(total, key)
                assert value == (None if expected is None else pytest.approx(expected, abs=1e-9)), (key, a.name, b.name)
    assert reply["overlap"][0][2] is None, "intent is on another basis"
    assert [reply["overlap"][i][i] for i in range(3)] == [1.0] * 3
    assert reply["auto_weight"] == [[None] * 3] * 3, "the base has no background"


def test_the_order_is_the_one_asked_for(live: Live) -> None:
    one, other = ask(live, "math", "safety"), ask(live, "safety", "math")
    assert other["names"] == ["safety", "math"]
    assert one["cosine"][0][1] == other["cosine"][1][0] == other["cosine"][0][1]


def test_one_adapter_is_compared_with_itself(live: Live) -> None:
    assert ask(live, "math")["cosine"] == [[pytest.approx(1.0)]]


@pytest.mark.parametrize(
    ("names", "status", "message"),
    [
        ("", 400, "has 0 names, expected 1 to 16"),
        (",".join(["math"] * 17), 400, "has 17 names, expected 1 to 16"),
        ("math,math", 400, "has 'math' twice"),
        ("math,", 404, "there is no adapter ''"),
        ("math,safty", 404, "there is no adapter 'safty': did you mean 'safety'?"),
        ("../math", 404, "there is no adapter '../math'"),
    ],
)
def test_names_that_cannot_be_compared_are_refused(live: Live, names: str, status: int, message: str) -> None:
    error = refusal(live.client.get("/adapters/compare", params={"names": names}), status)
    assert message in error["message"]
    assert error["param"] == "names"


def test_a_request_without_names_is_refused_by_its_parameter(live: Live) -> None:
    assert refusal(live.client.get("/adapters/compare"), 400)["param"] == "names"


def test_a_comparison_is_in_the_description(live: Live) -> None:
    route = live.client.get("/openapi.json").json()["paths"]["/adapters/compare"]["get"]
    assert route["parameters"][0]["name"] == "names"


def test_a_pair_is_compared_once(store: Path, writer: BaseModel) -> None:
    rests: list[float] = []
    comparer = Comparer(rest=rests.append)
    math, safety, intent = registered(store, writer)
    first = comparer.compare([math, safety])
    num_rests = len(rests)
    assert num_rests
    # The files are gone, so a read would fail.
    shutil.rmtree(store)
    assert comparer.compare([safety, math])[1][0] == first[0][1]
    assert len(rests) == num_rests
    with pytest.raises(AdapterError, match="cannot be read"):
        comparer.compare([math, safety, intent])


def test_a_new_adapter_is_compared_with_those_that_are_known(store: Path, writer: BaseModel) -> None:
    comparer, at_once = Comparer(rest=lambda _: None), Comparer(rest=lambda _: None)
    asked = registered(store, writer)
    comparer.compare(asked[:2])
    for row, expected in zip(comparer.compare(asked), at_once.compare(asked), strict=True):
        assert [pair.cosine for pair in row] == pytest.approx([pair.cosine for pair in expected], abs=1e-12)
        assert [pair.overlap for pair in row] == [pair.overlap for pair in expected]


def test_the_least_recently_requested_pairs_are_forgotten(store: Path, writer: BaseModel) -> None:
    rests: list[float] = []
    comparer = Comparer(max_pairs=3, rest=rests.append)
    math, safety, intent = registered(store, writer)
    table = comparer.compare([math, safety, intent])
    assert all(isinstance(pair, ModuleComparison) for row in table for pair in row), (
        "the table is whole though it has more pairs than are cached"
    )
    comparer.compare([math, safety])
    rests.clear()
    comparer.compare([math, safety])
    assert not rests
    comparer.compare([intent])
    assert rests


def test_names_of_one_content_are_one_adapter(store: Path, writer: BaseModel) -> None:
    math, *_ = registered(store, writer)
    table = Comparer(rest=lambda _: None).compare([math, math])
    assert [[pair.overlap for pair in row] for row in table] == [[1.0, 1.0], [1.0, 1.0]]


def test_the_comparer_rests_as_long_as_it_worked(store: Path, writer: BaseModel) -> None:
    now = 0.0
    rests: list[float] = []

    def clock() -> float:
        nonlocal now
        now += 0.25
        return now

    comparer = Comparer(rest=rests.append, clock=clock)
    comparer.compare(registered(store, writer)[:2])
    assert set(rests) == {0.25}
    rests.clear()
    background = make_background()
    comparer.auto_weights(background, [*make_adapters(background), None])
    assert rests == [0.25] * 3


def test_a_row_has_the_weights_on_its_adapter_s_prompts() -> None:
    background = make_background()
    one, other, _ = make_adapters(background)
    both = PromptStatistics("c" * 64, background.digest, joined([one.gaussians, other.gaussians]))
    table = Comparer(rest=lambda _: None).auto_weights(background, [one, None, both])
    # `both` gives a prompt of `one` half the likelihood that `one` gives it.
    larger = 1 / (1 + 0.5 ** (1 / TEMPERATURE))
    assert table[0] == [pytest.approx(larger, abs=0.03), None, pytest.approx(1 - larger, abs=0.03)]
    assert table[1] == [None] * 3
    assert table[2] == [pytest.approx(larger / 2, abs=0.03), None, pytest.approx(1 - larger / 2, abs=0.03)]


def test_an_adapter_that_was_changed_on_disk_is_not_compared(store: Path, writer: BaseModel) -> None:
    asked = registered(store, writer)
    shutil.rmtree(store / "math")
    write_adapter(store / "math", writer, seed=9)
    with pytest.raises(AdapterError, match="'math' was changed on disk"):
        Comparer(rest=lambda _: None).compare(asked[:2])


class SlowComparer(Comparer):
    """A comparer that waits until it may go on."""

    may_go_on = threading.Event()
    num_begun = 0

    def compare(self, asked: Sequence[Registered]) -> list[list[ModuleComparison]]:
        SlowComparer.num_begun += 1
        assert self.may_go_on.wait(LIMIT_S)
        return super().compare(asked)


def test_one_comparison_runs_at_a_time_and_few_wait(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, store: Path, writer: BaseModel
) -> None:
    monkeypatch.setattr("server.app.Comparer", SlowComparer)
    monkeypatch.setattr(comparison, "MAX_WAITING", 2)
    registry = Registry(registered(store, writer))
    engine = EngineThread(cast(Engine, FakeEngine()))
    service = Service(Settings(), "fake", registry, Admission(tokenizer, registry, 100), engine, Metrics("fake"))
    with serve_here(service) as client, ThreadPoolExecutor(4) as pool:
        url = "/adapters/compare?names=math,safety"
        # A refused request does not wait, so the queue is full once one was refused.
        asked = [pool.submit(client.get, url)]
        wait_until(lambda: SlowComparer.num_begun == 1, "the first")
        asked += [pool.submit(client.get, url) for _ in range(3)]
        wait_until(lambda: any(reply.done() for reply in asked), "one that is refused")
        assert SlowComparer.num_begun == 1
        assert client.get("/ready").status_code == 200
        SlowComparer.may_go_on.set()
        assert sorted(reply.result().status_code for reply in asked) == [200, 200, 200, 429]


def test_one_tenant_s_comparisons_do_not_cause_a_refusal_of_another_s(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, store: Path, writer: BaseModel, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.app.Comparer", SlowComparer)
    monkeypatch.setattr(SlowComparer, "may_go_on", threading.Event())
    monkeypatch.setattr(comparison, "MAX_WAITING", 2)
    service = make_service(tokenizer, write_keys(tmp_path), registry=Registry(registered(store, writer)))
    with serve_here(service) as client, ThreadPoolExecutor(8) as pool:

        def compare(key: str) -> int:
            return client.get("/adapters/compare?names=math,safety", headers=bearer(key)).status_code

        flood = [pool.submit(compare, ACME) for _ in range(5)]
        wait_until(lambda: sum(one.done() for one in flood) == 2, "those that are refused")
        other = pool.submit(compare, OTHER)
        wait_until(lambda: service.limiter.num_under_way(Caller(tenant="other")) == 1 or other.done(), "the other tenant")
        SlowComparer.may_go_on.set()
        assert other.result() == 200
        assert sorted(one.result() for one in flood) == [200, 200, 200, 429, 429]


def test_an_adapter_that_cannot_be_read_is_reported_without_its_path(
    tokenizer: PreTrainedTokenizerFast, store: Path, writer: BaseModel
) -> None:
    registry = Registry(registered(store, writer))
    engine = EngineThread(cast(Engine, FakeEngine()))
    service = Service(Settings(), "fake", registry, Admission(tokenizer, registry, 100), engine, Metrics("fake"))
    (store / "math" / "adapter_model.safetensors").write_bytes(b"no")
    with serve_here(service) as client:
        error = refusal(client.get("/adapters/compare?names=math,safety"), 500)
    assert error["type"] == "AdapterError"
    assert "adapter 'math' cannot be read: " in error["message"]
    assert str(store) not in error["message"]
