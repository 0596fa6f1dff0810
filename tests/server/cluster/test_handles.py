"""Who asks all replicas hears those that have joined, and lets the others join. Fakes stand for Ray's handles."""

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
"""As Ray has one, by which it cancels the calls of a request."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeMessages:
    """What a replica answers, message for message."""

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
    """A handle of some replicas; `pins` of those that have joined, and of others None. Notes what a join is told.

    `faults` are what becomes of the first calls of a method; `num_silent`, of how many calls of any a replica hears nothing.
    A join that `is_stuck` does not end. Of a call to one that is `broken` an error comes.
    """

    def __init__(
        self,
        pins: Mapping[str, Sequence[str] | None],
        faults: Mapping[str, Sequence[BaseException]] | None = None,
        num_silent: Mapping[str, int] | None = None,
        is_stuck: bool = False,
        broken: Mapping[str, BaseException] | None = None,
    ) -> None:
        self.pins, self.faults = dict(pins), {method: [*of] for method, of in (faults or {}).items()}
        self.num_silent, self.is_stuck, self.num_beats, self.num_unheard = Counter(num_silent), is_stuck, 0, 0
        self.broken = broken or {}
        self.told: list[Sequence[str]] = []
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
        """Ray's own generator; the request is with a replica once its future in `sent` is done."""
        self.sent.append(get_running_loop().create_future())
        of = RequestMetadata(request_id="r", internal_request_id=str(len(self.sent)))
        future = cast("Future[ReplicaResult]", self.sent[-1])
        return DeploymentResponseGenerator(future, of, _is_router_running_in_separate_loop=False)

    def broadcast(self, method: str, *arguments: Any) -> "FakeCall":
        if not self.pins:
            self.num_unheard += 1
            raise DeploymentUnavailableError("none")
        self.num_beats += method == "beat"
        self.told += arguments if method == "join" else ()
        if faults := self.faults.get(method):
            return FakeCall([FakeResult(faults.pop(0))])
        if method == "whole":
            self.changed_in.append(REQUEST.get())
        may_answer = self.may_answer if method == "whole" else None
        found = {name: FakeResult(self._answer(name, method), may_answer=may_answer) for name in self.pins}
        if method == "join" and self.is_stuck:
            self.is_joined.set()
            return FakeCall([FakeResult(None, is_silent=True)])
        if method == "join":
            self.pins = dict.fromkeys(self.pins, arguments[0])
            self.is_joined.set()
        found |= {name: FakeResult(fault) for name, fault in self.broken.items()}
        for name in +self.num_silent:
            found[name] = FakeResult(None, is_silent=True)
            self.num_silent[name] -= 1
        return FakeCall([*found.values()])

    def _answer(self, name: str, method: str) -> Any:
        pins = self.pins[name]
        if method == "whole":
            return name, [] if pins is None else OK
        return (pins is not None, pins or []) if method == "beat" else None


def handles_of(replicas: FakeReplicas) -> ReplicaHandles:
    return ReplicaHandles(cast("DeploymentHandle[Replica]", replicas))


async def test_a_change_is_the_matter_of_those_that_have_joined() -> None:
    assert await handles_of(FakeReplicas({"old": ["math"], "new": None})).ask_all(CHANGE, b"") == {"old": OK}


def rpc_fault(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "a broken frame")


async def test_a_change_is_no_matter_of_one_that_ends() -> None:
    """Its gRPC server cancels what comes as it ends, and the client heard that the server failed."""
    replicas = FakeReplicas({"old": [], "ending": []}, broken={"ending": rpc_fault(grpc.StatusCode.CANCELLED)})
    assert await handles_of(replicas).ask_all(CHANGE, b"") == {"old": OK}
    replicas = FakeReplicas({"old": [], "broken": []}, broken={"broken": rpc_fault(grpc.StatusCode.INTERNAL)})
    with pytest.raises(grpc.aio.AioRpcError):
        await handles_of(replicas).ask_all(CHANGE, b"")


async def test_what_a_replica_raises_is_heard() -> None:
    with pytest.raises(StoreError, match="the store is away"):
        await handles_of(FakeReplicas({"old": []}, {"whole": [StoreError("the store is away")]})).ask_all(CHANGE, b"")


@pytest.mark.parametrize("fault", [None, StoreError("the store is away")])
async def test_what_is_shown_of_all_is_shown_without_one_that_does_not_answer(
    fault: StoreError | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asked waited until a machine that was cut off was given up, or heard nothing for one replica's fault."""
    monkeypatch.setattr(handles, "GATHER_S", 0.01)
    replicas = FakeReplicas({"a": [], "b": []}, num_silent={"b": 0 if fault else 2}, broken={"b": fault} if fault else {})
    of = handles_of(replicas)
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        for _ in range(2):
            assert await of.ask_all(LOOK, b"") == {"a": OK}
    assert caplog.messages == [f"what is shown of all replicas lacks one: {fault or 'TimeoutError'}"]


async def test_where_none_answers_what_is_shown_of_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "GATHER_S", 0.01)
    with anyio.fail_after(LIMIT_S), pytest.raises(ReplicaLostError, match="no replica answers"):
        await handles_of(FakeReplicas({"a": []}, num_silent={"a": 1})).ask_all(LOOK, b"")
    with pytest.raises(StoreError, match="the store is away"):
        await handles_of(FakeReplicas({"a": []}, broken={"a": StoreError("the store is away")})).ask_all(LOOK, b"")


