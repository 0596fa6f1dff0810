"""A replica joins between changes."""

import anyio
import pytest

from server.cluster.changes import Changes
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_who_joins_waits_for_changes_and_keeps_others_from_beginning() -> None:
    changes, said = Changes(), list[str]()
    may_end = {name: anyio.Event() for name in ("first", "second", "join")}

    async def change(name: str) -> None:
        async with changes.running():
            said.append(f"{name} begins")
            if name in may_end:
                await may_end[name].wait()
            said.append(f"{name} ends")

    async def join() -> None:
        async with changes.paused(LIMIT_S):
            said.append("join begins")
            await may_end["join"].wait()
            said.append("join ends")

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            for name in ("first", "second"):
                group.start_soon(change, name)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(join)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(change, "third")
            for name in ("second", "first", "join"):
                await anyio.wait_all_tasks_blocked()
                may_end[name].set()
    assert said == [
        "first begins", "second begins", "second ends", "first ends", "join begins", "join ends", "third begins", "third ends"
    ]  # fmt: skip


async def test_a_change_that_fails_is_over() -> None:
    changes = Changes()
    with anyio.fail_after(LIMIT_S):
        with pytest.raises(ValueError, match="no"):
            async with changes.running():
                raise ValueError("no")
        async with changes.paused(LIMIT_S):
            pass


async def test_a_change_that_hangs_keeps_no_other_from_beginning() -> None:
    """Who was to join waited for it, and all other changes for who was to join."""
    changes, may_end = Changes(), anyio.Event()

    async def hang() -> None:
        async with changes.running():
            await may_end.wait()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(hang)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(TimeoutError, match=r"a change has been under way for more than 0\.01 s"):
                async with changes.paused(0.01):
                    pass
            async with changes.running():
                pass
            may_end.set()
