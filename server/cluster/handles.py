"""The replicas as Ray Serve reaches them."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import anyio
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from server.cluster.changes import Changes
from server.cluster.ingress import ReplicaLostError
from server.cluster.replica import Replica

logger = logging.getLogger(__name__)
LOST = (TimeoutError, RayError, RayServeException)
"""What becomes of a call, other than an answer."""
BEAT_S = 2.0
"""Between two calls that ask a replica for nothing."""


class ReplicaHandles:
    """`Replicas`, by a deployment's handle."""

    def __init__(self, handle: DeploymentHandle[Replica]) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._changes = Changes()

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> "ReplicaStream":
        """Returns the answer of the replica that `AdapterRouter` chooses for `key`."""

        def ask() -> DeploymentResponseGenerator[Any]:
            responses = self._streaming.asgi.remote(scope, body, key=key)
            assert isinstance(responses, DeploymentResponseGenerator)
            return responses

        return ReplicaStream(ask, self._let_join)

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:
        """Returns the answer of each replica that runs and has joined; of a change, when all of them know of it.

        Raises `ReplicaLostError` where there is none.
        """
        while True:
            async with self._changes.running() if scope["method"] != "GET" else nullcontext():
                found = await ask_each(self._handle, "whole", scope, body)
            if not found:
                raise ReplicaLostError("no replica is there")
            answers = {name: messages for name, messages in found if messages}
            if answers:
                return answers
            await self._let_join()

    async def _let_join(self) -> None:
        try:
            async with self._changes.paused():
                pins = {name for _, pins in await ask_each(self._handle, "beat", timeout_s=BEAT_S) for name in pins}
                await ask_each(self._handle, "join", sorted(pins))
        except LOST as error:
            raise ReplicaLostError(f"not all replicas know of all changes yet: {error}") from error

    async def watch(self) -> None:
        """Calls every replica again and again, until it is cancelled, and lets those join that have not.

        A machine that is cut off neither speaks nor ends its connections. The kernel ends one whose bytes nobody acknowledges
        (see `deployment`), but who only waits for an answer sends none. With its connection all that is under way there fails.
        """
        while True:
            try:
                if not all(has_joined for has_joined, _ in await ask_each(self._handle, "beat", timeout_s=BEAT_S)):
                    await self._let_join()
            except ReplicaLostError as error:
                logger.warning("%s", error)
            except LOST:
                pass  # who asks it anything learns of it
            await anyio.sleep(BEAT_S)


async def ask_each(
    handle: DeploymentHandle[Replica], method: str, *arguments: object, timeout_s: float | None = None
) -> list[Any]:
    """Returns what each replica says, but for those that are lost. Raises what another one raised."""
    found = await handle.broadcast(method, *arguments).results_async(timeout_s=timeout_s, return_exceptions=True)
    faults = [one for one in found if isinstance(one, Exception)]
    if others := [fault for fault in faults if not isinstance(fault, RayActorError)]:
        raise others[0]
    return [one for one in found if not isinstance(one, Exception)]


class ReplicaStream:
    """One replica's answer, as it comes."""

    def __init__(self, ask: Callable[[], DeploymentResponseGenerator[Any]], join: Callable[[], Awaitable[None]]) -> None:
        self._ask, self._join = ask, join
        self._responses = ask()

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Yields what there is of it. Raises `ReplicaLostError` where the replica died, could not be reached, or cannot join."""
        try:
            has_joined = False
            while not has_joined:
                has_joined = True
                async for messages in self._responses:
                    if messages:
                        yield messages
                    else:
                        has_joined = False
                if not has_joined:
                    await self._join()
                    self._responses = self._ask()
        except (RayActorError, RayServeException) as error:
            raise ReplicaLostError(f"the replica was lost: {type(error).__name__}") from error

    def cancel(self) -> None:
        """Says that nobody hears it any more."""
        self._responses.cancel()
