"""The client that waits for its answers."""

from collections.abc import Generator, Sequence
from contextlib import closing
from time import sleep
from typing import Any, Self, TypeVar, Unpack

import httpx
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


class Client:
    """Asks one server, and waits. All methods raise `server.client.errors.ClientError`.

    The server may be silent for `timeout_s`. What failed and can be repeated safely is repeated, up to `num_retries` times; where
    the server says when to come again, only if that is within `longest_wait_s`.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float | None = TIMEOUT_S,
        num_retries: int = NUM_RETRIES,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self._http = httpx.Client(**options(url, api_key, timeout_s))
        self._retries = Retries(num_retries, longest_wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections."""
        self._http.close()

    def generate(self, **fields: Unpack[GenerateFields]) -> GenerateReply:
        """Continues a prompt or answers messages."""
        return self._ask(calls.generate(fields))

    def stream(self, **fields: Unpack[GenerateFields]) -> Generator[StreamEvent, None, None]:
        """Yields the answer as it comes: pieces of text, then what is known at the end of each answer.

        The first event asks for it. Closing the generator, as `contextlib.closing` does, ends the request at the server.
        """
        reader = EventReader(fields.get("n", 1))
        with closing(self._send(calls.stream(fields))) as response:
            try:
                for chunk in response.iter_bytes():
                    yield from reader.read(chunk)
            except httpx.RequestError as error:
                raise broken(error) from error
        reader.check_end()

    def adapters(self) -> AdapterList:
        """Lists the adapters that a request can name."""
        return self._ask(calls.adapters())

    def compare(self, names: Sequence[str]) -> AdapterComparison:
        """Says how adapters relate, each with each."""
        return self._ask(calls.compare(names))

    def tokenize(
        self, given: str | Sequence[MessageFields], *, add_special_tokens: bool = False, return_token_strs: bool = False
    ) -> TokenizeReply:
        """Returns the tokens of a text, or of a conversation in the base model's chat template."""
        return self._ask(calls.tokenize(given, add_special_tokens=add_special_tokens, return_token_strs=return_token_strs))

    def detokenize(self, tokens: Sequence[int]) -> DetokenizeReply:
        """Returns the text of tokens."""
        return self._ask(calls.detokenize(tokens))

    def health(self) -> Health:
        """Answers as long as the process does."""
        return self._ask(calls.health())

    def ready(self) -> Health:
        """Answers while requests can be answered; else raises `UnavailableError`."""
        return self._ask(calls.ready())

    def _ask(self, call: Call[Reply]) -> Reply:
        return call.read(_read(self._send(call)))

    def _send(self, call: Call[Any]) -> httpx.Response:
        # Returns a good reply, of which only the head was read.
        attempts = Attempts(self._retries, call.is_repeatable)
        while True:
            try:
                response = self._http.send(call.to_request(self._http), stream=True)
            except httpx.RequestError as error:
                wait = attempts.wait_after_failure(error)
            else:
                if response.is_success:
                    return response
                wait = attempts.wait_after_refusal(refused(response.status_code, response.headers, _read(response)))
            sleep(wait)


def _read(response: httpx.Response) -> bytes:
    with closing(response):
        try:
            return response.read()
        except httpx.RequestError as error:
            raise lost(error) from error
