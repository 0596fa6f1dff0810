"""The client for asyncio and trio: the methods of `server.client.client`, to be awaited."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import httpx
from anyio import sleep
from anyio.to_thread import run_sync
from pydantic import BaseModel

import server.client.adapter_calls as adapter_calls
import server.client.calls as calls
from server.client.adapter_calls import AdapterFiles
from server.client.calls import Call
from server.client.connection import LONGEST_WAIT_S, NUM_RETRIES, TIMEOUT_S, URL, options
from server.client.errors import refused
from server.client.events import EventReader, StreamEvent
from server.client.fields import GenerateFields, MessageFields
from server.client.retries import Attempts, Retries, lost
from server.schemas.adapters import (
    AdapterComparison,
    AdapterDetail,
    AdapterInfo,
    AdapterList,
    NamedMergeInfo,
    WithdrawnReply,
)
from server.schemas.generation import GenerateReply, Health
from server.schemas.tokens import DetokenizeReply, TokenizeReply

Reply = TypeVar("Reply", bound=BaseModel)


class AsyncClient:
    """The asynchronous client: the methods of `Client`, to be awaited."""

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float | None = TIMEOUT_S,
        num_retries: int = NUM_RETRIES,
        longest_wait_s: float = LONGEST_WAIT_S,
        affinity_header: str | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**options(url, api_key, timeout_s))
        self._retries, self._affinity_header = Retries(num_retries, longest_wait_s), affinity_header

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def generate(self, **fields: Unpack[GenerateFields]) -> GenerateReply:
        """Continue a prompt or answer messages."""
        return await self._ask(calls.generate(fields, self._affinity_header))

    async def stream(self, **fields: Unpack[GenerateFields]) -> AsyncGenerator[StreamEvent, None]:
        """Yield the answer as it comes, as `Client.stream` does. To leave it early, use `contextlib.aclosing`."""
        call = calls.stream(fields, self._affinity_header)
        attempts = Attempts(self._retries, call.is_repeatable)
        while True:
            reader = EventReader(fields.get("n", 1))
            async with aclosing(await self._send(call, attempts, stream=True)) as response:
                try:
                    async for chunk in response.aiter_bytes():
                        for event in reader.read(chunk):
                            yield event
                    reader.check_end()
                    return
                except httpx.RequestError as error:
                    wait = attempts.wait_after_break(error, has_begun=reader.has_begun)
            await sleep(wait)

    async def adapters(self, *, prefix: str = "", after: str = "", limit: int | None = None) -> AdapterList:
        """List the adapters and named merges. With `limit`, at most so many in all; continue `after` the list's `next`."""
        return await self._ask(adapter_calls.adapters(prefix, after, limit))

    async def adapter(self, name: str) -> AdapterDetail:
        """Show an adapter, `name` or `name@version`, with its card and each of its modules."""
        return await self._ask(adapter_calls.adapter(name))

    async def compare(self, names: Sequence[str]) -> AdapterComparison:
        """Compare adapters, each with each."""
        return await self._ask(adapter_calls.compare(names))

    async def upload(self, name: str, adapter: str | Path | AdapterFiles) -> AdapterInfo:
        """Publish an adapter, a folder or its files, as a new version of `name`, which then refers to it."""
        files = adapter if isinstance(adapter, AdapterFiles) else await run_sync(AdapterFiles.read, adapter)
        return await self._ask(adapter_calls.upload(name, files))

    async def fetch(self, hub_id: str, *, name: str | None = None, revision: str | None = None) -> AdapterInfo:
        """Let the server publish an adapter from the hub. The server needs --hub."""
        return await self._ask(adapter_calls.fetch(hub_id, name, revision))

    async def alias(self, name: str, meant: str) -> AdapterInfo:
        """Make a name refer to another adapter, or to one of its own versions."""
        return await self._ask(adapter_calls.alias(name, meant))

    async def delete(self, name: str) -> WithdrawnReply:
        """Delete an adapter with its versions, a version or an alias. Requests under way end on it."""
        return await self._ask(adapter_calls.delete(name))

    async def unload(self, name: str) -> WithdrawnReply:
        """Withdraw an adapter or a version until it is loaded again. Requests under way end on it."""
        return await self._ask(adapter_calls.unload(name))

    async def load(self, name: str) -> AdapterInfo:
        """Load the name's adapter from the server's store, as it is now."""
        return await self._ask(adapter_calls.load(name))

    async def pin(self, name: str) -> AdapterInfo:
        """Keep an adapter resident."""
        return await self._ask(adapter_calls.pin(name))

    async def unpin(self, name: str) -> AdapterInfo:
        """Let an adapter be evicted again."""
        return await self._ask(adapter_calls.unpin(name))

    async def merge(self, name: str) -> NamedMergeInfo:
        """Show a named merge."""
        return await self._ask(adapter_calls.merge(name))

    async def publish_merge(self, name: str, merge: Mapping[str, object]) -> NamedMergeInfo:
        """Publish a named merge: the content of a file that `training.tune` wrote, as `json.loads` returns it."""
        return await self._ask(adapter_calls.publish_merge(name, merge))

    async def delete_merge(self, name: str) -> NamedMergeInfo:
        """Delete a named merge. Its adapters stay."""
        return await self._ask(adapter_calls.delete_merge(name))

    async def tokenize(
        self, given: str | Sequence[MessageFields], *, add_special_tokens: bool = False, return_token_strs: bool = False
    ) -> TokenizeReply:
        """Return the tokens of a text, or of a conversation in the base model's chat template."""
        return await self._ask(calls.tokenize(given, add_special_tokens=add_special_tokens, return_token_strs=return_token_strs))

    async def detokenize(self, tokens: Sequence[int]) -> DetokenizeReply:
        """Return the text of tokens."""
        return await self._ask(calls.detokenize(tokens))

    async def health(self) -> Health:
        """Return as long as the server's process answers."""
        return await self._ask(calls.health())

    async def ready(self) -> Health:
        """Return while the server can answer requests. Raises `UnavailableError` otherwise."""
        return await self._ask(calls.ready())

    async def _ask(self, call: Call[Reply]) -> Reply:
        return call.read((await self._send(call, Attempts(self._retries, call.is_repeatable), stream=False)).content)

    async def _send(self, call: Call[Any], attempts: Attempts, *, stream: bool) -> httpx.Response:
        # Returns a successful response. For a stream, only the headers have been read.
        while True:
            try:
                response = await self._http.send(call.to_request(self._http), stream=stream)
            except httpx.RequestError as error:
                wait = attempts.wait_after_failure(error)
            else:
                if response.is_success:
                    return response
                wait = attempts.wait_after_refusal(refused(response.status_code, response.headers, await _read(response)))
            await sleep(wait)


async def _read(response: httpx.Response) -> bytes:
    async with aclosing(response):
        try:
            return await response.aread()
        except httpx.RequestError as error:
            raise lost(error) from error
