"""Answers of one request or several, and their end when one fails or the client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import anyio
import pytest
from fastapi import Request as HttpRequest
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.request import DoneEvent, ErrorEvent, ErrorKind, Event, Request, TextEvent, TokenLogprob
from server.engine.step import Emit
from server.engine.thread import EngineThread
from server.errors import AdapterFailedError, EngineError, OutOfTimeError, StoppedError
from server.service.answers import Answer, collect, collect_all, interleaved, until_disconnect
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.live import LIMIT_S
from tests.server.rig import FakeEngine, request

FOR_EVER = 10**9


@dataclass
class FailingEngine(FakeEngine):
    """A fake engine that sends the requests in `failing` an error of the given kind in place of their second text."""

    failing: dict[str, ErrorKind] = field(default_factory=dict)

    def submit(self, request: Request, emit: Emit) -> None:
        def fail(event: Event) -> None:
            if self.emitted[request.id] == 2:
                event = ErrorEvent(f"{request.id} is broken", self.failing[request.id])
                self.emits.pop(request.id, None)
            emit(event)

        super().submit(request, fail if request.id in self.failing else emit)


@pytest.fixture
def serve(tokenizer: PreTrainedTokenizerFast) -> Callable[[FakeEngine], Any]:
    """Return a context manager that runs a service on a fake engine."""

    @asynccontextmanager
    async def serving(engine: FakeEngine) -> AsyncGenerator[Service, None]:
        thread = EngineThread(cast(Engine, engine))
        admission = Admission(tokenizer, Registry([]), 100)
        thread.start()
        try:
            yield Service(Settings(), "fake", Registry([]), admission, thread, Metrics("fake"))
        finally:
            await thread.stop()

    return serving


Serve = Callable[[FakeEngine], Any]


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def named(*names: str) -> list[Request]:
    return [request(name=name) for name in names]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_an_answer_s_text_joins_its_parts() -> None:
    first, second = (TokenLogprob("a", place, -1.0, {}) for place in (0, 1))
    answer = Answer(DoneEvent("length", 1, 2), ["a", "", "b"], [first, second])
    assert answer.text == "ab"


def test_each_choice_has_an_answer_of_its_own(serve: Serve) -> None:
    class Counting(FakeEngine):
        def submit(self, request: Request, emit: Emit) -> None:
            def count(event: Event) -> None:
                if isinstance(event, TextEvent):
                    score = TokenLogprob(str(event.choice), 0, -1.0, {})
                    event = replace(event, text=str(event.choice), logprobs=(score,))
                emit(event)

            super().submit(request, count)

    async def test() -> None:
        async with serve(Counting(num_steps=3)) as service:
            answers = await collect(service, request(num_choices=3))
            assert texts(answers) == ["000", "111", "222"]
            assert [answer.done for answer in answers] == [DoneEvent("length", 1, 3, choice) for choice in range(3)]
            assert [[one.token for one in answer.logprobs] for answer in answers] == [["0"] * 3, ["1"] * 3, ["2"] * 3]

    run(test())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("engine", EngineError), ("adapter", AdapterFailedError), ("timeout", OutOfTimeError), ("stop", StoppedError)],
)
def test_a_failure_is_raised_as_the_error_of_its_kind(serve: Serve, kind: ErrorKind, expected: type[EngineError]) -> None:
    async def test() -> None:
        async with serve(FailingEngine(failing={"one": kind, "two": kind})) as service:
            with pytest.raises(EngineError, match="one is broken") as caught:
                await collect(service, *named("one"))
            assert type(caught.value) is expected
            with pytest.raises(EngineError, match="two is broken") as caught:
                await collect_all(service, named("two"))
            assert type(caught.value) is expected, "a single error, not a group"

    run(test())


def test_several_requests_run_together_and_are_answered_in_their_order(serve: Serve) -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=50)
        engine.may_step.clear()
        async with serve(engine) as service:
            task = asyncio.create_task(collect_all(service, [request(name="one"), request(name="two", num_choices=2)]))
            await until(lambda: service.engine.num_requests == 2)
            engine.may_step.set()
            one, two = await task
            assert texts(one) == ["x" * 50]
            assert texts(two) == ["x" * 50] * 2
            assert service.engine.num_requests == 0
            assert await collect_all(service, []) == []

    run(test())


def test_one_failure_ends_all_requests(serve: Serve) -> None:
    async def test() -> None:
        engine = FailingEngine(num_steps=FOR_EVER, failing={"two": "adapter"})
        async with serve(engine) as service:
            with pytest.raises(AdapterFailedError, match="two is broken"):
                await collect_all(service, named("one", "two", "three"))
            assert service.engine.num_requests == 0
            await until(lambda: not engine.emits)

    run(test())


def test_two_failures_are_one_error(serve: Serve) -> None:
    async def test() -> None:
        engine = FailingEngine(num_steps=FOR_EVER, failing={"one": "adapter", "two": "adapter"})
        async with serve(engine) as service:
            with pytest.raises(AdapterFailedError, match="is broken"):
                await collect_all(service, named("one", "two"))
            await until(lambda: not engine.emits)

    run(test())


def test_cancelling_the_collecting_task_aborts_all_requests(serve: Serve) -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=FOR_EVER)
        async with serve(engine) as service:
            task = asyncio.create_task(collect_all(service, named("one", "two")))
            await until(lambda: len(engine.emitted) == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not engine.emits)
            assert service.engine.num_requests == 0

    run(test())


def test_the_events_of_several_requests_come_with_their_places(serve: Serve) -> None:
    async def test() -> None:
        async with serve(FakeEngine(num_steps=3)) as service:
            requests = [request(name="one"), request(name="two", num_choices=2)]
            heard: dict[int, list[Event]] = {0: [], 1: []}
            async with aclosing(interleaved(service, requests)) as events:
                async for place, event in events:
                    heard[place].append(event)
            assert heard[0] == [TextEvent("x")] * 3 + [DoneEvent("length", 1, 3)]
            assert sum(isinstance(event, DoneEvent) for event in heard[1]) == 2
            assert sum(isinstance(event, TextEvent) for event in heard[1]) == 6
            assert [one async for one in interleaved(service, [])] == []

    run(test())


def test_a_failure_among_several_is_an_event_and_the_others_go_on(serve: Serve) -> None:
    """Leave it to the reader to end the others, since a stream has sent text already."""

    async def test() -> None:
        async with serve(FailingEngine(num_steps=4, failing={"two": "engine"})) as service:
            heard: list[tuple[int, Event]] = [one async for one in interleaved(service, named("one", "two"))]
            assert [event for place, event in heard if place == 1] == [TextEvent("x"), ErrorEvent("two is broken")]
            assert [event for place, event in heard if place == 0] == [TextEvent("x")] * 4 + [DoneEvent("length", 1, 4)]

    run(test())


def test_closing_the_events_aborts_all_requests(serve: Serve) -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=FOR_EVER)
        async with serve(engine) as service:
            async with aclosing(interleaved(service, named("one", "two", "three"))) as events:
                heard = set()
                async for place, _ in events:
                    heard.add(place)
                    if len(heard) == 3:
                        break
            assert service.engine.num_requests == 0
            await until(lambda: not engine.emits)
            assert set(engine.aborted) == {"one", "two", "three"}

    run(test())


def test_closing_before_the_first_event_leaves_nothing_behind(serve: Serve) -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=FOR_EVER)
        engine.may_step.clear()
        async with serve(engine) as service:
            await interleaved(service, named("one")).aclose()
            assert service.engine.num_requests == 0
            task = asyncio.create_task(anext(interleaved(service, named("one", "two"))))
            await until(lambda: service.engine.num_requests == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert service.engine.num_requests == 0
            engine.may_step.set()
            await until(lambda: not engine.emits)

    run(test())


def test_our_own_exception_during_a_stream_is_raised_and_ends_all_requests(serve: Serve) -> None:
    """Regression: the exception ended the stream as if all requests were done."""

    async def test() -> None:
        engine = FakeEngine(num_steps=FOR_EVER)
        async with serve(engine) as service:
            generate = service.engine.generate

            async def broken(admitted: Request) -> AsyncGenerator[Event, None]:
                async with aclosing(generate(admitted)) as events:
                    async for event in events:
                        yield event
                        if admitted.id == "two":
                            raise ValueError("a fault of ours")

            service.engine.generate = broken  # type: ignore[method-assign]
            with pytest.raises(ValueError, match="a fault of ours"):
                async for _ in interleaved(service, named("one", "two")):
                    pass
            assert service.engine.num_requests == 0
            await until(lambda: not engine.emits)

    run(test())


def client(*messages: str, leaves: bool = False) -> HttpRequest:
    """Return the request of a client that sends `messages`, and then leaves or waits."""
    sent = [*messages, *(["http.disconnect"] if leaves else [])]

    async def receive() -> dict[str, Any]:
        if not sent:
            await anyio.sleep_forever()
        return {"type": sent.pop(0)}

    return HttpRequest({"type": "http"}, receive)


def test_an_answer_reaches_the_client_that_waits(serve: Serve) -> None:
    async def test() -> None:
        async with serve(FakeEngine(num_steps=3)) as service:
            for http, name in ((client(), "one"), (client("http.request"), "two")):
                answers = await until_disconnect(http, collect(service, *named(name)))
                assert answers is not None
                assert texts(answers) == ["xxx"]

    run(test())


@pytest.mark.parametrize("messages", [(), ("http.request", "http.request")])
def test_when_the_client_leaves_its_requests_are_aborted(serve: Serve, messages: tuple[str, ...]) -> None:
    async def test() -> None:
        engine = FakeEngine(num_steps=FOR_EVER)
        async with serve(engine) as service:
            answers = await until_disconnect(client(*messages, leaves=True), collect_all(service, named("one", "two")))
            assert answers is None
            assert service.engine.num_requests == 0
            await until(lambda: not engine.emits)

    run(test())


def test_a_failure_reaches_the_client_as_one_error(serve: Serve) -> None:
    async def test() -> None:
        async with serve(FailingEngine(num_steps=FOR_EVER, failing={"one": "timeout", "two": "stop"})) as service:
            with pytest.raises(OutOfTimeError, match="one is broken"):
                await until_disconnect(client(), collect(service, *named("one")))
            with pytest.raises(StoppedError, match="two is broken"):
                await until_disconnect(client(), collect_all(service, named("two", "three")))
            assert service.engine.num_requests == 0

    run(test())
