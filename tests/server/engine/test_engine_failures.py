"""Failures: an error of one request is reported to that request, and the others have the answers that they have alone."""

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from lori.format import WEIGHTS_FILE
from lori.merge_options import MergeOptions
from server.engine.generate_request import GenerateRequest
from server.engine.request import Chunk, ErrorEvent, ErrorKind, Event, SamplingParams
from server.engine.thread import EngineThread
from tests.server.live import LIMIT_S
from tests.server.rig import Heard, Rig, WatchedRunner, build

FOX = "The quick brown fox jumps over the lazy dog. "
FINE = (
    GenerateRequest(prompt=FOX, max_tokens=14, sampling=SamplingParams(num_logprobs=1)),
    GenerateRequest(prompt="a", max_tokens=9, adapters=("math",)),
    GenerateRequest(prompt=FOX * 2, max_tokens=5, adapters=("intent", "math")),
)


@pytest.fixture
def rig(writer_model: Path, adapters: Path, tmp_path: Path) -> Iterator[Rig]:
    """Yield an engine whose adapter `safety` has a torn weights file."""
    place = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    rig = build(writer_model, place)
    (place / "safety" / WEIGHTS_FILE).write_bytes(b"torn")
    yield rig
    rig.engine.adapter_cache.close()


def assert_failed(heard: Heard, kind: ErrorKind, *parts: str) -> None:
    errors = [event for event in heard.events if isinstance(event, ErrorEvent)]
    assert errors == heard.events[-1:]
    assert errors[0].kind == kind
    for part in parts:
        assert part in errors[0].message


def alone(writer_model: Path, adapters: Path) -> list[list[int]]:
    return [build(writer_model, adapters).run([ask])[0].tokens for ask in FINE]


def test_a_step_that_raises_for_one_request_fails_only_that_one(rig: Rig, writer_model: Path, adapters: Path) -> None:
    bad: list[Heard] = []

    def fault(chunk: Chunk) -> Exception | None:
        is_bad = bool(bad) and chunk.sequence is bad[0].sequence
        return KeyError("what it is") if is_bad and len(chunk.sequence.output_ids) == 3 else None

    WatchedRunner(rig, fault)
    bad.append(rig.ask(GenerateRequest(prompt="bad", max_tokens=20)))
    fine = [rig.ask(ask) for ask in FINE]
    rig.finish()
    assert_failed(bad[0], "engine", "the step failed", "what it is")
    assert len(bad[0].text) == 3
    assert [heard.tokens for heard in fine] == alone(writer_model, adapters)
    assert all(heard.done for heard in fine)
    assert not rig.engine._replies


@pytest.mark.parametrize("prompt", ["bad", FOX * 2])
def test_a_prompt_that_raises_fails_its_request(rig: Rig, prompt: str) -> None:
    bad: list[Heard] = []
    WatchedRunner(rig, lambda chunk: RuntimeError("no") if chunk.sequence is bad[0].sequence else None)
    bad.append(rig.ask(GenerateRequest(prompt=prompt, max_tokens=20)))
    other = rig.ask(FINE[0])
    rig.finish()
    assert_failed(bad[0], "engine", "no")
    assert len(other.tokens) == 14


def test_a_step_that_raises_for_all_fails_all_and_the_next_requests_are_served(rig: Rig) -> None:
    is_down = [True]
    WatchedRunner(rig, lambda _: RuntimeError("no memory") if is_down else None)
    for heard in rig.run(FINE):
        assert_failed(heard, "engine", "no memory")
    is_down.clear()
    assert [len(heard.tokens) for heard in rig.run(FINE)] == [14, 9, 5]


def test_an_error_that_breaks_the_runner_ends_the_engine(rig: Rig) -> None:
    runner = WatchedRunner(rig, lambda _: RuntimeError("the device is gone"))
    runner.broken_by = RuntimeError
    thread = EngineThread(rig.engine)

    async def receive(ask: GenerateRequest) -> list[Event]:
        async with aclosing(thread.generate(rig.admission.admit(ask))) as events:
            return [event async for event in events]

    async def test() -> None:
        thread.start()
        for events in await asyncio.gather(*(receive(ask) for ask in FINE)):
            assert isinstance(events[-1], ErrorEvent)
            assert "the engine died" in events[-1].message
            assert "the device is gone" in events[-1].message
        assert not thread.is_alive
        await thread.stop()

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_a_bad_weights_file_fails_only_the_requests_that_name_it(rig: Rig, writer_model: Path, adapters: Path) -> None:
    bad = [
        GenerateRequest(prompt="a", adapters=("safety",)),
        GenerateRequest(prompt=FOX, adapters=("math", "safety")),
        GenerateRequest(prompt=FOX, adapters=("math", "safety"), merge=MergeOptions("ties")),
        GenerateRequest(prompt="b", adapters=("safety",), sampling=SamplingParams(num_choices=1, echo=True, num_logprobs=0)),
    ]
    heard = rig.run([*bad, *FINE])
    for one in heard[: len(bad)]:
        assert_failed(one, "adapter", "'safety'", "cannot be served: ", f"{WEIGHTS_FILE} is not")
        assert one.tokens == []
    assert [one.tokens for one in heard[len(bad) :]] == alone(writer_model, adapters)
    (unasked,) = rig.run([GenerateRequest(prompt="a", adapters=("math", "safety"), weights=(1.0, 0.0), max_tokens=3)])
    assert len(unasked.tokens) == 3, "an adapter of weight 0 is not read"


