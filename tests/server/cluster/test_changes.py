"""Order of changes: one after the other, with joins of replicas between them."""

import logging

import anyio
import anyio.lowlevel
import pytest

from server.cluster import changes as changes_module
from server.cluster.changes import Changes
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio


async def test_a_join_waits_for_running_changes_and_lets_no_other_begin() -> None:
    changes, events = Changes(), list[str]()
    may_end = {name: anyio.Event() for name in ("first", "second", "join")}

    async def change(name: str) -> None:
        async with changes.running():
            events.append(f"{name} begins")
            if name in may_end:
                await may_end[name].wait()
            events.append(f"{name} ends")

    async def join() -> None:
        async with changes.paused(LIMIT_S):
            events.append("join begins")
            await may_end["join"].wait()
            events.append("join ends")

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
    assert events == [
        "first begins", "first ends", "join begins", "join ends", "second begins", "second ends", "third begins", "third ends"
    ]  # fmt: skip


async def test_a_failed_change_blocks_no_join() -> None:
    changes = Changes()
    with anyio.fail_after(LIMIT_S):
        with pytest.raises(ValueError, match="no"):
            async with changes.running():
                raise ValueError("no")
        async with changes.paused(LIMIT_S):
            pass


async def test_all_replicas_get_changes_in_the_same_order() -> None:
    """Regression: one replica got a publication before a deletion and another after it, so they differed for good."""
    changes, received = Changes(), {"near": list[str](), "far": list[str]()}

    async def change(name: str, num_steps: dict[str, int]) -> None:
        async def send(replica: str) -> None:
            for _ in range(num_steps[replica]):
                await anyio.lowlevel.checkpoint()
            received[replica].append(name)

        async def send_to_all() -> None:
            async with anyio.create_task_group() as group:
                for replica in received:
                    group.start_soon(send, replica)

        await changes.make(send_to_all)

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(change, "publish", {"near": 1, "far": 20})
            group.start_soon(change, "delete", {"near": 20, "far": 1})
    assert received["near"] == received["far"]
    assert len(received["near"]) == 2


async def test_a_change_that_hangs_delays_others_for_a_limited_time(
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
    """Regression: a replica that was to join waited for the change that hung, and all other changes waited for the replica."""
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
