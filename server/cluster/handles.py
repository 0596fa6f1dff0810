"""The replicas as Ray Serve reaches them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from server.cluster.calls import Trouble, ask_each
from server.cluster.changes import Changes
from server.cluster.destination import ADAPTERS, METRICS
from server.cluster.ingress import NoReplicaError, ReplicaLostError
from server.cluster.lifecycle import JOIN_S, Absence
from server.cluster.replica import Replica

Said = list[tuple[str, Sequence[Message]]]
"""The answers of replicas, by their names."""
BEAT_S = 1.0
"""Between two calls that ask the replicas for nothing."""
ANSWER_S = 2.0
"""How long such a call may take."""
POLL_S = 0.1
GATHER_S = 5.0
"""How long a replica may take to say what is shown of all together: Prometheus waits for ten seconds, unless told otherwise."""
DETAILS_S = 90.0
"""The same of one adapter alone, whose weights it may have to read, for which a store has a minute unless told otherwise."""


class ReplicaHandles:
    """`Replicas`, by a deployment's handle."""

    def __init__(self, handle: DeploymentHandle[Replica]) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._changes = Changes()
        self._left_out = Trouble("what is shown of all replicas lacks one")
        self._absence, self._open = Absence(), set[ReplicaStream]()

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> "ReplicaStream":
        """Return the answer of the replica that `AdapterRouter` chooses for `key`; where there is none it waits for one.

        Raises `NoReplicaError` where none has been there for too long.
        """
        if self._absence.is_too_long(scope["path"]):
            raise NoReplicaError
        responses = self._streaming.asgi.remote(scope, body, key=key)
        assert isinstance(responses, DeploymentResponseGenerator)
        return ReplicaStream(responses, scope["path"], self._open)

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:
        """Return the answer of each replica that runs and has joined; of a change, when all of them know of it.

        What is only shown is shown without those that do not answer; the log says so. Raises `ReplicaLostError` where none does.
        """
        end = anyio.current_time() + JOIN_S
        ask = self._look if scope["method"] == "GET" else self._change
        while True:
            try:
                found = await ask(scope, body)
            except RayServeException as error:
                raise NoReplicaError from error
            if answers := {name: messages for name, messages in found if messages}:
                return answers
            if not found or anyio.current_time() > end:
                raise ReplicaLostError("no replica has joined") if found else NoReplicaError
            await anyio.sleep(POLL_S)

    async def _look(self, scope: Mapping[str, Any], body: bytes) -> Said:
        timeout_s = GATHER_S if scope["path"] in (METRICS, ADAPTERS) else DETAILS_S
        try:
            found, faults = await ask_each(self._handle, "whole", scope, body, timeout_s=timeout_s)
            if faults and not found:
                raise faults[0]
        except TimeoutError as error:
            raise ReplicaLostError("no replica answers") from error
        if faults:
            self._left_out.begins(faults[0])
        else:
            self._left_out.ends()
        return found

    async def _change(self, scope: Mapping[str, Any], body: bytes) -> Said:
        found, faults = await self._changes.make(lambda: ask_each(self._handle, "whole", scope, body))
        if faults:
            raise faults[0]
        return found

    async def watch(self) -> None:
        """Call every replica again and again, until it is cancelled, and lets those join that have not.

        Where none is there it gives up the requests that have waited too long.

        A machine that is cut off neither speaks nor ends its connections. The kernel ends one whose bytes nobody acknowledges
        (see `deployment`), but who only waits for an answer sends none. With its connection all that is under way there fails.
        """
        async with anyio.create_task_group() as group:  # apart: to join may take as long as a store does
            group.start_soon(_again_and_again, self._beat, Trouble("a replica does not answer"))
            group.start_soon(_again_and_again, self._let_join, Trouble("not all replicas know of all changes yet"))

    async def _beat(self) -> None:
        try:
            found, faults = await ask_each(self._handle, "beat", timeout_s=ANSWER_S)
        except DeploymentUnavailableError:
            found = faults = []
        self._absence.note(is_there=bool(found or faults))
        for stream in [stream for stream in self._open if self._absence.is_too_long(stream.path)]:
            stream.give_up()
        if faults:
            raise faults[0]

    async def _let_join(self) -> None:
        # Here alone, and not for a request: Ray would end it in the middle when the client leaves.
        if all(has_joined for has_joined, _ in (await ask_each(self._handle, "beat", timeout_s=ANSWER_S))[0]):
            return
        async with self._changes.paused(JOIN_S):
            beats, faults = await ask_each(self._handle, "beat", timeout_s=ANSWER_S)
            if not faults or any(has_joined for has_joined, _ in beats):  # else the silent one alone may know of pins
                pins = {name for _, pins in beats for name in pins}
                _, faults = await ask_each(self._handle, "join", sorted(pins))
        if faults:
            raise faults[0]


async def _again_and_again(step: Callable[[], Awaitable[None]], trouble: Trouble) -> None:
    while True:
        try:
            await step()
            trouble.ends()
        except DeploymentUnavailableError:  # no replica is there, as at the start
            trouble.ends()
        except Exception as error:  # noqa: BLE001  # Ray's, gRPC's and a store's: whatever it was, the next turn may go well
            trouble.begins(error)
        await anyio.sleep(BEAT_S)


class ReplicaStream:
    """One replica's answer, as it comes; it is in `among` until it begins."""

    def __init__(self, responses: DeploymentResponseGenerator[Any], path: str, among: "set[ReplicaStream]") -> None:
        self._responses, self.path, self._among = responses, path, among
        self._is_given_up = False

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Yield what there is of it. Raises `ReplicaLostError` where the replica died, or could not be reached."""
        self._among.add(self)
        try:
            async for messages in self._responses:
                self._among.discard(self)
                yield messages
        except (RayActorError, RayServeException) as error:
            raise NoReplicaError if self._is_given_up else ReplicaLostError(_said(error)) from error
        finally:
            self._among.discard(self)

    def give_up(self) -> None:
        """Have it raise `NoReplicaError`, where no replica has taken the request; one that has may do it though it is to end."""
        if not self._responses._replica_result_future.done():
            self._is_given_up = True
            self._responses.cancel()  # Ray raises an error of its own then, and no `CancelledError`

    def cancel(self) -> None:
        """Says that nobody hears it any more."""
        self._responses.cancel()


def _said(error: Exception) -> str:
    return f"the replica was lost: {type(error).__name__}"
