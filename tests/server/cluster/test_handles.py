"""Calls to the replicas that have joined, and requests while there is none. Fakes stand for Ray's handles."""

import logging
from asyncio import CancelledError, create_task
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import grpc
import pytest
from anyio.abc import TaskGroup
from ray.exceptions import RayActorError
from starlette.types import Message

from server.cluster import handles, lifecycle
from server.cluster.handles import ReplicaHandles, ReplicaStream
from server.cluster.ingress import NoReplicaError, ReplicaLostError
from server.cluster.lifecycle import PROBED
from server.errors import StoreError
from tests.server.cluster.fake_calls import CHANGE, LOOK, OK, FakeMessages, FakeReplicas, handles_of, rpc_fault
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio


async def test_a_change_is_answered_by_the_replicas_that_have_joined() -> None:
    assert await handles_of(FakeReplicas({"old": ["math"], "new": None})).ask_all(CHANGE, b"") == {"old": OK}


async def test_a_change_does_not_fail_because_a_replica_ends() -> None:
    """Regression: the gRPC server of a replica that ends cancels new calls, and the client got an error of the server."""
    replicas = FakeReplicas({"old": [], "ending": []}, broken={"ending": rpc_fault(grpc.StatusCode.CANCELLED)})
    assert await handles_of(replicas).ask_all(CHANGE, b"") == {"old": OK}
    replicas = FakeReplicas({"old": [], "broken": []}, broken={"broken": rpc_fault(grpc.StatusCode.INTERNAL)})
    with pytest.raises(grpc.aio.AioRpcError):
        await handles_of(replicas).ask_all(CHANGE, b"")


async def test_an_error_of_a_replica_is_raised() -> None:
    with pytest.raises(StoreError, match="the store is away"):
        await handles_of(FakeReplicas({"old": []}, {"whole": [StoreError("the store is away")]})).ask_all(CHANGE, b"")


@pytest.mark.parametrize("fault", [None, StoreError("the store is away")])
async def test_a_view_of_all_replicas_lacks_one_that_does_not_answer(
    fault: StoreError | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: a client waited until a machine that was cut off was given up, or got nothing due to one replica's error."""
    monkeypatch.setattr(handles, "GATHER_S", 0.01)
    replicas = FakeReplicas({"a": [], "b": []}, num_silent={"b": 0 if fault else 2}, broken={"b": fault} if fault else {})
    replica_handles = handles_of(replicas)
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        for _ in range(2):
            assert await replica_handles.ask_all(LOOK, b"") == {"a": OK}
    assert caplog.messages == [f"what is shown of all replicas lacks one: {fault or 'TimeoutError'}"]


async def test_a_view_of_all_replicas_is_refused_if_none_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "GATHER_S", 0.01)
    with anyio.fail_after(LIMIT_S), pytest.raises(ReplicaLostError, match="no replica answers"):
        await handles_of(FakeReplicas({"a": []}, num_silent={"a": 1})).ask_all(LOOK, b"")
    with pytest.raises(StoreError, match="the store is away"):
        await handles_of(FakeReplicas({"a": []}, broken={"a": StoreError("the store is away")})).ask_all(LOOK, b"")


