"""Changes run one after the other, and a replica joins between them."""

import logging

import anyio
import anyio.lowlevel
import pytest

from server.cluster import changes as changes_module
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
        "first begins", "first ends", "join begins", "join ends", "second begins", "second ends", "third begins", "third ends"
    ]  # fmt: skip


async def test_a_change_that_fails_is_over() -> None:
    changes = Changes()
    with anyio.fail_after(LIMIT_S):
        with pytest.raises(ValueError, match="no"):
            async with changes.running():
                raise ValueError("no")
        async with changes.paused(LIMIT_S):
            pass


async def test_all_replicas_hear_changes_in_the_same_order() -> None:
    """One replica heard a publication and then a deletion, another one the other way round, and they differed for good."""
    changes, heard = Changes(), {"near": list[str](), "far": list[str]()}

    async def change(name: str, num_steps: dict[str, int]) -> None:
        async def tell(replica: str) -> None:
            for _ in range(num_steps[replica]):
                await anyio.lowlevel.checkpoint()
            heard[replica].append(name)

        async def tell_all() -> None:
            async with anyio.create_task_group() as group:
                for replica in heard:
                    group.start_soon(tell, replica)

        await changes.make(tell_all)

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(change, "publish", {"near": 1, "far": 20})
            group.start_soon(change, "delete", {"near": 20, "far": 1})
    assert heard["near"] == heard["far"]
    assert len(heard["near"]) == 2


async def test_a_change_that_hangs_keeps_others_waiting_no_longer_than_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(changes_module, "MAX_WAIT_S", 0.01)
    changes, may_end = Changes(), anyio.Event()

    async def hang() -> None:
        async with changes.running():
            await may_end.wait()

    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(hang)
            await anyio.wait_all_tasks_blocked()
            async with changes.running():
                pass
            may_end.set()
        async with changes.running():
            pass
    assert caplog.messages == ["a change begins beside another one, for which it has waited 0.01 s: replicas may differ"]


async def test_a_change_that_hangs_keeps_no_other_from_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was to join waited for it, and all other changes for who was to join."""
    monkeypatch.setattr(changes_module, "MAX_WAIT_S", 0.01)
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
