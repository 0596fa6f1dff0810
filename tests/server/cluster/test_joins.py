"""Joins of replicas, which get the pins of the others. Fakes stand for Ray's handles."""

import logging
from asyncio import CancelledError

import anyio
import grpc
import pytest
from ray.exceptions import RayTaskError

from server.cluster import handles
from server.errors import StoreError
from tests.server.cluster.fake_calls import CHANGE, REQUEST, FakeReplicas, handles_of, rpc_fault
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("method", ["beat", "join"])
@pytest.mark.parametrize(
    "fault",
    [StoreError("the store is away"), rpc_fault(grpc.StatusCode.INTERNAL), CancelledError()],
    ids=lambda fault: type(fault).__name__,
)
async def test_a_joining_replica_gets_the_pins_of_the_others_despite_errors(
    method: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: where Ray calls by gRPC, a replica's error arrives unwrapped, and it ended the watch for good."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"old": ["safety", "math"], "new": None}, {method: [fault]})
    await _watch_until_joined(replicas)
    assert replicas.joins[-1] == ["math", "safety"]
    assert len(replicas.joins) == (2 if method == "join" else 1)


async def test_an_error_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    fault = StoreError("the store is away")
    with caplog.at_level(logging.WARNING):
        await _watch_until_joined(FakeReplicas({"new": None}, {"join": [fault, fault, RayTaskError("join", "a trace", fault)]}))
    assert caplog.messages == ["not all replicas know of all changes yet: the store is away"]


async def test_a_start_logs_no_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({})
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(handles_of(replicas).watch)
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {"new": None}
            await replicas.is_joined.wait()
            group.cancel_scope.cancel()
    assert caplog.messages == []


async def test_a_silent_replica_keeps_no_other_from_joining(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: no replica joined while a machine was cut off, and nothing was logged."""
    monkeypatch.setattr(handles, "ANSWER_S", 0.01)
    replicas = FakeReplicas({"old": ["math"], "cut off": ["math"], "new": None}, num_silent={"cut off": 1000})
    with caplog.at_level(logging.WARNING):
        await _watch_until_joined(replicas)
    assert replicas.joins == [["math"]]
    assert caplog.messages == ["a replica does not answer: TimeoutError"]


async def test_heartbeats_go_on_while_a_replica_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the loss of a machine went unnoticed while a store did not answer."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"new": None}, is_stuck=True)
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(handles_of(replicas).watch)
            await replicas.is_joined.wait()
            num_beats = replicas.num_beats
            while replicas.num_beats < num_beats + 3:
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert len(replicas.joins) == 1


async def test_no_replica_joins_without_the_pins_of_the_only_joined_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "ANSWER_S", 0.01)
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"old": ["math"], "new": None}, num_silent={"old": 8})
    await _watch_until_joined(replicas)
    assert replicas.joins == [["math"]]


async def test_a_change_whose_client_leaves_ends_before_a_replica_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: Ray cancels a request's calls, but the replicas go on, and one that joined meanwhile missed the change."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"old": [], "new": None})
    replicas.may_answer, replica_handles = anyio.Event(), handles_of(replicas)
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            async with anyio.create_task_group() as request:
                REQUEST.set("a client's")
                request.start_soon(replica_handles.ask_all, CHANGE, b"")
                await anyio.wait_all_tasks_blocked()
                request.cancel_scope.cancel()
            group.start_soon(replica_handles.watch)
            while replicas.num_beats < 10:
                await anyio.sleep(0.01)
            assert replicas.joins == []
            replicas.may_answer.set()
            await replicas.is_joined.wait()
            group.cancel_scope.cancel()
    assert replicas.changed_in == [None]


async def test_a_change_that_hangs_and_delays_a_join_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(handles, "JOIN_S", 0.01)
    replicas = FakeReplicas({"old": [], "new": None})
    replicas.may_answer, replica_handles = anyio.Event(), handles_of(replicas)
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(replica_handles.ask_all, CHANGE, b"")
            await anyio.wait_all_tasks_blocked()
            group.start_soon(replica_handles.watch)
            while not caplog.messages:
                await anyio.sleep(0.01)
            replicas.may_answer.set()
            await replicas.is_joined.wait()
            group.cancel_scope.cancel()
    assert caplog.messages == ["not all replicas know of all changes yet: a change has been under way for more than 0.01 s"]


async def _watch_until_joined(replicas: FakeReplicas) -> None:
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(handles_of(replicas).watch)
            await replicas.is_joined.wait()
            group.cancel_scope.cancel()