async def test_a_replica_has_time_to_read_the_weights_of_one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the call was cut off after five seconds, so no replica could ever show an adapter in a distant store."""
    monkeypatch.setattr(handles, "GATHER_S", 0.01)
    replicas = FakeReplicas({"a": []})
    replicas.may_answer, replica_handles = anyio.Event(), handles_of(replicas)
    with anyio.fail_after(LIMIT_S):
        details = create_task(replica_handles.ask_all({"method": "GET", "path": "/adapters/math"}, b""))
        for path in ("/metrics", "/adapters"):
            with pytest.raises(ReplicaLostError, match="no replica answers"):
                await replica_handles.ask_all({"method": "GET", "path": path}, b"")
        replicas.may_answer.set()
        assert await details == {"a": OK}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_request_waits_if_no_replica_has_joined(method: str) -> None:
    replicas = FakeReplicas({"a": None, "b": None})
    replica_handles, answers = handles_of(replicas), list[Mapping[str, Any]]()

    async def ask() -> None:
        answers.append(await replica_handles.ask_all(CHANGE | {"method": method}, b""))
        group.cancel_scope.cancel()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(replica_handles.watch)
    assert answers == [{"a": OK, "b": OK}]


async def test_a_request_is_refused_if_no_replica_can_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "JOIN_S", 0)
    with anyio.fail_after(LIMIT_S), pytest.raises(ReplicaLostError, match="no replica has joined"):
        await handles_of(FakeReplicas({"a": None})).ask_all(CHANGE, b"")


async def test_a_request_is_refused_if_there_is_no_replica() -> None:
    with pytest.raises(ReplicaLostError, match="no replica is there"):
        await handles_of(FakeReplicas({})).ask_all(CHANGE, b"")


GENERATE = {"method": "POST", "path": "/generate"}


async def _watched(group: TaskGroup, replicas: FakeReplicas) -> ReplicaHandles:
    """Return handles that have sent heartbeats to the replicas."""
    replica_handles = handles_of(replicas)
    group.start_soon(replica_handles.watch)
    while not replicas.num_beats:
        await anyio.sleep(0.01)
    return replica_handles


async def _received(stream: ReplicaStream) -> Sequence[Sequence[Message]]:
    return [messages async for messages in stream]


async def _until_away(replica_handles: ReplicaHandles) -> None:
    """Wait until the handles know that there is no replica."""
    while True:
        try:
            replica_handles.ask({"method": "GET", "path": "/ready"}, b"", "")
        except NoReplicaError:
            return
        await anyio.sleep(0.01)


@pytest.mark.parametrize("path", PROBED)
async def test_probes_are_answered_at_once_while_there_is_no_replica(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: a request for /ready waited for ever, as Ray does for a replica."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas, ready = FakeReplicas({"only": []}), {"method": "GET", "path": path}
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            replica_handles = await _watched(group, replicas)
            early = create_task(_received(replica_handles.ask(ready, b"", "")))
            late = create_task(_received(replica_handles.ask(GENERATE, b"", "")))
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {}
            with pytest.raises(NoReplicaError, match="no replica is there"):
                await early
            with pytest.raises(NoReplicaError, match="no replica is there"):
                replica_handles.ask(ready, b"", "")
            assert not late.done(), "another replica may come soon"
            replicas.pins = {"new": []}
            replicas.sent[1].set_result(FakeMessages(OK))
            assert await late == [OK]
            while True:
                try:
                    replica_handles.ask(ready, b"", "").cancel()
                    break
                except NoReplicaError:
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert caplog.messages == ["no replica is there; requests wait for 30 s, others are told to come again"]


async def test_a_request_waits_for_a_new_replica_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(lifecycle, "WAIT_S", 0.01)
    replicas = FakeReplicas({"only": []})
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            replica_handles = await _watched(group, replicas)
            waiting = create_task(_received(replica_handles.ask(GENERATE, b"", "")))
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {}
            with pytest.raises(NoReplicaError, match="no replica is there"):
                await waiting
            with pytest.raises(NoReplicaError):
                replica_handles.ask(GENERATE, b"", "")
            group.cancel_scope.cancel()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_requests_of_a_replica_that_is_to_end_are_not_given_up(has_begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(lifecycle, "WAIT_S", 0.0)
    replicas, may_answer = FakeReplicas({"only": []}), anyio.Event()

    class Slow(FakeMessages):
        num_asked = 0

        async def __anext__(self) -> Sequence[Mapping[str, Any]]:
            self.num_asked += 1
            if self.num_asked == (2 if has_begun else 1):
                await may_answer.wait()
            return await super().__anext__()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            replica_handles = await _watched(group, replicas)
            answered = create_task(_received(replica_handles.ask(GENERATE, b"", "")))
            await anyio.wait_all_tasks_blocked()
            replicas.sent[0].set_result(Slow(OK, OK))
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {}
            await _until_away(replica_handles)
            may_answer.set()
            assert await answered == [OK, OK]
            group.cancel_scope.cancel()


async def test_requests_wait_for_the_first_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(lifecycle, "WAIT_S", 0.0)
    replicas = FakeReplicas({})
    replica_handles = handles_of(replicas)
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(replica_handles.watch)
            scopes = [{"method": "GET", "path": path} for path in ("/ready", "/v1/models")]
            asked = [create_task(_received(replica_handles.ask(scope, b"", ""))) for scope in scopes]
            while replicas.num_unanswered < 3:
                await anyio.sleep(0.01)
            for sent in replicas.sent:
                sent.set_result(FakeMessages(OK))
            assert [await one for one in asked] == [[OK], [OK]]
            group.cancel_scope.cancel()


async def test_a_cancelled_request_is_not_reported_as_a_lost_replica() -> None:
    replicas = FakeReplicas({"only": []})
    waiting = create_task(_received(handles_of(replicas).ask(GENERATE, b"", "")))
    await anyio.wait_all_tasks_blocked()
    waiting.cancel()
    with pytest.raises(CancelledError):
        await waiting


async def test_a_replica_that_dies_is_reported_as_lost() -> None:
    replicas = FakeReplicas({"only": []})
    waiting = create_task(_received(handles_of(replicas).ask(GENERATE, b"", "")))
    await anyio.wait_all_tasks_blocked()
    replicas.sent[0].set_exception(RayActorError())
    with pytest.raises(ReplicaLostError, match="the replica was lost: RayActorError"):
        await waiting
