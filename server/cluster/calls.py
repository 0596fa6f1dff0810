"""Calls to every replica: their answers, their errors, and a log that repeats no error. Knows Ray's handles alone."""

import logging
from asyncio import CancelledError, gather, wait_for
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)


class Trouble:
    """Says what is wrong when it begins, and when it is another thing than before; not at each turn."""

    def __init__(self, meaning: str) -> None:
        self._meaning, self._known = meaning, ""

    def begins(self, error: BaseException) -> None:
        """Take what has gone wrong at this turn."""
        reason = error.cause if isinstance(error, RayTaskError) else error  # without its trace
        found = str(reason) or type(reason).__name__
        if found != self._known:
            logger.warning("%s: %s", self._meaning, found)
        self._known = found

    def ends(self) -> None:
        """At this turn all went well."""
        self._known = ""


Heard = tuple[list[Any], list[BaseException]]
"""What replicas say, and what became of the call to each other one."""


async def ask_each(handle: DeploymentHandle[Any], method: str, *arguments: object, timeout_s: float | None = None) -> Heard:
    """Call each replica; of those that are lost there is nothing.

    Raises `RayServeException` where no replica is there, and `TimeoutError` where Ray does not say which are.
    """

    async def answer(call: ReplicaResult) -> Any:
        return await wait_for(call.get_async(), timeout_s)

    # Ray's own `results_async` has one timeout for all: who is silent would silence the others.
    calls = await wait_for(handle.broadcast(method, *arguments)._fetch_replica_results_async(), timeout_s)
    found = await gather(*map(answer, calls), return_exceptions=True)
    known = [one for one in found if not _is_lost(one)]
    return (
        [one for one in known if not isinstance(one, BaseException)],
        [one for one in known if isinstance(one, BaseException)],
    )


def _is_lost(found: object) -> bool:
    """Return whether this is what becomes of a call to a replica that has died, or ends."""
    if isinstance(found, AioRpcError):
        code: StatusCode = found.code()
        return code is StatusCode.CANCELLED  # by the replica's server; of one that cannot be reached Ray makes its own error
    return isinstance(found, RayActorError | CancelledError)
