"""The client for asyncio and trio: asks and reads as `server.client.client` does, and awaits."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Self, TypeVar, Unpack

import httpx
from anyio import sleep
from pydantic import BaseModel

import server.client.calls as calls
from server.client.calls import Call
from server.client.connection import LONGEST_WAIT_S, NUM_RETRIES, TIMEOUT_S, URL, options
from server.client.errors import refused
from server.client.events import EventReader, StreamEvent
from server.client.fields import GenerateFields, MessageFields
from server.client.retries import Attempts, Retries, broken, lost
from server.schemas.adapters import AdapterList
from server.schemas.comparison import AdapterComparison
from server.schemas.generation import GenerateReply, Health
from server.schemas.tokens import DetokenizeReply, TokenizeReply

Reply = TypeVar("Reply", bound=BaseModel)


class AsyncClient:
    """What `Client` is, awaited."""

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float | None = TIMEOUT_S,
        num_retries: int = NUM_RETRIES,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self._http = httpx.AsyncClient(**options(url, api_key, timeout_s))
        self._retries = Retries(num_retries, longest_wait_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all connections."""
        await self._http.aclose()

    async def generate(self, **fields: Unpack[GenerateFields]) -> GenerateReply:
        """Continues a prompt or answers messages."""
        return await self._ask(calls.generate(fields))

    async def stream(self, **fields: Unpack[GenerateFields]) -> AsyncGenerator[StreamEvent, None]:
        """Yields the answer as it comes, as `Client.stream` does; leave it early under `contextlib.aclosing`."""
        reader = EventReader(fields.get("n", 1))
        async with aclosing(await self._send(calls.stream(fields))) as response:
            try:
                async for chunk in response.aiter_bytes():
                    for event in reader.read(chunk):
                        yield event
            except httpx.RequestError as error:
                raise broken(error) from error
        reader.check_end()

    async def adapters(self) -> AdapterList:
        """Lists the adapters that a request can name."""
        return await self._ask(calls.adapters())

    async def compare(self, names: Sequence[str]) -> AdapterComparison:
        """Says how adapters relate, each with each."""
        return await self._ask(calls.compare(names))

    async def tokenize(
        self, given: str | Sequence[MessageFields], *, add_special_tokens: bool = False, return_token_strs: bool = False
    ) -> TokenizeReply:
        """Returns the tokens of a text, or of a conversation in the base model's chat template."""
        return await self._ask(calls.tokenize(given, add_special_tokens=add_special_tokens, return_token_strs=return_token_strs))

    async def detokenize(self, tokens: Sequence[int]) -> DetokenizeReply:
        """Returns the text of tokens."""
        return await self._ask(calls.detokenize(tokens))

    async def health(self) -> Health:
        """Answers as long as the process does."""
        return await self._ask(calls.health())

    async def ready(self) -> Health:
        """Answers while requests can be answered; else raises `UnavailableError`."""
        return await self._ask(calls.ready())

    async def _ask(self, call: Call[Reply]) -> Reply:
        return call.read(await _read(await self._send(call)))

    async def _send(self, call: Call[Any]) -> httpx.Response:
        # Returns a good reply, of which only the head was read.
        attempts = Attempts(self._retries, call.is_repeatable)
        while True:
            try:
                response = await self._http.send(call.to_request(self._http), stream=True)
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
