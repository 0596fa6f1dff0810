"""Calls to every replica: their replies, their errors, and a log that repeats no error. Knows only Ray's handles."""

import logging
from asyncio import CancelledError, gather, wait_for
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)


class FaultLog:
    """Log of a repeated step that may fail: logs an error when it begins or changes, not at each step."""

    def __init__(self, meaning: str) -> None:
        self._meaning, self._last = meaning, ""

    def report(self, error: BaseException) -> None:
        """Report the error of this step."""
        reason = error.cause if isinstance(error, RayTaskError) else error  # without its traceback
        reason_text = str(reason) or type(reason).__name__
        if reason_text != self._last:
            logger.warning("%s: %s", self._meaning, reason_text)
        self._last = reason_text

    def clear(self) -> None:
        """Report that this step succeeded."""
        self._last = ""


Replies = tuple[list[Any], list[BaseException]]
"""The replies of replicas, and the error of each other call."""


async def ask_each(handle: DeploymentHandle[Any], method: str, *arguments: object, timeout_s: float | None = None) -> Replies:
    """Call each replica. Returns nothing for replicas that are lost.

    Raises `RayServeException` if there is no replica, and `TimeoutError` if Ray does not say which replicas there are.
    """

    async def reply(call: ReplicaResult) -> Any:
        return await wait_for(call.get_async(), timeout_s)

    # Ray's own `results_async` has one timeout for all: one silent replica would hide the others' replies.
    calls = await wait_for(handle.broadcast(method, *arguments)._fetch_replica_results_async(), timeout_s)
    results = await gather(*map(reply, calls), return_exceptions=True)
    present = [result for result in results if not _is_lost(result)]
    return (
        [result for result in present if not isinstance(result, BaseException)],
        [result for result in present if isinstance(result, BaseException)],
    )


def _is_lost(result: object) -> bool:
    """Return whether this is the result of a call to a replica that has died, or ends."""
    if isinstance(result, AioRpcError):
        code: StatusCode = result.code()
        return code is StatusCode.CANCELLED  # by the replica's server; for an unreachable one Ray has its own error
    return isinstance(result, RayActorError | CancelledError)
