"""The adapter loader: reads adapters in its own threads, checks them, merges them on request, and packs them for the kernels."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from lori.adapter import Adapter
from lori.errors import AdapterError, AdapterFormatError, LoriError, MergeCancelledError, UnreachableError
from lori.merge import merge
from lori.names import NUM_VERSION_DIGITS
from lori.packed_adapter import PackedAdapter, PackedReader, pack_adapter
from lori.store.entry import Entry
from server.engine.adapters.registry import Registry
from server.engine.request import Request

Read = TypeVar("Read", Adapter, PackedAdapter)
logger = logging.getLogger(__name__)
REMEDY = "an admin loads it again with POST /adapters/NAME/load, or the server is started again"
"""Advice in the error for an adapter that was changed on disk."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of reading one adapter: `packed`, or a fault. The fault is worded to follow the adapter's name."""

    digest: str
    packed: PackedAdapter | None
    fault: str
    seconds: float
    part_digests: tuple[str, ...] = ()
    """Digests of the adapters that were merged."""


class Loader:
    """A loader of the adapters that requests name. Calls `notify`, from any thread, whenever an adapter was read."""

    def __init__(self, registry: Registry, reader: PackedReader, max_fetches: int = 1) -> None:
        """At most `max_fetches` adapters are fetched from a remote store at once. Packing runs one at a time and takes a core.

        Merges run one after the other, since all merged adapters are in memory meanwhile. They do not keep other adapters from
        being read.
        """
        self._registry, self._reader = registry, reader
        self._pool = ThreadPoolExecutor(max_workers=max_fetches, thread_name_prefix="adapters")
        self._merges = ThreadPoolExecutor(max_workers=1, thread_name_prefix="merges")
        self._lock, self._packing = threading.Lock(), threading.Lock()
        self._reading: dict[str, Future[Loaded]] = {}
        self._cancellations: dict[str, threading.Event] = {}
        """Events that cancel the merges in `_reading`."""
        self._is_closed = False
        self._awaited: set[Future[Loaded]] = set()
        self.notify: Callable[[], None] = lambda: None

    @property
    def num_reading(self) -> int:
        """Number of adapters that are being read, or were read and are not collected."""
        return len(self._reading)

    def is_reading(self, digest: str) -> bool:
        """Whether an adapter is being read, or was read and is not collected."""
        return digest in self._reading

    def start(self, digest: str, request: Request) -> None:
        """Start reading the resident `digest` of `request`, unless it is being read or the loader is closed. Thread-safe."""
        with self._lock:
            if digest in self._reading or self._is_closed:
                return
            cancellation = threading.Event()
            pool = self._pool
            if digest == request.merged_digest:
                pool, self._cancellations[digest] = self._merges, cancellation
            future = self._reading[digest] = pool.submit(self._load, digest, request, cancellation)
        future.add_done_callback(lambda _: self.notify())

    def cancel(self, digest: str) -> None:
        """Cancel a merge that is not built yet. Does nothing for any other digest. Thread-safe.

        A queued merge never starts, and a running merge ends before its next module. Neither is collected. `start` begins the
        same merge again.
        """
        with self._lock:
            if digest not in self._cancellations or self._reading[digest].done():
                return
            cancellation, future = self._cancellations.pop(digest), self._reading.pop(digest)
        cancellation.set()
        future.cancel()

    def wait(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for one adapter that is being read now. Each adapter is waited for only once."""
        with self._lock:
            reading = next(
                (future for future in self._reading.values() if future.running() and future not in self._awaited), None
            )
            if reading:
                self._awaited.add(reading)
        if reading:
            wait([reading], timeout_s)

    def collect(self) -> list[Loaded]:
        """Return the adapters that were read since the last call."""
        with self._lock:
            ended = [digest for digest, future in self._reading.items() if future.done()]
            self._awaited = {future for future in self._awaited if not future.done()}
            for digest in ended:
                self._cancellations.pop(digest, None)
            return [self._reading.pop(digest).result() for digest in ended if not self._reading[digest].cancelled()]

    def close(self) -> None:
        """End the threads. Queued adapters are never read, and merges are cancelled."""
        with self._lock:
            self._is_closed = True
            for cancellation in self._cancellations.values():
                cancellation.set()
        for pool in (self._merges, self._pool):
            pool.shutdown(cancel_futures=True)

    def _load(self, digest: str, request: Request, cancellation: threading.Event) -> Loaded:
        started = time.perf_counter()
        try:
            packed, fault = self._pack(digest, request, cancellation), ""
        except MergeCancelledError as error:
            logger.info("the merge of %s is not built: no request waits for it any more", adapter_names(digest, request))
            packed, fault = None, str(error)
        except (LoriError, OSError, ValueError) as error:
            # A damaged file fails only the requests that name it.
            logger.warning("adapter %s cannot be served: %s", adapter_names(digest, request), error)
            packed, fault = None, f"cannot be served: {_client_message(error)}"
        except Exception as error:  # out of memory, or a bug: neither must stop the engine
            logger.exception("adapter %s could not be read", adapter_names(digest, request))
            packed, fault = None, f"could not be read: {error!r}"
        part_digests = tuple(term.digest for term in request.terms) if digest == request.merged_digest else ()
        return Loaded(digest, packed, fault, time.perf_counter() - started, part_digests)

    def _pack(self, digest: str, request: Request, cancellation: threading.Event) -> PackedAdapter:
        if digest == request.merged_digest:
            return pack_adapter(self._merged(request, self._parts(request, cancellation), cancellation), self._reader.layouts)
        return self._read_undamaged(digest, request, self._reader.read_entry)

    def _read_undamaged(self, digest: str, request: Request, read: Callable[[Entry], Read]) -> Read:
        # The same content may be stored under several names. If one copy is damaged, another may still be readable.
        candidates = self._registry.find(digest, {term.name for term in (*request.terms, *request.policy)})
        faults: list[Exception] = []
        for entry in (entry for adapter in candidates for entry in adapter.entries()):
            try:
                with entry.acquire(), self._packing:
                    return _check_digest(read(entry), digest)
            except (AdapterFormatError, UnreachableError, OSError, ValueError) as error:
                faults.append(error)
        raise faults[0] if faults else AdapterError("it was withdrawn before it was read")

    def _parts(self, request: Request, cancellation: threading.Event) -> list[Adapter]:
        base, parts = self._reader.base, []
        for term in request.terms:
            if cancellation.is_set():
                raise MergeCancelledError("the merge was given up before its adapters were read")
            parts.append(self._read_undamaged(term.digest, request, lambda entry: entry.load(base)))
        return parts

    def _merged(self, request: Request, adapters: list[Adapter], cancellation: threading.Event) -> Adapter:
        options = request.merge
        return merge(
            adapters,
            [term.weight for term in request.terms],
            options.method,
            density=options.density,
            sign=options.sign,
            seed=options.seed,
            templates=("plain",),  # irrelevant here: the prompt is already rendered
            is_sealed=False,  # its digest here is the request's `merged_digest`
            is_cancelled=cancellation.is_set,
        )


def _check_digest(adapter: Read, expected: str) -> Read:
    digest = adapter.config.lori.content_digest
    if digest != expected:
        # The message has no adapter name, since other requests may use another name.
        changed = f"version {expected[:NUM_VERSION_DIGITS]} was changed on disk since the server read of it"
        raise ValueError(f"{changed} (its digest is {digest}, expected {expected}): {REMEDY}")
    return adapter


def adapter_names(digest: str, request: Request) -> str:
    """Return the request's own name for one of its resident digests, or the names of all merged adapters."""
    names = [repr(term.name) for term in (*request.terms, *request.policy) if term.digest == digest][:1]
    return " + ".join(names or [repr(term.name) for term in request.terms])


def _client_message(error: Exception) -> str:
    # Clients get the faults, but not the file's path.
    if isinstance(error, AdapterFormatError):
        return "; ".join(error.shown)
    return error.strerror or "it cannot be read" if isinstance(error, OSError) else str(error)
