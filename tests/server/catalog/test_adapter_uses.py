"""Use of adapters by requests: counts, and waits for the last request."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import ExitStack

import pytest

from server.catalog.uses import AdapterUses
from server.engine.request import AdapterTerm
from tests.server.live import LIMIT_S

ONE, TWO = "1" * 64, "2" * 64
MATH, OLD, SAFETY = AdapterTerm("math", ONE, 1.0), AdapterTerm("math", TWO, 1.0), AdapterTerm("safety", ONE, 0.5)


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


async def settle() -> None:
    """Let every task run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


def counts(uses: AdapterUses, term: AdapterTerm) -> tuple[int, int]:
    use = uses.get(term.name, term.digest)
    return use.num_using, use.num_requests


def test_an_adapter_that_was_never_used_has_no_counts() -> None:
    uses = AdapterUses()
    assert counts(uses, MATH) == (0, 0)
    assert uses.get("math", ONE).last_used is None


def test_requests_are_counted_by_name_and_content() -> None:
    async def test() -> None:
        uses = AdapterUses()
        with uses.counted([MATH, SAFETY]):
            with uses.counted([MATH]):
                assert [counts(uses, term) for term in (MATH, OLD, SAFETY)] == [(2, 2), (0, 0), (1, 1)]
            with uses.counted([OLD]):
                assert [counts(uses, term) for term in (MATH, OLD, SAFETY)] == [(1, 2), (1, 1), (1, 1)]
        assert [counts(uses, term) for term in (MATH, OLD, SAFETY)] == [(0, 2), (0, 1), (0, 1)]

    run(test())


def test_a_request_without_adapters_is_not_counted() -> None:
    async def test() -> None:
        with AdapterUses().counted([]):
            pass

    run(test())


def test_the_last_use_is_when_a_request_began_or_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        uses = AdapterUses()
        monkeypatch.setattr(time, "time", lambda: 100.0)
        with uses.counted([MATH]):
            assert uses.get("math", ONE).last_used == 100.0
            monkeypatch.setattr(time, "time", lambda: 250.0)
            assert uses.get("math", ONE).last_used == 100.0
        assert uses.get("math", ONE).last_used == 250.0

    run(test())


def test_a_request_that_fails_no_longer_uses_its_adapter() -> None:
    async def test() -> None:
        uses = AdapterUses()
        with pytest.raises(ValueError, match="out of luck"), uses.counted([MATH]):
            raise ValueError("out of luck")
        assert counts(uses, MATH) == (0, 1)

    run(test())


def test_an_unused_adapter_is_not_waited_for() -> None:
    async def test() -> None:
        uses = AdapterUses()
        await uses.unused("math", ONE)
        with uses.counted([MATH]), uses.counted([SAFETY]):
            await uses.unused("math", TWO)
        await uses.unused("math", ONE)

    run(test())


def test_a_wait_lasts_until_the_last_request_has_ended() -> None:
    async def test() -> None:
        uses = AdapterUses()
        first, second = ExitStack(), ExitStack()
        first.enter_context(uses.counted([MATH]))
        waiting = [asyncio.create_task(uses.unused("math", ONE)) for _ in range(2)]
        second.enter_context(uses.counted([MATH]))
        first.close()
        await settle()
        assert not any(task.done() for task in waiting)
        second.close()
        await asyncio.gather(*waiting)
        assert counts(uses, MATH) == (0, 2)

    run(test())


def test_a_request_that_begins_before_the_waiter_runs_is_waited_for_too() -> None:
    async def test() -> None:
        uses = AdapterUses()
        first, second = ExitStack(), ExitStack()
        first.enter_context(uses.counted([MATH]))
        waiting = asyncio.create_task(uses.unused("math", ONE))
        await settle()
        first.close()
        second.enter_context(uses.counted([MATH]))
        await settle()
        assert not waiting.done()
        second.close()
        await waiting

    run(test())


def test_a_forgotten_adapter_is_counted_anew() -> None:
    async def test() -> None:
        uses = AdapterUses()
        with uses.counted([MATH]), pytest.raises(AssertionError):
            uses.forget("math", ONE)
        assert counts(uses, MATH) == (0, 1)
        uses.forget("math", ONE)
        uses.forget("nobody", ONE)
        assert counts(uses, MATH) == (0, 0)
        with uses.counted([MATH]):
            assert counts(uses, MATH) == (1, 1)

    run(test())
