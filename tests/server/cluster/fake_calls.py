"""Calls to replicas as Ray's handles make them, without Ray."""

from collections.abc import Sequence
from typing import Any

import anyio


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
