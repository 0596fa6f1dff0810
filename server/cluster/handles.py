"""The replicas, through Ray Serve's handles."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from server.cluster.calls import FaultLog, ask_each
from server.cluster.changes import Changes
from server.cluster.destination import ADAPTERS_PATH, METRICS_PATH
from server.cluster.ingress import NoReplicaError, ReplicaLostError
from server.cluster.lifecycle import JOIN_S, Outage
from server.cluster.replica import Replica

ReplicaReplies = list[tuple[str, Sequence[Message]]]
"""Replies of replicas, with their names."""
BEAT_S = 1.0
"""Seconds between two heartbeats, calls that ask the replicas for nothing."""
ANSWER_S = 2.0
"""Seconds that a heartbeat may take."""
POLL_S = 0.1
GATHER_S = 5.0
"""Seconds that a replica may take to answer a request to all replicas: Prometheus's default timeout is ten seconds."""
DETAILS_S = 90.0
"""Seconds for a request for one adapter. The replica may have to read its weights, for which a store has a minute by default."""


class ReplicaHandles:
    """`Replicas` through a deployment's handle."""

    def __init__(self, handle: DeploymentHandle[Replica]) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._changes = Changes()
        self._incomplete = FaultLog("what is shown of all replicas lacks one")
        self._outage, self._open = Outage(), set[ReplicaStream]()

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> "ReplicaStream":
        """Return the answer of the replica that `AdapterRouter` chooses for `key`. Waits if there is no replica.

        Raises `NoReplicaError` if there has been none for too long.
        """
        if self._outage.is_too_long(scope["path"]):
            raise NoReplicaError
        responses = self._streaming.asgi.remote(scope, body, key=key)
        assert isinstance(responses, DeploymentResponseGenerator)
        return ReplicaStream(responses, scope["path"], self._open)

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:
        """Return the answer of each replica that runs and has joined. A change is then known to all replicas.

        A GET request gets the answers of the replicas that answer; the log names a missing one. Raises `ReplicaLostError` if none
        answers.
        """
        end = anyio.current_time() + JOIN_S
        ask = self._query if scope["method"] == "GET" else self._change
        while True:
            try:
                replies = await ask(scope, body)
            except RayServeException as error:
                raise NoReplicaError from error
            if answers := {name: messages for name, messages in replies if messages}:
                return answers
            if not replies or anyio.current_time() > end:
                raise ReplicaLostError("no replica has joined") if replies else NoReplicaError
            await anyio.sleep(POLL_S)

    async def _query(self, scope: Mapping[str, Any], body: bytes) -> ReplicaReplies:
        timeout_s = GATHER_S if scope["path"] in (METRICS_PATH, ADAPTERS_PATH) else DETAILS_S
        try:
            replies, faults = await ask_each(self._handle, "whole", scope, body, timeout_s=timeout_s)
            if faults and not replies:
                raise faults[0]
        except TimeoutError as error:
            raise ReplicaLostError("no replica answers") from error
        if faults:
            self._incomplete.report(faults[0])
        else:
            self._incomplete.clear()
        return replies

    async def _change(self, scope: Mapping[str, Any], body: bytes) -> ReplicaReplies:
        replies, faults = await self._changes.make(lambda: ask_each(self._handle, "whole", scope, body))
        if faults:
            raise faults[0]
        return replies

    async def watch(self) -> None:
        """Send heartbeats to every replica until cancelled, and let replicas join that have not.

        If there is no replica, gives up requests that have waited too long.

        A machine that is cut off neither sends nor closes its connections. The kernel closes a connection whose bytes are not
        acknowledged (see `deployment`), but an ingress that only waits for an answer sends none. When the connection closes, all
        its calls fail.
        """
        async with anyio.create_task_group() as group:  # a task of its own: a join may take as long as a store does
            group.start_soon(_repeat, self._beat, FaultLog("a replica does not answer"))
            group.start_soon(_repeat, self._join_replicas, FaultLog("not all replicas know of all changes yet"))

    async def _beat(self) -> None:
        try:
            replies, faults = await ask_each(self._handle, "beat", timeout_s=ANSWER_S)
        except DeploymentUnavailableError:
            replies = faults = []
        self._outage.update(has_replica=bool(replies or faults))
        for stream in [stream for stream in self._open if self._outage.is_too_long(stream.path)]:
            stream.give_up()
        if faults:
            raise faults[0]

    async def _join_replicas(self) -> None:
        # Only here, and not in a request: Ray would cancel it when the client disconnects.
        if all(has_joined for has_joined, _ in (await ask_each(self._handle, "beat", timeout_s=ANSWER_S))[0]):
            return
        async with self._changes.paused(JOIN_S):
            beats, faults = await ask_each(self._handle, "beat", timeout_s=ANSWER_S)
            if not faults or any(has_joined for has_joined, _ in beats):  # otherwise only the silent replica may know of pins
                pins = {name for _, pins in beats for name in pins}
                _, faults = await ask_each(self._handle, "join", sorted(pins))
        if faults:
            raise faults[0]


async def _repeat(step: Callable[[], Awaitable[None]], fault_log: FaultLog) -> None:
    while True:
        try:
            await step()
            fault_log.clear()
        except DeploymentUnavailableError:  # no replica is there, as at the start
            fault_log.clear()
        except Exception as error:  # noqa: BLE001  # Ray's, gRPC's and a store's: the next step may succeed
            fault_log.report(error)
        await anyio.sleep(BEAT_S)


class ReplicaStream:
    """One replica's answer, as it comes. It is in `pending` until it begins."""

    def __init__(self, responses: DeploymentResponseGenerator[Any], path: str, pending: "set[ReplicaStream]") -> None:
        self._responses, self.path, self._pending = responses, path, pending
        self._is_given_up = False

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Yield the messages that are there. Raises `ReplicaLostError` if the replica died, or could not be reached."""
        self._pending.add(self)
        try:
            async for messages in self._responses:
                self._pending.discard(self)
                yield messages
        except (RayActorError, RayServeException) as error:
            raise NoReplicaError if self._is_given_up else ReplicaLostError(_lost_message(error)) from error
        finally:
            self._pending.discard(self)

    def give_up(self) -> None:
        """Make the stream raise `NoReplicaError`, if no replica has taken the request.

        A replica that has taken it may answer it, even if that replica is about to end.
        """
        if not self._responses._replica_result_future.done():
            self._is_given_up = True
            self._responses.cancel()  # Ray then raises an error of its own, and no `CancelledError`

    def cancel(self) -> None:
        """Cancel the request: the client has left."""
        self._responses.cancel()


def _lost_message(error: Exception) -> str:
    return f"the replica was lost: {type(error).__name__}"