async def test_of_one_adapter_a_replica_may_read_the_weights_before_it_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cut off after five seconds, and no replica could ever show an adapter that lies far away."""
    monkeypatch.setattr(handles, "GATHER_S", 0.01)
    replicas = FakeReplicas({"a": []})
    replicas.may_answer, of = anyio.Event(), handles_of(replicas)
    with anyio.fail_after(LIMIT_S):
        details = create_task(of.ask_all({"method": "GET", "path": "/adapters/math"}, b""))
        for path in ("/metrics", "/adapters"):
            with pytest.raises(ReplicaLostError, match="no replica answers"):
                await of.ask_all({"method": "GET", "path": path}, b"")
        replicas.may_answer.set()
        assert await details == {"a": OK}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_where_none_has_joined_a_request_waits_for_it(method: str) -> None:
    replicas = FakeReplicas({"a": None, "b": None})
    all_of_them, found = handles_of(replicas), list[Mapping[str, Any]]()

    async def ask() -> None:
        found.append(await all_of_them.ask_all(CHANGE | {"method": method}, b""))
        group.cancel_scope.cancel()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(all_of_them.watch)
    assert found == [{"a": OK, "b": OK}]


async def test_where_none_can_join_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "JOIN_S", 0)
    with anyio.fail_after(LIMIT_S), pytest.raises(ReplicaLostError, match="no replica has joined"):
        await handles_of(FakeReplicas({"a": None})).ask_all(CHANGE, b"")


async def test_where_no_replica_is_there_a_request_is_refused() -> None:
    with pytest.raises(ReplicaLostError, match="no replica is there"):
        await handles_of(FakeReplicas({})).ask_all(CHANGE, b"")


@pytest.mark.parametrize("method", ["beat", "join"])
@pytest.mark.parametrize(
    "fault",
    [StoreError("the store is away"), rpc_fault(grpc.StatusCode.INTERNAL), CancelledError()],
    ids=lambda fault: type(fault).__name__,
)
async def test_whatever_goes_wrong_one_that_joins_has_the_pins_of_the_others(
    method: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a replica raises arrives as it is where Ray calls it by gRPC, and ended the watch for good."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"old": ["safety", "math"], "new": None}, {method: [fault]})
    await _watch_until_joined(replicas)
    assert replicas.told[-1] == ["math", "safety"]
    assert len(replicas.told) == (2 if method == "join" else 1)


async def test_what_goes_wrong_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    fault = StoreError("the store is away")
    with caplog.at_level(logging.WARNING):
        await _watch_until_joined(FakeReplicas({"new": None}, {"join": [fault, fault, RayTaskError("join", "a trace", fault)]}))
    assert caplog.messages == ["not all replicas know of all changes yet: the store is away"]


async def test_a_start_is_no_trouble(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
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


async def test_one_that_is_silent_keeps_no_other_from_joining(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None joined while a machine was cut off, and nothing said so."""
    monkeypatch.setattr(handles, "ANSWER_S", 0.01)
    replicas = FakeReplicas({"old": ["math"], "cut off": ["math"], "new": None}, num_silent={"cut off": 1000})
    with caplog.at_level(logging.WARNING):
        await _watch_until_joined(replicas)
    assert replicas.told == [["math"]]
    assert caplog.messages == ["a replica does not answer: TimeoutError"]


