"""Use of adapters by requests: the number under way, the number so far, and the last time. For the event loop alone."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import anyio

from server.engine.request import AdapterTerm


@dataclass(slots=True)
class Use:
    """Use of one adapter content under one name."""

    num_using: int = 0
    """Requests under way."""
    num_requests: int = 0
    """Requests so far."""
    last_used: float | None = None
    """Time when the last request was admitted or ended, in seconds since 1970."""
    _is_unused: anyio.Event | None = None
    """Set when no request is under way; None before the first request."""

    def begin(self) -> None:
        """Count a request that begins."""
        if not self.num_using:
            self._is_unused = anyio.Event()
        self.num_using += 1
        self.num_requests += 1
        self.last_used = time.time()

    def end(self) -> None:
        """Count a request that ends."""
        self.num_using -= 1
        self.last_used = time.time()
        if self._is_unused and not self.num_using:
            self._is_unused.set()

    async def unused(self) -> None:
        """Wait until no request is under way."""
        while self._is_unused and self.num_using:
            await self._is_unused.wait()


class AdapterUses:
    """Counts of the requests that use an adapter, by its name and the digest of its content."""

    def __init__(self) -> None:
        self._uses: dict[tuple[str, str], Use] = {}

    def get(self, name: str, digest: str) -> Use:
        """Return the use of an adapter."""
        return self._uses.get((name, digest)) or Use()

    @contextmanager
    def counted(self, terms: Sequence[AdapterTerm]) -> Iterator[None]:
        """Count a request with these terms until the block ends."""
        uses = [self._uses.setdefault((term.name, term.digest), Use()) for term in terms]
        for use in uses:
            use.begin()
        try:
            yield
        finally:
            for use in uses:
                use.end()

    async def unused(self, name: str, digest: str) -> None:
        """Wait until no request under way uses the adapter."""
        await self.get(name, digest).unused()

    def forget(self, name: str, digest: str) -> None:
        """Forget an adapter that no request uses or can name any more."""
        assert not self.get(name, digest).num_using
        self._uses.pop((name, digest), None)
