"""Reads adapters in threads of its own: checked, merged where that is asked for, and packed for the kernels."""

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
"""Where an adapter was changed on disk."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of reading one adapter: `packed`, or the fault, which goes on after the name that each request has for it."""

    digest: str
    packed: PackedAdapter | None
    fault: str
    seconds: float
    made_of: tuple[str, ...] = ()
    """The digests of what was merged."""


class Loader:
    """Reads what requests name. `notify` is called, from any thread, whenever something was read."""

    def __init__(self, registry: Registry, reader: PackedReader, num_fetched: int = 1) -> None:
        """`num_fetched` adapters may be fetched at once, where they lie elsewhere; one at a time takes a core.

        Merges are made one after the other, for all that is merged is in memory meanwhile, and keep no adapter from being read.
        """
        self._registry, self._reader = registry, reader
        self._pool = ThreadPoolExecutor(max_workers=num_fetched, thread_name_prefix="adapters")
        self._merges = ThreadPoolExecutor(max_workers=1, thread_name_prefix="merges")
        self._lock, self._packing = threading.Lock(), threading.Lock()
        self._reading: dict[str, Future[Loaded]] = {}
        self._cancellations: dict[str, threading.Event] = {}
        """Of the merges in `_reading`: set when one is to be given up."""
        self._is_closed = False
        self._awaited: set[Future[Loaded]] = set()
        self.notify: Callable[[], None] = lambda: None

    @property
    def num_reading(self) -> int:
        """Adapters that are read, or were and are not collected."""
        return len(self._reading)

    def is_reading(self, digest: str) -> bool:
        """Whether an adapter is read, or was and is not collected."""
        return digest in self._reading

    def start(self, digest: str, request: Request) -> None:
        """Begin to read the resident `digest` of `request`, if it is not being read and this is not closed. Any thread may."""
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
        """Give up a merge that is not built yet; does nothing for any other digest. Any thread may call it.

        A queued merge never begins, and one under way ends before its next module. Neither is collected, and `start` begins the
        same merge anew.
        """
        with self._lock:
            if digest not in self._cancellations or self._reading[digest].done():
                return
            cancellation, future = self._cancellations.pop(digest), self._reading.pop(digest)
        cancellation.set()
        future.cancel()

    def wait(self, timeout_s: float) -> None:
        """Wait, no longer than that and once for each, until the one that is being read now is there."""
        with self._lock:
            reading = next((of for of in self._reading.values() if of.running() and of not in self._awaited), None)
            if reading:
                self._awaited.add(reading)
        if reading:
            wait([reading], timeout_s)

    def collect(self) -> list[Loaded]:
        """Return what was read since the last call."""
        with self._lock:
            ended = [digest for digest, future in self._reading.items() if future.done()]
            self._awaited = {future for future in self._awaited if not future.done()}
            for digest in ended:
                self._cancellations.pop(digest, None)
            return [self._reading.pop(digest).result() for digest in ended if not self._reading[digest].cancelled()]

    def close(self) -> None:
        """End the threads; what is not begun is never read, and merges are given up."""
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
            logger.info("the merge of %s is not built: no request waits for it any more", named(digest, request))
            packed, fault = None, str(error)
        except (LoriError, OSError, ValueError) as error:
            # Whatever a file holds, it fails those alone who named it.
            logger.warning("adapter %s cannot be served: %s", named(digest, request), error)
            packed, fault = None, f"cannot be served: {_said(error)}"
        except Exception as error:  # there is no memory, or a fault of ours: neither is a reason to end the engine
            logger.exception("adapter %s could not be read", named(digest, request))
            packed, fault = None, f"could not be read: {error!r}"
        made_of = tuple(term.digest for term in request.terms) if digest == request.merged_digest else ()
        return Loaded(digest, packed, fault, time.perf_counter() - started, made_of)

    def _pack(self, digest: str, request: Request, cancellation: threading.Event) -> PackedAdapter:
        if digest == request.merged_digest:
            return pack_adapter(self._merged(request, self._parts(request, cancellation), cancellation), self._reader.layouts)
        return self._sound(digest, request, self._reader.read_entry)

    def _sound(self, digest: str, request: Request, read: Callable[[Entry], Read]) -> Read:
        # The same content may lie under several names: one that is damaged need not fail who named another.
        found = self._registry.find(digest, {term.name for term in (*request.terms, *request.policy)})
        faults: list[Exception] = []
        for entry in (entry for of in found for entry in of.entries()):
            try:
                with entry.held(), self._packing:
                    return _checked(read(entry), digest)
            except (AdapterFormatError, UnreachableError, OSError, ValueError) as error:
                faults.append(error)
        raise faults[0] if faults else AdapterError("it was withdrawn before it was read")

    def _parts(self, request: Request, cancellation: threading.Event) -> list[Adapter]:
        base, parts = self._reader.base, []
        for term in request.terms:
            if cancellation.is_set():
                raise MergeCancelledError("the merge was given up before its adapters were read")
            parts.append(self._sound(term.digest, request, lambda entry: entry.load(base)))
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
            templates=("plain",),  # of no consequence: the prompt is written already
            is_cancelled=cancellation.is_set,
        )


def _checked(found: Read, expected: str) -> Read:
    digest = found.config.lori.content_digest
    if digest != expected:
        # Of no name: others than who asks may call it something else.
        changed = f"version {expected[:NUM_VERSION_DIGITS]} was changed on disk since the server read of it"
        raise ValueError(f"{changed} (its digest is {digest}, expected {expected}): {REMEDY}")
    return found


def named(digest: str, request: Request) -> str:
    """Return what a request calls a resident of its own: the one adapter, or all that are merged."""
    own = [repr(term.name) for term in (*request.terms, *request.policy) if term.digest == digest][:1]
    return " + ".join(own or [repr(term.name) for term in request.terms])


def _said(error: Exception) -> str:
    # A client is told the faults, not where the file lies.
    if isinstance(error, AdapterFormatError):
        return "; ".join(error.shown)
    return error.strerror or "it cannot be read" if isinstance(error, OSError) else str(error)