async def test_while_one_joins_others_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a machine went unheard while a store did not answer."""
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
    assert len(replicas.told) == 1


async def test_none_joins_without_the_pins_of_the_only_one_that_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "ANSWER_S", 0.01)
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"old": ["math"], "new": None}, num_silent={"old": 8})
    await _watch_until_joined(replicas)
    assert replicas.told == [["math"]]


async def test_a_change_whose_client_leaves_ends_before_another_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray cancels the request, and the calls made in its context; the replicas go on, and who joined meanwhile missed it."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas = FakeReplicas({"old": [], "new": None})
    replicas.may_answer, of = anyio.Event(), handles_of(replicas)
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            async with anyio.create_task_group() as request:
                REQUEST.set("a client's")
                request.start_soon(of.ask_all, CHANGE, b"")
                await anyio.wait_all_tasks_blocked()
                request.cancel_scope.cancel()
            group.start_soon(of.watch)
            while replicas.num_beats < 10:
                await anyio.sleep(0.01)
            assert replicas.told == []
            replicas.may_answer.set()
            await replicas.is_joined.wait()
            group.cancel_scope.cancel()
    assert replicas.changed_in == [None]


async def test_a_change_that_hangs_is_said_to_keep_one_from_joining(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(handles, "JOIN_S", 0.01)
    replicas = FakeReplicas({"old": [], "new": None})
    replicas.may_answer, of = anyio.Event(), handles_of(replicas)
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(of.ask_all, CHANGE, b"")
            await anyio.wait_all_tasks_blocked()
            group.start_soon(of.watch)
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
    """Returns handles that have heard the replicas."""
    of = handles_of(replicas)
    group.start_soon(of.watch)
    while not replicas.num_beats:
        await anyio.sleep(0.01)
    return of


async def _heard(stream: ReplicaStream) -> Sequence[Sequence[Message]]:
    return [messages async for messages in stream]


async def _until_away(of: ReplicaHandles) -> None:
    """Returns when the handles know that no replica is there."""
    while True:
        try:
            of.ask({"method": "GET", "path": "/ready"}, b"", "")
        except NoReplicaError:
            return
        await anyio.sleep(0.01)


@pytest.mark.parametrize("path", PROBED)
async def test_while_none_is_there_how_the_server_is_is_said_at_once(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What asked at /ready waited for ever, as Ray does for a replica."""
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    replicas, ready = FakeReplicas({"only": []}), {"method": "GET", "path": path}
    with caplog.at_level(logging.WARNING), anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            of = await _watched(group, replicas)
            early = create_task(_heard(of.ask(ready, b"", "")))
            late = create_task(_heard(of.ask(GENERATE, b"", "")))
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {}
            with pytest.raises(NoReplicaError, match="no replica is there"):
                await early
            with pytest.raises(NoReplicaError, match="no replica is there"):
                of.ask(ready, b"", "")
            assert not late.done(), "another replica may come soon"
            replicas.pins = {"new": []}
            replicas.sent[1].set_result(FakeMessages(OK))
            assert await late == [OK]
            while True:
                try:
                    of.ask(ready, b"", "").cancel()
                    break
                except NoReplicaError:
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert caplog.messages == ["no replica is there; requests wait for 30 s, others are told to come again"]


async def test_where_none_comes_a_request_waits_no_longer_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(lifecycle, "WAIT_S", 0.01)
    replicas = FakeReplicas({"only": []})
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            of = await _watched(group, replicas)
            waiting = create_task(_heard(of.ask(GENERATE, b"", "")))
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {}
            with pytest.raises(NoReplicaError, match="no replica is there"):
                await waiting
            with pytest.raises(NoReplicaError):
                of.ask(GENERATE, b"", "")
            group.cancel_scope.cancel()


@pytest.mark.parametrize("has_begun", [True, False])
async def test_what_a_replica_has_that_is_to_end_is_not_given_up(has_begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
            of = await _watched(group, replicas)
            answered = create_task(_heard(of.ask(GENERATE, b"", "")))
            await anyio.wait_all_tasks_blocked()
            replicas.sent[0].set_result(Slow(OK, OK))
            await anyio.wait_all_tasks_blocked()
            replicas.pins = {}
            await _until_away(of)
            may_answer.set()
            assert await answered == [OK, OK]
            group.cancel_scope.cancel()


async def test_before_the_first_is_there_requests_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "BEAT_S", 0.01)
    monkeypatch.setattr(lifecycle, "WAIT_S", 0.0)
    replicas = FakeReplicas({})
    of = handles_of(replicas)
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(of.watch)
            asked = [create_task(_heard(of.ask({"method": "GET", "path": path}, b"", ""))) for path in ("/ready", "/v1/models")]
            while replicas.num_unheard < 3:
                await anyio.sleep(0.01)
            for sent in replicas.sent:
                sent.set_result(FakeMessages(OK))
            assert [await one for one in asked] == [[OK], [OK]]
            group.cancel_scope.cancel()


async def test_a_request_that_is_cancelled_is_no_replica_s_loss() -> None:
    replicas = FakeReplicas({"only": []})
    waiting = create_task(_heard(handles_of(replicas).ask(GENERATE, b"", "")))
    await anyio.wait_all_tasks_blocked()
    waiting.cancel()
    with pytest.raises(CancelledError):
        await waiting


async def test_a_replica_that_dies_is_said_to_be_lost() -> None:
    replicas = FakeReplicas({"only": []})
    waiting = create_task(_heard(handles_of(replicas).ask(GENERATE, b"", "")))
    await anyio.wait_all_tasks_blocked()
    replicas.sent[0].set_exception(RayActorError())
    with pytest.raises(ReplicaLostError, match="the replica was lost: RayActorError"):
        await waiting
