"""Weights of prompts over the bridge between asyncio and the engine, which may end while prompts are queued."""

import asyncio
from dataclasses import dataclass, field
from typing import cast

import pytest

from lori.auto_weights import PromptQuery, Shares
from server.engine.engine import Engine
from server.engine.prompt_weights import IsWanted, OnOutcome, ProbeError
from server.engine.thread import EngineDeadError, EngineThread
from tests.server.engine.test_thread import listen, named, run, until
from tests.server.rig import FakeEngine

QUERIES = [cast(PromptQuery[Shares], None)] * 2
SHARES = Shares((1.0,), 0.0)


@dataclass
class FakeWeigher:
    """A weigher that keeps its prompts until a test settles them."""

    queued: list[tuple[tuple[int, str], IsWanted, OnOutcome]] = field(default_factory=list)
    """The priority and the tenant of each, whether it is wanted, and what takes its outcome."""

    def submit(self, _: PromptQuery[Shares], priority: int, tenant: str, is_wanted: IsWanted, on_outcome: OnOutcome) -> None:
        self.queued.append(((priority, tenant), is_wanted, on_outcome))


@dataclass
class WeighingEngine(FakeEngine):
    """A fake engine with a fake weigher."""

    weigher: FakeWeigher = field(default_factory=FakeWeigher)


@dataclass
class FakeClient:
    """A client that leaves when a test says so."""

    has_left: bool = False

    async def check_present(self) -> None:
        if self.has_left:
            raise ConnectionError("the client has left")


async def queued(engine: WeighingEngine, client: FakeClient | None = None) -> tuple[EngineThread, asyncio.Task[object]]:
    """Start the engine's thread and queue two prompts. Return the thread and the task that waits for their shares."""
    thread = EngineThread(cast(Engine, engine))
    thread.start()
    check_present = (client or FakeClient()).check_present
    task: asyncio.Task[object] = asyncio.create_task(thread.evaluate(QUERIES, 3, "tenant", check_present))
    await until(lambda: len(engine.weigher.queued) == 2)
    assert all(is_wanted() for _, is_wanted, _ in engine.weigher.queued)
    return thread, task


def test_shares_come_back_in_the_order_of_their_prompts() -> None:
    async def test() -> None:
        engine = WeighingEngine()
        thread, task = await queued(engine)
        (place, _, first), (_, _, second) = engine.weigher.queued
        assert place == (3, "tenant")
        second(Shares((0.0,), 1.0))
        first(SHARES)
        assert await task == [SHARES, Shares((0.0,), 1.0)]
        await thread.stop()

    run(test())


def test_an_error_is_raised_and_the_other_prompts_are_not_wanted_any_more() -> None:
    async def test() -> None:
        engine = WeighingEngine()
        thread, task = await queued(engine)
        (_, _, first), (_, is_wanted, second) = engine.weigher.queued
        first(ProbeError("no luck"))
        with pytest.raises(ProbeError, match="no luck"):
            await task
        assert not is_wanted()
        second(SHARES)  # nobody waits
        assert await listen(thread.generate(named("one")))
        await thread.stop()

    run(test())


def test_prompts_of_a_cancelled_caller_are_not_wanted() -> None:
    async def test() -> None:
        engine = WeighingEngine()
        thread, task = await queued(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any(is_wanted() for _, is_wanted, _ in engine.weigher.queued)
        await thread.stop()

    run(test())


@pytest.mark.parametrize("num_settled", range(len(QUERIES) + 1))
def test_prompts_of_a_client_that_has_left_are_not_wanted(num_settled: int) -> None:
    """Regression: a departed client's prompts were weighed, and its request then began to run."""

    async def test() -> None:
        engine, client = WeighingEngine(), FakeClient()
        thread, task = await queued(engine, client)
        client.has_left = True
        for _, _, on_outcome in engine.weigher.queued[:num_settled]:
            on_outcome(SHARES)
        with pytest.raises(ConnectionError):
            await task
        assert not any(is_wanted() for _, is_wanted, _ in engine.weigher.queued)
        await thread.stop()

    run(test())


def test_when_the_engine_stops_queued_prompts_fail() -> None:
    async def test() -> None:
        engine = WeighingEngine()
        thread, task = await queued(engine)
        await thread.stop()
        with pytest.raises(EngineDeadError, match="the server is stopping"):
            await task
        with pytest.raises(EngineDeadError):
            await thread.evaluate(QUERIES, 3, "tenant", FakeClient().check_present)

    run(test())


def test_when_the_engine_dies_queued_prompts_fail() -> None:
    async def test() -> None:
        engine = WeighingEngine(num_steps=10**9, dies_at=1)
        thread, task = await queued(engine)
        await listen(thread.generate(named("one")))
        with pytest.raises(EngineDeadError, match="out of luck"):
            await task
        await thread.stop()

    run(test())
