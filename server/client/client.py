"""The synchronous client."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from time import sleep
from typing import Any, Self, TypeVar, Unpack

import httpx
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


class Client:
    """A synchronous client of one server. All methods raise `server.client.errors.ClientError`.

    The server may be silent for `timeout_s`. Failures that can be repeated safely are retried up to `num_retries` times. If the
    server says when to retry, the client does so only within `longest_wait_s`. `affinity_header` is a header that a gateway
    hashes to pick a server: requests for answers carry the adapters' names in it.
    """

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
        self._http = httpx.Client(**options(url, api_key, timeout_s))
        self._retries, self._affinity_header = Retries(num_retries, longest_wait_s), affinity_header

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def generate(self, **fields: Unpack[GenerateFields]) -> GenerateReply:
        """Continue a prompt or answer messages."""
        return self._ask(calls.generate(fields, self._affinity_header))

    def stream(self, **fields: Unpack[GenerateFields]) -> Generator[StreamEvent, None, None]:
        """Yield the answer as it comes: pieces of text, then the metadata at the end of each answer.

        The first `next` sends the request. If the stream breaks before its first event, the request is sent again, as any
        unanswered request. Closing the generator, for example by `contextlib.closing`, aborts the request on the server.
        """
        call = calls.stream(fields, self._affinity_header)
        attempts = Attempts(self._retries, call.is_repeatable)
        while True:
            reader = EventReader(fields.get("n", 1))
            with closing(self._send(call, attempts, stream=True)) as response:
                try:
                    for chunk in response.iter_bytes():
                        yield from reader.read(chunk)
                    reader.check_end()
                    return
                except httpx.RequestError as error:
                    wait = attempts.wait_after_break(error, has_begun=reader.has_begun)
            sleep(wait)

    def adapters(self, *, prefix: str = "", after: str = "", limit: int | None = None) -> AdapterList:
        """List the adapters and named merges. With `limit`, at most so many in all; continue `after` the list's `next`."""
        return self._ask(adapter_calls.adapters(prefix, after, limit))

    def adapter(self, name: str) -> AdapterDetail:
        """Show an adapter, `name` or `name@version`, with its card and each of its modules."""
        return self._ask(adapter_calls.adapter(name))

    def compare(self, names: Sequence[str]) -> AdapterComparison:
        """Compare adapters, each with each."""
        return self._ask(adapter_calls.compare(names))

    def upload(self, name: str, adapter: str | Path | AdapterFiles) -> AdapterInfo:
        """Publish an adapter, a folder or its files, as a new version of `name`, which then refers to it."""
        files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles.read(adapter)
        return self._ask(adapter_calls.upload(name, files))

    def fetch(self, hub_id: str, *, name: str | None = None, revision: str | None = None) -> AdapterInfo:
        """Let the server publish an adapter from the hub. The server needs --hub."""
        return self._ask(adapter_calls.fetch(hub_id, name, revision))

    def alias(self, name: str, meant: str) -> AdapterInfo:
        """Make a name refer to another adapter, or to one of its own versions."""
        return self._ask(adapter_calls.alias(name, meant))

    def delete(self, name: str) -> WithdrawnReply:
        """Delete an adapter with its versions, a version or an alias. Requests under way end on it."""
        return self._ask(adapter_calls.delete(name))

    def unload(self, name: str) -> WithdrawnReply:
        """Withdraw an adapter or a version until it is loaded again. Requests under way end on it."""
        return self._ask(adapter_calls.unload(name))

    def load(self, name: str) -> AdapterInfo:
        """Load the name's adapter from the server's store, as it is now."""
        return self._ask(adapter_calls.load(name))

    def pin(self, name: str) -> AdapterInfo:
        """Keep an adapter resident."""
        return self._ask(adapter_calls.pin(name))

    def unpin(self, name: str) -> AdapterInfo:
        """Let an adapter be evicted again."""
        return self._ask(adapter_calls.unpin(name))

    def merge(self, name: str) -> NamedMergeInfo:
        """Show a named merge."""
        return self._ask(adapter_calls.merge(name))

    def publish_merge(self, name: str, merge: Mapping[str, object]) -> NamedMergeInfo:
        """Publish a named merge: the content of a file that `training.tune` wrote, as `json.loads` returns it."""
        return self._ask(adapter_calls.publish_merge(name, merge))

    def delete_merge(self, name: str) -> NamedMergeInfo:
        """Delete a named merge. Its adapters stay."""
        return self._ask(adapter_calls.delete_merge(name))

    def tokenize(
        self, given: str | Sequence[MessageFields], *, add_special_tokens: bool = False, return_token_strs: bool = False
    ) -> TokenizeReply:
        """Return the tokens of a text, or of a conversation in the base model's chat template."""
        return self._ask(calls.tokenize(given, add_special_tokens=add_special_tokens, return_token_strs=return_token_strs))

    def detokenize(self, tokens: Sequence[int]) -> DetokenizeReply:
        """Return the text of tokens."""
        return self._ask(calls.detokenize(tokens))

    def health(self) -> Health:
        """Return as long as the server's process answers."""
        return self._ask(calls.health())

    def ready(self) -> Health:
        """Return while the server can answer requests. Raises `UnavailableError` otherwise."""
        return self._ask(calls.ready())

    def _ask(self, call: Call[Reply]) -> Reply:
        return call.read(self._send(call, Attempts(self._retries, call.is_repeatable), stream=False).content)

    def _send(self, call: Call[Any], attempts: Attempts, *, stream: bool) -> httpx.Response:
        # Returns a successful response. For a stream, only the headers have been read.
        while True:
            try:
                response = self._http.send(call.to_request(self._http), stream=stream)
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
