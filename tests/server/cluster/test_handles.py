"""Who asks all replicas hears those that have joined, and lets the others join. Fakes stand for Ray's handles."""

import logging
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from typing import Any, cast

import anyio
import grpc
import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from server.cluster import handles
from server.cluster.handles import ReplicaHandles
from server.cluster.ingress import ReplicaLostError
from server.cluster.replica import Replica
from server.errors import StoreError
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio
OK = [{"type": "http.response.start", "status": 200, "headers": []}]
CHANGE = {"method": "POST", "path": "/adapters/math/load"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeReplicas:
    """A handle of some replicas; `pins` of those that have joined, and of others None. Notes what a join is told.

    `faults` are what becomes of the first calls of a method.
    """

    def __init__(
        self, pins: Mapping[str, Sequence[str] | None], faults: Mapping[str, Sequence[BaseException]] | None = None
    ) -> None:
        self.pins, self.faults = dict(pins), {method: [*of] for method, of in (faults or {}).items()}
        self.told: list[Sequence[str]] = []
        self.is_joined = anyio.Event()

    def options(self, stream: bool) -> "FakeReplicas":  # noqa: ARG002
        return self

    def broadcast(self, method: str, *arguments: Any) -> "FakeCall":
        if not self.pins:
            raise DeploymentUnavailableError("none")
        self.told += arguments if method == "join" else ()
        if faults := self.faults.get(method):
            return FakeCall([faults.pop(0)])
        if method == "whole":
            return FakeCall([(name, [] if pins is None else OK) for name, pins in self.pins.items()])
        if method == "beat":
            return FakeCall([(pins is not None, pins or []) for pins in self.pins.values()])
        self.pins = dict.fromkeys(self.pins, arguments[0])
        self.is_joined.set()
        return FakeCall([None for _ in self.pins])


class FakeCall:
    """What each replica says."""

    def __init__(self, found: list[Any]) -> None:
        self._found = found

    async def results_async(self, timeout_s: float | None, return_exceptions: bool) -> list[Any]:  # noqa: ARG002
        return self._found


def handles_of(replicas: FakeReplicas) -> ReplicaHandles:
    return ReplicaHandles(cast("DeploymentHandle[Replica]", replicas))


async def test_a_change_is_the_matter_of_those_that_have_joined() -> None:
    assert await handles_of(FakeReplicas({"old": ["math"], "new": None})).ask_all(CHANGE, b"") == {"old": OK}


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


RPC_FAULT = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "a broken frame")


@pytest.mark.parametrize("method", ["beat", "join"])
@pytest.mark.parametrize(
    "fault", [StoreError("the store is away"), RPC_FAULT, CancelledError()], ids=lambda fault: type(fault).__name__
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


async def _watch_until_joined(replicas: FakeReplicas) -> None:
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(handles_of(replicas).watch)
            await replicas.is_joined.wait()
            group.cancel_scope.cancel()
