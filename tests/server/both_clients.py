"""`Client` and `AsyncClient` behind one interface, so that one test covers both."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from anyio.from_thread import BlockingPortal, start_blocking_portal

from server.client import AsyncClient, Client, StreamEvent

Connect = Callable[..., Client]
KINDS = ("sync", "async")


class Awaited:
    """An `AsyncClient` with the methods of `Client`: an event loop in a thread of its own awaits each call."""

    def __init__(self, portal: BlockingPortal, client: AsyncClient) -> None:
        self._portal, self._client = portal, client

    def __getattr__(self, name: str) -> Callable[..., object]:
        method = getattr(self._client, name)
        return lambda *given, **named: self._portal.call(partial(method, *given, **named))

    def stream(self, **fields: Any) -> Iterator[StreamEvent]:
        """Yield the events of the client's own generator, and close that generator at the end."""
        events = self._client.stream(**fields)

        async def following() -> StreamEvent | None:
            return await anext(events, None)

        try:
            while event := self._portal.call(following):
                yield event
        finally:
            self._portal.call(events.aclose)


@contextmanager
def connecting(kind: str) -> Iterator[Connect]:
    """Yield a function that makes clients of one kind. The clients are closed when the block ends."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())

        def connect(url: str, **options: Any) -> Client:
            if kind == "sync":
                return stack.enter_context(Client(url, **options))
            client = AsyncClient(url, **options)
            stack.callback(portal.call, client.close)
            return cast(Client, Awaited(portal, client))

        yield connect
