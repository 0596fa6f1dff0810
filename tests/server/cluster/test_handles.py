"""Calls to all replicas, of which those that have joined answer, and joins of the others. Fakes stand for Ray's handles."""

import logging
from asyncio import CancelledError, Future, create_task, get_running_loop
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

import anyio
import grpc
import pytest
from anyio.abc import TaskGroup
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import RequestMetadata
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from server.cluster import handles, lifecycle
from server.cluster.handles import ReplicaHandles, ReplicaStream
from server.cluster.ingress import NoReplicaError, ReplicaLostError
from server.cluster.lifecycle import PROBED
from server.cluster.replica import Replica
from server.errors import StoreError
from tests.server.cluster.fake_calls import FakeCall, FakeResult
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio
OK = [{"type": "http.response.start", "status": 200, "headers": []}]
CHANGE, LOOK = {"method": "POST", "path": "/adapters/math/load"}, {"method": "GET", "path": "/metrics"}
REQUEST: ContextVar[str | None] = ContextVar("REQUEST", default=None)
"""The request of a call. Ray has such a variable, by which it cancels the calls of a request."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeMessages:
    """A replica's answer, message by message."""

    def __init__(self, *messages: Sequence[Mapping[str, Any]]) -> None:
        self._messages, self._is_cancelled = [*messages], False

    def cancel(self) -> None:
        self._is_cancelled = True

    async def __anext__(self) -> Sequence[Mapping[str, Any]]:
        if self._is_cancelled:
            raise CancelledError
        if not self._messages:
            raise StopAsyncIteration
        return self._messages.pop(0)


class FakeReplicas:
    """A handle of fake replicas. `pins` has the pins of each that has joined, and None for the others. Records the pins of joins.

    `faults` are the errors of the first calls of a method. A replica does not answer as many calls as `num_silent` has for it.
    With `is_stuck`, joins do not end. A replica in `broken` answers every call with its error.
    """

    def __init__(
        self,
        pins: Mapping[str, Sequence[str] | None],
        faults: Mapping[str, Sequence[BaseException]] | None = None,
        num_silent: Mapping[str, int] | None = None,
        is_stuck: bool = False,
        broken: Mapping[str, BaseException] | None = None,
    ) -> None:
        self.pins, self.faults = dict(pins), {method: [*errors] for method, errors in (faults or {}).items()}
        self.num_silent, self.is_stuck, self.num_beats, self.num_unanswered = Counter(num_silent), is_stuck, 0, 0
        self.broken = broken or {}
        self.joins: list[Sequence[str]] = []
        self.is_joined = anyio.Event()
        self.may_answer: anyio.Event | None = None
        self.changed_in: list[str | None] = []
        self.sent: list[Future[FakeMessages]] = []

    def options(self, stream: bool) -> "FakeReplicas":  # noqa: ARG002
        return self

    @property
    def asgi(self) -> "FakeReplicas":
        return self

    def remote(self, scope: Mapping[str, Any], body: bytes, key: str) -> DeploymentResponseGenerator[Any]:  # noqa: ARG002
        """Return Ray's own generator. A replica has the request once its future in `sent` is done."""
        self.sent.append(get_running_loop().create_future())
        metadata = RequestMetadata(request_id="r", internal_request_id=str(len(self.sent)))
        future = cast("Future[ReplicaResult]", self.sent[-1])
        return DeploymentResponseGenerator(future, metadata, _is_router_running_in_separate_loop=False)

    def broadcast(self, method: str, *arguments: Any) -> "FakeCall":
        if not self.pins:
            self.num_unanswered += 1
            raise DeploymentUnavailableError("none")
        self.num_beats += method == "beat"
        self.joins += arguments if method == "join" else ()
        if faults := self.faults.get(method):
            return FakeCall([FakeResult(faults.pop(0))])
        if method == "whole":
            self.changed_in.append(REQUEST.get())
        may_answer = self.may_answer if method == "whole" else None
        results = {name: FakeResult(self._answer(name, method), may_answer=may_answer) for name in self.pins}
        if method == "join" and self.is_stuck:
            self.is_joined.set()
            return FakeCall([FakeResult(None, is_silent=True)])
        if method == "join":
            self.pins = dict.fromkeys(self.pins, arguments[0])
            self.is_joined.set()
        results |= {name: FakeResult(fault) for name, fault in self.broken.items()}
        for name in +self.num_silent:
            results[name] = FakeResult(None, is_silent=True)
            self.num_silent[name] -= 1
        return FakeCall([*results.values()])

    def _answer(self, name: str, method: str) -> Any:
        pins = self.pins[name]
        if method == "whole":
            return name, [] if pins is None else OK
        return (pins is not None, pins or []) if method == "beat" else None


def handles_of(replicas: FakeReplicas) -> ReplicaHandles:
    return ReplicaHandles(cast("DeploymentHandle[Replica]", replicas))


async def test_a_change_is_answered_by_the_replicas_that_have_joined() -> None:
    assert await handles_of(FakeReplicas({"old": ["math"], "new": None})).ask_all(CHANGE, b"") == {"old": OK}


def rpc_fault(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "a broken frame")


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
