"""A running server, asked over HTTP as any client asks it. Knows no metric and no tensor."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from tqdm import tqdm

from lori.loopback import direct_mounts
from lori.template import Template
from training.evaluation.answerer import AnswerError

TIMEOUT_S = 600.0
Ask = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Posts fields to a path, and returns the reply."""
Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter as the server has it."""

    version: str
    templates: Sequence[Template]
    """What it was trained on, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server at `url`, asked up to `concurrency` things together, with `api_key` where it has keys."""

    url: str
    concurrency: int = 32
    api_key: str | None = None

    def adapter(self, name: str) -> Served:
        """Returns what the server says of the adapter called `name`. Raises `AnswerError`."""

        async def asked() -> dict[str, Any]:
            async with self._client() as http:
                return await self._sent(http.get(f"/adapters/{quote(name)}"))

        found = asyncio.run(asked())
        return Served(found["version"], found["templates"])

    def ask_all(self, measure: Callable[[Ask, Asked], Awaitable[Found]], asked: Sequence[Asked]) -> list[Found]:
        """Returns what `measure` finds for each of `asked`. The first that fails ends all others: raises its `AnswerError`."""
        return asyncio.run(self._ask_all(measure, asked))

    async def _ask_all(self, measure: Callable[[Ask, Asked], Awaitable[Found]], asked: Sequence[Asked]) -> list[Found]:
        gate = asyncio.Semaphore(self.concurrency)
        async with self._client() as http:
            with tqdm(total=len(asked), unit="request", disable=None) as bar:

                async def one(item: Asked) -> Found:
                    async with gate:
                        found = await measure(ask, item)
                    bar.update()
                    return found

                async def ask(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
                    return await self._sent(http.post(path, json=fields))

                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(one(item)) for item in asked]
                except* AnswerError as errors:
                    raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        mounts = direct_mounts(self.url)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=TIMEOUT_S, limits=limits, mounts=mounts)

    async def _sent(self, request: Awaitable[httpx.Response]) -> dict[str, Any]:
        try:
            reply = await request
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise AnswerError(f"no answer from {self.url} ({said}): is `python -m server` running there?") from error
        if reply.is_error:
            is_ours = "json" in reply.headers.get("content-type", "")
            raise AnswerError(
                f"the server answered {reply.status_code}: {reply.json()['error']['message'] if is_ours else reply.text}"
            )
        answer: dict[str, Any] = reply.json()
        return answer
