"""A loader and a pool without files and kernels, and an adapter cache on them: a test decides when an adapter arrives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from lori.packed_adapter import PackedAdapter
from lori.pool import AdapterPool
from server.engine.adapters.cache import MAX_LOADING, MAX_MERGING, AdapterCache
from server.engine.adapters.loader import Loaded, Loader
from server.engine.adapters.residents import Residents
from server.engine.request import Request, Sequence
from tests.server.plans import request

SCALE = 2.0
"""alpha / r of all fake adapters."""


@dataclass(frozen=True)
class FakeConfig:
    scale: float = SCALE


@dataclass(frozen=True)
class FakePacked:
    """The part of a packed adapter that the cache reads."""

    digest: str
    num_bytes: int = 1
    config: FakeConfig = FakeConfig()


def fake_packed(digest: str, num_bytes: int = 1) -> PackedAdapter:
    return cast(PackedAdapter, FakePacked(digest, num_bytes))


@dataclass
class FakePool:
    """A pool whose slots hold digests. It fails if an occupied slot is overwritten."""

    slots: dict[int, str] = field(default_factory=dict)

    def put(self, slot: int, adapter: FakePacked) -> None:
        assert slot not in self.slots
        self.slots[slot] = adapter.digest

    def clear(self, slot: int) -> None:
        del self.slots[slot]


@dataclass
class FakeLoader:
    """A loader that finishes reading an adapter only when a test calls `arrive`."""

    started: list[str] = field(default_factory=list)
    """The digests of all loads ever started, in order."""
    cancelled: list[str] = field(default_factory=list)
    pending: dict[str, Request] = field(default_factory=dict)
    notify: Callable[[], None] = lambda: None
    is_closed: bool = False
    arrives_when_awaited: bool = False
    waits_s: list[float] = field(default_factory=list)
    _arrived: list[Loaded] = field(default_factory=list)

    @property
    def num_reading(self) -> int:
        return len(self.pending)

    def is_reading(self, digest: str) -> bool:
        return digest in self.pending or any(loaded.digest == digest for loaded in self._arrived)

    def start(self, digest: str, request: Request) -> None:
        if digest in self.pending:
            return
        self.started.append(digest)
        self.pending[digest] = request

    def cancel(self, digest: str) -> None:
        request = self.pending.get(digest)
        if request and request.merged_digest == digest:
            del self.pending[digest]
            self.cancelled.append(digest)

    def arrive(self, digest: str, num_bytes: int = 1, fault: str = "") -> None:
        """End the reading of an adapter, successfully or with a fault."""
        request = self.pending.pop(digest)
        packed = None if fault else fake_packed(digest, num_bytes)
        made_of = tuple(term.digest for term in request.terms) if digest == request.merged_digest else ()
        self._arrived.append(Loaded(digest, packed, fault, 0.5, made_of))
        self.notify()

    def wait(self, timeout_s: float) -> None:
        self.waits_s.append(timeout_s)
        for digest in [*self.pending] if self.arrives_when_awaited else []:
            self.arrive(digest)

    def collect(self) -> list[Loaded]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        self.is_closed = True


def fake_cache(
    loader: FakeLoader,
    num_slots: int = 2,
    max_bytes: int = 1000,
    max_loaded_bytes: int = 1000,
    max_loading: int = MAX_LOADING,
    patience_s: float = 0.0,
    max_merging: int = MAX_MERGING,
) -> AdapterCache:
    pool, residents = cast(AdapterPool, FakePool()), Residents(num_slots, max_bytes)
    return AdapterCache(pool, residents, cast(Loader, loader), max_loaded_bytes, max_loading, patience_s, max_merging)


def wanting(*digests: str, weight: float = 1.0) -> Sequence:
    return Sequence(request(adapters=digests, weight=weight))


def load(cache: AdapterCache, loader: FakeLoader, *digests: str, num_bytes: int = 1) -> None:
    """Let the loads of `digests` arrive."""
    for digest in digests:
        loader.arrive(digest, num_bytes)
    assert cache.collect()


def run(cache: AdapterCache, loader: FakeLoader, *digests: str, num_bytes: int = 1) -> Sequence:
    """Return a sequence that holds its adapters. Those that are not in memory are read first."""
    sequence = wanting(*digests)
    if cache.acquire(sequence) == "loading":
        load(cache, loader, *[d for d in digests if d in loader.pending], num_bytes=num_bytes)
        assert cache.acquire(sequence) == "ready"
    return sequence


def end(cache: AdapterCache, *sequences: Sequence) -> None:
    for sequence in sequences:
        cache.release(sequence)
    cache.collect()
