"""Threads for long texts: the texts of one tenant wait for each other, and those of other tenants do not wait for them."""

import threading
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

from server.service import text_threads
from server.service.text_threads import (
    LONG,
    MAX_LONG_THREADS,
    MAX_SHORTER_THREADS,
    MAX_TENANT_THREADS,
    SHORT,
    TenantSemaphores,
    TextThreads,
)

LIMIT_S = 60


class Work:
    """Work that blocks its thread until `may_end` is set."""

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
async def test_a_tenant_s_long_texts_wait_only_for_each_other() -> None:
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
async def test_long_texts_use_few_threads_and_no_default_ones() -> None:
    threads, works = TextThreads(), [Work() for _ in range(MAX_LONG_THREADS + 1)]
    async with anyio.create_task_group() as group:
        for number, work in enumerate(works):
            group.start_soon(threads.run, work, f"tenant-{number}", LONG + 1)
        await until(lambda: sum(work.has_begun.is_set() for work in works) == MAX_LONG_THREADS)
        assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        for work in works:
            work.may_end.set()
        await until(lambda: all(work.has_begun.is_set() for work in works))


@pytest.mark.anyio
@pytest.mark.parametrize("size", [1, SHORT, SHORT + 1, LONG])
async def test_many_texts_of_one_tenant_do_not_keep_another_s_from_a_thread(size: int) -> None:
    """Regression: 400 texts of 16,384 characters delayed another tenant's request by 16 s and more, for all shared one queue."""
    threads, works, other = TextThreads(), [Work() for _ in range(100)], Work()
    other.may_end.set()
    async with anyio.create_task_group() as group:
        for work in works:
            group.start_soon(threads.run, work, "acme", size)
        await until(lambda: sum(work.has_begun.is_set() for work in works) == MAX_TENANT_THREADS)
        assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        with anyio.fail_after(LIMIT_S):
            assert await threads.run(other, "other", size) == "done"
        assert sum(work.has_begun.is_set() for work in works) == MAX_TENANT_THREADS
        for work in works:
            work.may_end.set()


@pytest.mark.anyio
async def test_short_texts_do_not_wait_for_longer_ones() -> None:
    threads, works = TextThreads(), [Work() for _ in range(MAX_SHORTER_THREADS)]
    async with anyio.create_task_group() as group:
        for number, work in enumerate(works):
            group.start_soon(threads.run, work, f"tenant-{number % 2}", LONG)
        await until(lambda: all(work.has_begun.is_set() for work in works))
        assert await threads.run(lambda: "short", "tenant-0", SHORT) == "short"
        for work in works:
            work.may_end.set()


@pytest.mark.anyio
async def test_a_tenant_s_tasks_wait_only_for_each_other() -> None:
    semaphores, entered, may_end = TenantSemaphores(1), list[str](), anyio.Event()

    async def take(tenant: str) -> None:
        async with semaphores.acquire(tenant):
            entered.append(tenant)
            await may_end.wait()

    async with anyio.create_task_group() as group:
        for tenant in ("acme", "acme", "other"):
            group.start_soon(take, tenant)
        await anyio.wait_all_tasks_blocked()
        assert entered == ["acme", "other"]
        may_end.set()
    assert entered == ["acme", "other", "acme"]


@pytest.mark.anyio
async def test_a_tenant_that_has_no_more_long_texts_is_forgotten() -> None:
    threads = TextThreads()
    for number in range(10):
        await threads.run(lambda: None, f"tenant-{number}", LONG + 1)
    assert len(threads._long._semaphores._by_tenant) == 0


@pytest.mark.anyio
async def test_after_a_refused_text_only_the_same_tenant_s_next_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    resting, may_go_on = anyio.Event(), anyio.Event()

    async def rest(_: float) -> None:
        resting.set()
        await may_go_on.wait()

    monkeypatch.setattr(text_threads, "sleep", rest)
    threads, done = TextThreads(), list[str]()

    async def refused() -> None:
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 / 0, "acme", LONG + 1)

    async def next_one() -> None:
        done.append(await threads.run(lambda: "next", "acme", LONG + 1))

    async with anyio.create_task_group() as group:
        group.start_soon(refused)
        await resting.wait()
        group.start_soon(next_one)
        assert await threads.run(lambda: "other", "other", LONG + 1) == "other"
        assert not done
        may_go_on.set()
    assert done == ["next"]


@pytest.mark.anyio
async def test_an_exception_of_the_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await TextThreads().run(lambda: 1 / 0, "acme", LONG + 1)
