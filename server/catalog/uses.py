"""Who uses which adapter: how many requests under way, how many so far, when last. For the event loop alone."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import anyio

from server.engine.request import AdapterTerm


@dataclass(slots=True)
class Use:
    """Of one content under one name."""

    num_using: int = 0
    """Requests under way."""
    num_requests: int = 0
    """Requests so far."""
    last_used: float | None = None
    """When the last of them was admitted or ended, in seconds since 1970."""
    _is_unused: anyio.Event | None = None
    """While it is used."""

    def begin(self) -> None:
        """Note that a request begins."""
        if not self.num_using:
            self._is_unused = anyio.Event()
        self.num_using += 1
        self.num_requests += 1
        self.last_used = time.time()

    def end(self) -> None:
        """Note that a request ends."""
        self.num_using -= 1
        self.last_used = time.time()
        if self._is_unused and not self.num_using:
            self._is_unused.set()

    async def unused(self) -> None:
        """Wait until no request is under way."""
        while self._is_unused and self.num_using:
            await self._is_unused.wait()


class AdapterUses:
    """Counts the requests that use an adapter, by its name and the digest of its content."""

    def __init__(self) -> None:
        self._uses: dict[tuple[str, str], Use] = {}

    def of(self, name: str, digest: str) -> Use:
        """Return what is known of an adapter's use."""
        return self._uses.get((name, digest)) or Use()

    @contextmanager
    def held(self, terms: Sequence[AdapterTerm]) -> Iterator[None]:
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
        """Wait until no request under way uses an adapter."""
        await self.of(name, digest).unused()

    def forget(self, name: str, digest: str) -> None:
        """Forget an adapter that nobody uses, nor can ask for any more."""
        assert not self.of(name, digest).num_using
        self._uses.pop((name, digest), None)
