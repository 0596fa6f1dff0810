"""Threads for long texts: one tenant's wait for each other, and another's for none of them."""

import threading
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from server.text_threads import LONG, MAX_THREADS, TextThreads

LIMIT_S = 60


class Work:
    """Work in a thread that takes until `may_end`."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.has_begun.set()
        assert self.may_end.wait(LIMIT_S)
        return "done"


async def until(is_so: Callable[[], bool]) -> None:
    with anyio.fail_after(LIMIT_S):
        while not is_so():
            await anyio.sleep(0.001)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_tenant_s_long_texts_wait_for_one_another_and_no_other_tenant_s_does() -> None:
    threads, works = TextThreads(), [Work() for _ in range(3)]
    first, second, other = works
    async with anyio.create_task_group() as group:
        for work, tenant in ((first, "acme"), (second, "acme"), (other, "other")):
            group.start_soon(threads.run, work, tenant, LONG + 1)
        await until(lambda: first.has_begun.is_set() and other.has_begun.is_set())
        assert not second.has_begun.is_set()
        assert await threads.run(lambda: "short", "acme", LONG) == "short"
        first.may_end.set()
        await until(second.has_begun.is_set)
        for work in works:
            work.may_end.set()


@pytest.mark.anyio
async def test_long_texts_take_no_thread_of_the_others_and_few_in_all() -> None:
    threads, works = TextThreads(), [Work() for _ in range(MAX_THREADS + 1)]
    async with anyio.create_task_group() as group:
        for number, work in enumerate(works):
            group.start_soon(threads.run, work, f"tenant-{number}", LONG + 1)
        await until(lambda: sum(work.has_begun.is_set() for work in works) == MAX_THREADS)
        assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        for work in works:
            work.may_end.set()
        await until(lambda: all(work.has_begun.is_set() for work in works))


@pytest.mark.anyio
async def test_a_tenant_that_has_no_more_long_texts_is_forgotten() -> None:
    threads = TextThreads()
    for number in range(10):
        await threads.run(lambda: None, f"tenant-{number}", LONG + 1)
    assert len(threads._by_tenant) == 0


@pytest.mark.anyio
async def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await TextThreads().run(lambda: 1 / 0, "acme", LONG + 1)
