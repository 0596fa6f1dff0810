"""The bridge between asyncio and the engine, with engines that a test can make fail."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest

from server.engine.engine import Engine
from server.engine.generate_request import GenerateRequest
from server.engine.request import DoneEvent, ErrorEvent, Event, Request, TextEvent
from server.engine.thread import EngineDeadError, EngineThread
from tests.server.live import LIMIT_S
from tests.server.rig import FakeEngine, build, request


def bridge(engine: FakeEngine | Engine) -> EngineThread:
    return EngineThread(cast(Engine, engine))


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


async def listen(events: AsyncGenerator[Event, None]) -> list[Event]:
    async with aclosing(events):
        return [event async for event in events]


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def named(name: str) -> Request:
    return request(name=name)


WHOLE = [TextEvent("x")] * 3 + [DoneEvent("length", 1, 3)]


def test_each_request_receives_its_own_events_in_order() -> None:
    async def test() -> None:
        engine = FakeEngine()
        thread = bridge(engine)
        thread.start()
        heard = await asyncio.gather(*(listen(thread.generate(named(f"request {i}"))) for i in range(20)))
        assert heard == [WHOLE] * 20
        assert thread.num_requests == 0
        await thread.stop()
        assert engine.threads == {"engine"}, "no step runs on the event loop"

    run(test())


def test_requests_are_counted_until_they_end() -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=10**9)
        thread = bridge(engine)
        thread.start()
        one, other = thread.generate(named("one")), thread.generate(named("other"))
        await anext(one)
        assert thread.num_requests == 1
        await anext(other)
        assert thread.num_requests == 2
        await one.aclose()
        assert thread.num_requests == 1
        await other.aclose()
        assert thread.num_requests == 0
        await thread.stop()

    run(test())


def test_closing_a_generator_aborts_only_its_request() -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=10**9)
        thread = bridge(engine)
        thread.start()
        one, other = thread.generate(named("one")), thread.generate(named("other"))
        assert await anext(one) == await anext(other) == TextEvent("x")
        await one.aclose()
        await until(lambda: engine.aborted == ["one"])
        assert await anext(other) == TextEvent("x")
        await other.aclose()
        await until(lambda: engine.aborted == ["one", "other"])
        await thread.stop()

    run(test())


def test_cancelling_the_listening_task_aborts_the_request() -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=10**9)
        thread = bridge(engine)
        thread.start()
        task = asyncio.create_task(listen(thread.generate(named("one"))))
        await until(lambda: engine.step_count > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.aborted == ["one"])
        await thread.stop()

    run(test())


def test_when_the_engine_dies_every_request_receives_an_error() -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=10**9, dies_at=50)
        thread = bridge(engine)
        thread.start()
        assert thread.is_alive
        heard = await asyncio.gather(*(listen(thread.generate(named(f"request {i}"))) for i in range(5)))
        for events in heard:
            assert isinstance(events[-1], ErrorEvent)
            assert "out of luck" in events[-1].message
            assert set(events[:-1]) <= {TextEvent("x")}
        assert not thread.is_alive
        assert thread.has_died
        assert thread.num_requests == 0
        assert isinstance(await anext(thread.generate(named("late"))), ErrorEvent)
        await thread.stop()

    run(test())


class Exiting(FakeEngine):
    """An engine that ends its thread with SystemExit, as Python itself does."""

    def step(self) -> None:
        raise SystemExit("enough")


def test_an_engine_that_ends_its_thread_has_died_too() -> None:
    async def test() -> None:
        thread = bridge(Exiting())
        thread.start()
        [event] = await listen(thread.generate(named("one")))
        assert isinstance(event, ErrorEvent)
        assert "enough" in event.message
        assert thread.has_died
        await thread.stop()

    run(test())


def test_a_request_between_the_engine_s_death_and_its_last_event_receives_an_error_too() -> None:
    """The thread has ended, and its last event waits on the event loop. A request submitted now must not wait for ever."""

    async def test() -> None:
        engine = FakeEngine(dies_at=1)
        engine.may_step.clear()
        others = {*threading.enumerate()}
        thread = bridge(engine)
        thread.start()
        first = asyncio.create_task(listen(thread.generate(named("first"))))
        await until(lambda: "first" in engine.emits)
        late = asyncio.create_task(listen(thread.generate(named("late"))))
        # Until the next await the event loop does not run, and `late` is before the engine's last event in its queue.
        engine.may_step.set()
        end = time.monotonic() + LIMIT_S
        while any(one.name == "engine" for one in {*threading.enumerate()} - others):
            assert time.monotonic() < end
            time.sleep(0.001)
        assert thread.is_alive, "the engine's last event still waits on the event loop"
        for events in await asyncio.gather(first, late):
            assert isinstance(events[-1], ErrorEvent)
        assert not thread.is_alive
        await thread.stop()

    run(test())


def test_an_engine_that_was_never_started_answers_with_an_error() -> None:
    async def test() -> None:
        assert isinstance(await anext(bridge(FakeEngine()).generate(named("early"))), ErrorEvent)

    run(test())


def test_requests_that_wait_when_the_engine_stops_receive_an_error() -> None:
    async def test() -> None:
        thread = bridge(FakeEngine(num_steps=10**9))
        thread.start()
        task = asyncio.create_task(listen(thread.generate(named("one"))))
        await until(lambda: thread.num_requests == 1)
        await thread.stop()
        events = await task
        assert isinstance(events[-1], ErrorEvent)
        assert "stopping" in events[-1].message
        assert not thread.is_alive
        assert not thread.has_died

    run(test())


@pytest.mark.slow
def test_an_idle_engine_sleeps() -> None:
    async def test() -> None:
        engine = FakeEngine()
        thread = bridge(engine)
        thread.start()
        await asyncio.sleep(0.3)  # a loop that polls for work would have polled thousands of times
        assert engine.step_count == 0
        assert engine.num_asked <= 1
        await listen(thread.generate(named("one")))
        await until(lambda: engine.aborted == ["one"])
        num_asked = engine.num_asked
        await asyncio.sleep(0.3)
        assert engine.step_count == 3
        assert engine.num_asked <= num_asked + 1
        await thread.stop()

    run(test())


def test_a_request_of_several_choices_lasts_until_all_choices_have_ended() -> None:
    async def test() -> None:
        thread = bridge(FakeEngine())
        thread.start()
        heard = await listen(thread.generate(request(name="one", num_choices=3)))
        for choice in range(3):
            own = [event for event in heard if not isinstance(event, ErrorEvent) and event.choice == choice]
            assert own == [TextEvent("x", choice=choice)] * 3 + [DoneEvent("length", 1, 3, choice)]
        assert thread.num_requests == 0
        await thread.stop()

    run(test())


def test_an_engine_that_waits_for_a_deadline_steps_when_it_comes() -> None:
    async def test() -> None:
        engine = FakeEngine(deadline=0.05)
        thread = bridge(engine)
        thread.start()
        await until(lambda: engine.step_count >= 2)
        await thread.stop()

    run(test())


@pytest.mark.parametrize("deadline", [float("inf"), 1e300])
def test_a_deadline_beyond_the_longest_wait_of_a_lock_is_harmless(deadline: float) -> None:
    async def test() -> None:
        engine = FakeEngine(deadline=deadline)
        thread = bridge(engine)
        thread.start()
        assert await listen(thread.generate(named("one"))) == WHOLE
        await asyncio.sleep(0.05)
        assert thread.is_alive
        await thread.stop()

    run(test())


def test_an_adapter_that_was_read_wakes_a_sleeping_engine(writer_model: Path, adapters: Path) -> None:
    async def test() -> None:
        rig = build(writer_model, adapters)
        thread = bridge(rig.engine)
        thread.start()
        asks = [GenerateRequest(prompt="a", max_tokens=3, adapters=(name,)) for name in ("math", "safety", "math")]
        heard = await asyncio.gather(*(listen(thread.generate(rig.admission.admit(ask))) for ask in asks))
        for events in heard:
            assert isinstance(events[-1], DoneEvent)
        await thread.stop()

    run(test())


@pytest.mark.parametrize("dies_at", [None, 1])
def test_the_loader_s_thread_ends_with_the_engine(dies_at: int | None) -> None:
    async def test() -> None:
        engine = FakeEngine(dies_at=dies_at)
        thread = bridge(engine)
        thread.start()
        await listen(thread.generate(named("one")))
        await thread.stop()
        assert engine.adapter_cache.is_closed

    run(test())


def test_a_real_engine_frees_the_blocks_of_a_closed_request(writer_model: Path) -> None:
    async def test() -> None:
        rig = build(writer_model)
        thread = bridge(rig.engine)
        thread.start()
        events = thread.generate(rig.admission.admit(GenerateRequest(prompt="a", max_tokens=400)))
        await anext(events)
        await events.aclose()
        await until(lambda: not rig.scheduler.has_work)
        await thread.stop()
        rig.scheduler.check_integrity()
        assert rig.scheduler.kv_cache.num_available == rig.scheduler.kv_cache.num_blocks

    run(test())


def test_a_call_runs_on_the_engine_s_thread_and_returns_its_result() -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=10**9)
        thread = bridge(engine)
        thread.start()
        name = threading.current_thread().name
        assert await thread.call(lambda _: threading.current_thread().name) == "engine" != name
        running = thread.generate(named("one"))
        await anext(running)
        # These run between two steps of the running request.
        assert await asyncio.gather(*(thread.call(lambda engine, i=i: (i, engine.step_count > 0)) for i in range(5))) == [  # type: ignore[misc]
            (i, True) for i in range(5)
        ]
        await running.aclose()
        await thread.stop()

    run(test())


def test_an_error_of_a_call_is_raised_in_its_caller_and_does_not_end_the_engine() -> None:
    def fail(_: object) -> None:
        raise KeyError("nothing of the kind")

    async def test() -> None:
        thread = bridge(FakeEngine())
        thread.start()
        with pytest.raises(KeyError, match="nothing of the kind"):
            await thread.call(fail)
        assert await listen(thread.generate(named("one"))) == WHOLE
        await thread.stop()

    run(test())


def test_a_call_whose_caller_was_cancelled_is_done_all_the_same() -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=10**9)
        engine.may_step.clear()
        thread, done = bridge(engine), threading.Event()
        thread.start()
        running = asyncio.create_task(listen(thread.generate(named("one"))))
        await asyncio.sleep(0)
        call = asyncio.create_task(thread.call(lambda _: done.set()))
        await asyncio.sleep(0)
        call.cancel()
        engine.may_step.set()
        await until(done.is_set)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await thread.stop()

    run(test())


class Watched(FakeEngine):
    """An engine that shows when it is in its first step."""

    is_in_step = False

    def step(self) -> None:
        self.is_in_step = True
        super().step()


def test_calls_raise_when_the_engine_dies() -> None:
    async def test() -> None:
        engine = Watched(num_steps=10**9, dies_at=1)
        engine.may_step.clear()
        thread = bridge(engine)
        thread.start()
        running = asyncio.create_task(listen(thread.generate(named("one"))))
        await until(lambda: engine.is_in_step)
        call = asyncio.create_task(thread.call(lambda _: None))
        await asyncio.sleep(0)
        engine.may_step.set()
        with pytest.raises(EngineDeadError, match="out of luck"):
            await call
        await running
        with pytest.raises(EngineDeadError):
            await thread.call(lambda _: None)
        await thread.stop()

    run(test())