def test_a_repaired_file_is_served_again(rig: Rig, adapters: Path) -> None:
    (bad,) = rig.run([GenerateRequest(prompt="a", adapters=("safety",), max_tokens=3)])
    assert_failed(bad, "adapter")
    torn = rig.registry.by_name["safety"].entry.folder / WEIGHTS_FILE
    torn.write_bytes((adapters / "safety" / WEIGHTS_FILE).read_bytes())
    (fine,) = rig.run([GenerateRequest(prompt="a", adapters=("safety",), max_tokens=3)])
    assert len(fine.tokens) == 3


def test_adapters_that_never_fit_together_fail_with_the_reason(writer_model: Path, adapters: Path) -> None:
    sizes = build(writer_model, adapters)
    sizes.run([GenerateRequest(prompt="a", adapters=("math", "safety"), max_tokens=1)])
    rig = build(writer_model, adapters, max_resident_bytes=sizes.engine.adapter_cache.residents.num_bytes - 1)
    both = GenerateRequest(prompt="a", adapters=("math", "safety"), max_tokens=3)
    one, bad, other = rig.run(
        [GenerateRequest(prompt="a", adapters=("math",), max_tokens=30), both, GenerateRequest(prompt="b", max_tokens=3)]
    )
    assert_failed(bad, "adapter", "do not fit together")
    assert (len(one.tokens), len(other.tokens)) == (30, 3)


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(rig: Rig) -> Clock:
    clock = Clock()
    rig.engine.clock = clock
    return clock


def test_a_request_that_runs_too_long_ends_with_an_error(rig: Rig, clock: Clock) -> None:
    heard, other = (
        rig.ask(GenerateRequest(prompt="a", max_tokens=50, timeout_s=2.5)),
        rig.ask(GenerateRequest(prompt="b", max_tokens=8)),
    )
    assert rig.engine.time_left() == 2.5
    for _ in range(3):
        rig.step()
    clock.now += 2
    assert rig.engine.time_left() == 0.5
    rig.step()
    assert not heard.is_done
    clock.now += 0.5
    rig.step()
    assert_failed(heard, "timeout", "not done within 2.5 s")
    assert len(heard.text) == 4
    assert heard.sequence.blocks == []
    assert rig.engine.time_left() is None
    rig.finish()
    assert len(other.text) == 8


def test_the_time_before_a_request_was_admitted_counts(rig: Rig, clock: Clock) -> None:
    request = rig.admission.admit(GenerateRequest(prompt="a", max_tokens=50, timeout_s=2.5))
    heard = rig.submit(replace(request, elapsed_s=2))
    assert rig.engine.time_left() == 0.5
    rig.step()
    clock.now += 0.5
    rig.step()
    assert_failed(heard, "timeout", "not done within 2.5 s")
    rig.finish()


def test_a_request_that_ends_in_time_leaves_no_deadline(rig: Rig, clock: Clock) -> None:
    (heard,) = rig.run([GenerateRequest(prompt="a", max_tokens=3, timeout_s=5)])
    clock.now += 100
    assert rig.engine.time_left() is None
    rig.step()
    assert heard.done.finish_reason == "length"


def test_a_request_that_waits_for_a_place_times_out_too(writer_model: Path) -> None:
    rig, clock = build(writer_model, max_batch=1), Clock()
    rig.engine.clock = clock
    running, waiting = (
        rig.ask(GenerateRequest(prompt="a", max_tokens=30)),
        rig.ask(GenerateRequest(prompt="b", max_tokens=3, timeout_s=1)),
    )
    rig.step()
    clock.now += 1
    rig.step()
    assert_failed(waiting, "timeout")
    assert waiting.text == ""
    rig.finish()
    assert len(running.text) == 30


def test_a_request_that_waits_for_an_adapter_times_out_too(rig: Rig, clock: Clock) -> None:
    request = rig.admission.admit(GenerateRequest(prompt="a", adapters=("math",), max_tokens=3, timeout_s=1))
    heard = rig.submit(request)
    clock.now += 1
    rig.step()
    assert_failed(heard, "timeout")
    assert not rig.scheduler.has_work
    (later,) = rig.run([GenerateRequest(prompt="a", adapters=("math",), max_tokens=3)])
    assert len(later.tokens) == 3


def test_all_choices_of_a_request_time_out_together(rig: Rig, clock: Clock) -> None:
    heard = rig.submit_choices(
        rig.admission.admit(GenerateRequest(prompt=FOX, max_tokens=50, sampling=SamplingParams(num_choices=3), timeout_s=1))
    )
    for _ in range(6):
        rig.step()
    clock.now += 1
    rig.step()
    for one in heard:
        assert_failed(one, "timeout")
    assert not rig.scheduler.has_work
    assert not rig.engine._replies
    rig.finish()


def test_a_request_aborted_when_its_time_is_up_gets_one_last_event(rig: Rig, clock: Clock) -> None:
    heard = rig.ask(GenerateRequest(prompt="a", max_tokens=50, timeout_s=1))
    rig.step()
    clock.now += 1
    rig.engine.abort(heard.sequence.request.id)
    rig.step()
    assert heard.done.finish_reason == "cancelled"
    rig.finish()
