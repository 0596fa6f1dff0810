"""The replicas as Ray Serve reaches them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import anyio
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from server.cluster.ingress import ReplicaLostError
from server.cluster.replica import Replica

BEAT_S = 2.0
"""Between two calls that ask a replica for nothing."""


class ReplicaHandles:
    """`Replicas`, by a deployment's handle."""

    def __init__(self, handle: DeploymentHandle[Replica]) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> "ReplicaStream":
        """Returns the answer of the replica that `AdapterRouter` chooses for `key`."""
        responses = self._streaming.asgi.remote(scope, body, key=key)
        assert isinstance(responses, DeploymentResponseGenerator)
        return ReplicaStream(responses)

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:
        """Returns the answer of each replica that runs. Raises `ReplicaLostError` where all are lost."""
        found = await self._handle.broadcast("whole", scope, body).results_async(return_exceptions=True)
        faults = [one for one in found if isinstance(one, Exception)]
        if others := [fault for fault in faults if not isinstance(fault, RayActorError)]:
            raise others[0]
        if not (answers := dict(one for one in found if not isinstance(one, Exception))):
            raise ReplicaLostError("no replica is there")
        return answers

    async def watch(self) -> None:
        """Calls every replica again and again, until it is cancelled.

        A machine that is cut off neither speaks nor ends its connections. The kernel ends one whose bytes nobody acknowledges
        (see `deployment`), but who only waits for an answer sends none. With its connection all that is under way there fails.
        """
        while True:
            with suppress(TimeoutError, RayActorError, RayServeException):
                await self._handle.broadcast("beat").results_async(timeout_s=BEAT_S, return_exceptions=True)
            await anyio.sleep(BEAT_S)


class ReplicaStream:
    """One replica's answer, as it comes."""

    def __init__(self, responses: DeploymentResponseGenerator[Any]) -> None:
        self._responses = responses

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Yields what there is of it. Raises `ReplicaLostError` where the replica died, or could not be reached."""
        try:
            async for messages in self._responses:
                yield messages
        except (RayActorError, RayServeException) as error:
            raise ReplicaLostError(f"the replica was lost: {type(error).__name__}") from error

    def cancel(self) -> None:
        """Says that nobody hears it any more."""
        self._responses.cancel()
