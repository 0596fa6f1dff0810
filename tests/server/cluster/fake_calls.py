"""Replicas, and calls to them as Ray's handles make them, without a cluster."""

from asyncio import CancelledError, Future, get_running_loop
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

import anyio
import grpc
from ray.serve._private.common import RequestMetadata
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from server.cluster.handles import ReplicaHandles
from server.cluster.replica import Replica

OK = [{"type": "http.response.start", "status": 200, "headers": []}]
CHANGE, LOOK = {"method": "POST", "path": "/adapters/math/load"}, {"method": "GET", "path": "/metrics"}
REQUEST: ContextVar[str | None] = ContextVar("REQUEST", default=None)
"""The request of a call. Ray has such a variable, by which it cancels the calls of a request."""


class FakeCall:
    """A call to each replica."""

    def __init__(self, results: Sequence["FakeResult"]) -> None:
        self._results = results

    async def _fetch_replica_results_async(self) -> Sequence["FakeResult"]:
        return self._results


class FakeResult:
    """One replica's result: `reply`, raised if it is an error, once `may_answer` is set. None ever comes if `is_silent`."""

    def __init__(self, reply: Any, is_silent: bool = False, may_answer: anyio.Event | None = None) -> None:
        self._reply, self._is_silent, self._may_answer = reply, is_silent, may_answer

    async def get_async(self) -> Any:
        if self._is_silent:
            await anyio.sleep_forever()
        if self._may_answer:
            await self._may_answer.wait()
        if isinstance(self._reply, BaseException):
            raise self._reply
        return self._reply


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


def rpc_fault(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "a broken frame")
