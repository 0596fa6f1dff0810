"""The adapter cache: an adapter is registered (on disk), loaded (in RAM, packed) or resident (in the kernels' operands).

RAM and slots have a budget in bytes each. The least recently used adapter is evicted first. An adapter that is pinned, or that a
sequence uses or waits for, is never evicted. The engine's thread owns this module's state; the loader reads files in its own
threads.

Merges that wait to be built are taken from the tenants in turn, and within a tenant in order of arrival. Weights are free
numbers, so one tenant can ask for any number of merges, and they must delay only that tenant's requests.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from itertools import islice

from lori.kernels import Weight
from lori.packed_adapter import PackedAdapter
from lori.pool import AdapterPool
from server.engine.adapters.loader import Loader, adapter_names
from server.engine.adapters.residents import NoRoomError, Residents, TierUsage
from server.engine.request import Request, ResidentWeight, Sequence
from server.engine.scheduling.scheduler import Residency

logger = logging.getLogger(__name__)


class MergeQueue:
    """The merges that wait to be built, in a queue per tenant. Every operation takes constant time."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Sequence, None]] = OrderedDict()  # the next tenant first

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._tenants.get(sequence.request.tenant, ())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its tenant. A sequence that is queued already keeps its place."""
        self._tenants.setdefault(sequence.request.tenant, OrderedDict())[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence, if it is queued."""
        tenant = sequence.request.tenant
        queue = self._tenants.get(tenant)
        if queue is None:
            return
        queue.pop(sequence, None)
        if not queue:
            del self._tenants[tenant]

    def pop(self, busy: Collection[str]) -> Sequence | None:
        """Remove and return the next sequence; None if the queue is empty.

        Tenants in `busy`, whose merges are being built, come after all others.
        """
        tenant = next((name for name in self._tenants if name not in busy), None)
        if tenant is None:
            tenant = next(iter(self._tenants), None)
        if tenant is None:
            return None
        self._tenants.move_to_end(tenant)
        sequence = next(iter(self._tenants[tenant]))
        self.discard(sequence)
        return sequence


MAX_LOADING = 16
"""Maximum number of adapters that are being read, or wait in RAM for the sequences that need them. Further loads start later."""
MAX_MERGING = 2
"""Maximum number of merges that are being built, or wait in RAM, beside `MAX_LOADING`. With two, the next merge is built while
the last one is being acquired."""


class AdapterCache:
    """The adapter cache and its tiers. Keeps resident what running sequences need: the scheduler's `ResidencyGate`.

    A step that could begin waits up to `max_load_wait_s` for an adapter that is being read.
    """

    def __init__(
        self,
        pool: AdapterPool,
        residents: Residents,
        loader: Loader,
        max_loaded_bytes: int,
        max_loading: int = MAX_LOADING,
        max_load_wait_s: float = 0.0,
        max_merging: int = MAX_MERGING,
    ) -> None:
        self._pool, self.residents, self._loader = pool, residents, loader
        self._max_loaded_bytes, self._max_loading, self._max_merging = max_loaded_bytes, max_loading, max_merging
        self._max_load_wait_s = max_load_wait_s
        self._loaded: OrderedDict[str, PackedAdapter] = OrderedDict()  # the least recently used first
        self._waiters: dict[str, dict[Sequence, None]] = {}
        self._merging: dict[str, str] = {}  # the merges among `_waiters`, each with the tenant that asked first
        self._merge_queue = MergeQueue()  # empty while another merge may start
        self._failed: dict[Sequence, str] = {}
        self._dropped: set[str] = set()  # to be freed as soon as they are unused
        self._merge_requests: Counter[str] = Counter()
        """Number of requests in the engine that need a merge, by the digest of the merge. Sums are not built."""
        self._merge_parts: dict[str, tuple[str, ...]] = {}  # the adapters that each built merge consists of
        self.num_loaded_bytes = 0
        self.num_failures = 0
        """Number of adapters so far that could not be read or not be made resident."""
        self.observe_load: Callable[[float], None] = lambda _: None
        """Called with the seconds that reading an adapter took."""

    @property
    def num_loaded(self) -> int:
        """Number of adapters in RAM."""
        return len(self._loaded)

    def on_arrival(self, notify: Callable[[], None]) -> None:
        """Set the function to call from the loader's thread whenever `collect` has something."""
        self._loader.notify = notify

    def prefetch(self, request: Request) -> None:
        """Start reading the adapters of a request that is on its way to the engine, if the loader is idle.

        Thread-safe: it only looks up keys. An outdated result costs one needless read at most.
        """
        missing = [digest for digest, _ in request.residents if digest not in self.residents and digest not in self._loaded]
        if missing and not self._loader.num_reading:
            for digest in missing[: self._max_loading]:
                self._loader.start(digest, request)

    def add_request(self, request: Request) -> None:
        """Note that a request has entered the engine. Its merge, if any, is built until `finish_request`."""
        if merged := request.merged_digest:
            self._merge_requests[merged] += 1

    def finish_request(self, request: Request) -> None:
        """Note that a request has ended and its sequences were released. Cancels a merge that no other request needs."""
        merged = request.merged_digest
        if not merged:
            return
        self._merge_requests[merged] -= 1
        if self._merge_requests[merged]:
            return
        del self._merge_requests[merged]
        self._loader.cancel(merged)
        if not self._loader.is_reading(merged) and merged not in self._loaded:
            self._end_load(merged)
        self._purge(merged)

    def acquire(self, sequence: Sequence) -> Residency:
        """See `ResidencyGate.acquire`. After "loading", the adapters that the sequence waits for are only kept in RAM."""
        digests = [digest for digest, _ in sequence.residents]
        self._dropped.difference_update(digests)
        missing = [digest for digest in digests if digest not in self.residents]
        awaited = [digest for digest in missing if self._must_wait(digest, sequence)]
        if awaited:
            return "loading"
        pinned: list[str] = []
        for digest in sorted(digests, key=missing.__contains__):  # resident ones first, so that none is evicted for a missing one
            try:
                fits = digest in self.residents or self._make_resident(digest)
            except (MemoryError, RuntimeError, ValueError) as error:  # one adapter's failure must not stop the engine
                logger.exception("an adapter could not be made resident")
                self.num_failures += 1
                self._failed[sequence] = f"an adapter could not be made resident: {error!r}"
                fits = False
            if not fits:
                for other in pinned:
                    self.residents.release(other)
                return "loading" if sequence in self._failed else self._no_room(sequence)
            self.residents.acquire(digest)
            pinned.append(digest)
        self._remove_waiter(sequence)
        sequence.terms = [self._term(digest, weight) for digest, weight in sequence.residents]
        return "ready"

    def is_load_deferred(self, sequence: Sequence) -> bool:
        """See `ResidencyGate.is_load_deferred`."""
        if sequence in self._first_waiter():
            return False
        is_load_deferred = False
        for digest, _ in sequence.residents:
            if digest not in self._waiters and digest not in self._loaded and digest not in self.residents:
                if not self._is_deferred(digest, sequence):
                    return False
                is_load_deferred = True
        return is_load_deferred

    def release(self, sequence: Sequence) -> None:
        """See `ResidencyGate.release`."""
        if sequence.terms is None:
            self._remove_waiter(sequence)
        else:
            for digest, _ in sequence.residents:
                self.residents.release(digest)
            sequence.terms = None
        for digest, _ in sequence.residents if self._dropped else ():
            self._purge(digest)

    def collect(self) -> bool:
        """Add the adapters that were read since the last call to RAM. Return whether any were read, well or not.

        If so, the scheduler must retry the waiting sequences. Waits up to `max_load_wait_s` for an adapter that is being read.
        """
        if self._max_load_wait_s and self._loader.num_reading:
            self._loader.wait(self._max_load_wait_s)
        arrived = self._loader.collect()
        for loaded in arrived:
            waiting = self._waiters.get(loaded.digest, {})
            if loaded.packed is None:
                self.num_failures += bool(waiting)  # without waiting sequences it is read again when needed
                # Each error uses the request's own name of the adapter. Other tenants' names may be confidential.
                self._failed |= {s: f"adapter {adapter_names(loaded.digest, s.request)} {loaded.fault}" for s in waiting}
                self._end_load(loaded.digest)
                self._dropped.discard(loaded.digest)
                continue
            if not waiting:
                self._end_load(loaded.digest)
            self.observe_load(loaded.seconds)
            self._add(loaded.digest, loaded.packed)
            if loaded.part_digests:
                merge_parts = {
                    digest: parts
                    for digest, parts in self._merge_parts.items()
                    if digest in self._loaded or digest in self.residents
                }
                self._merge_parts = merge_parts | {loaded.digest: loaded.part_digests}
            self._purge(loaded.digest)
        self._trim()
        return bool(arrived)

    def take_failed(self) -> dict[Sequence, str]:
        """Return the sequences whose adapters cannot be served, with the reasons. Each is returned once."""
        failed, self._failed = self._failed, {}
        return failed

    def tier_usage(self) -> Mapping[str, TierUsage]:
        """Return the bytes in each tier of the adapters in RAM or in slots, by digest. Thread-safe; may be slightly outdated."""
        # `dict.copy` is atomic: no other thread runs during it.
        loaded, resident = dict.copy(self._loaded), self.residents.sizes()
        sizes = {digest: packed.num_bytes for digest, packed in loaded.items()}
        return {digest: TierUsage(sizes.get(digest, 0), resident.get(digest, 0)) for digest in sizes | resident}

    def insert(self, digest: str, packed: PackedAdapter) -> bool:
        """Add an adapter that was read elsewhere to RAM, and make it resident if there is room. Return whether it is resident."""
        self._dropped.discard(digest)
        self._add(digest, packed)
        try:
            return digest in self.residents or self._make_resident(digest)
        except (MemoryError, RuntimeError):  # out of memory; a request that needs the adapter gets the error
            logger.exception("%r could not be made resident", packed.name)
            return False
        finally:
            self._trim()

    def pin(self, digest: str, packed: PackedAdapter) -> bool:
        """Add an adapter and keep it resident until it is unpinned. Return False if running sequences use all the room just now.

        Raises `NoRoomError` if too little room would be left for unpinned adapters.
        """
        residents = self.residents
        if not residents.can_pin(digest, packed.num_bytes):
            pinned = f"{residents.num_pinned} adapters of {residents.num_pinned_bytes} bytes, and this one has {packed.num_bytes}"
            half = f"half at most of {residents.num_slots} slots and {residents.max_bytes} bytes"
            raise NoRoomError(f"pinned are {pinned}, expected {half}")
        is_resident = self.insert(digest, packed)
        if is_resident:
            residents.pin(digest)
        return is_resident

    def drop(self, digest: str) -> None:
        """Free an adapter, and the merges built of it, as soon as no sequence uses or waits for them."""
        self.residents.unpin(digest)
        for dropped in (digest, *(merged for merged, parts in self._merge_parts.items() if digest in parts)):
            self._dropped.add(dropped)
            self._purge(dropped)

    def check_integrity(self, running: Items[Sequence]) -> None:
        """Assert that the adapters in use are those of the running sequences, and that the byte counts are right."""
        self.residents.check_integrity(sum(len(s.residents) for s in running))
        assert self.num_loaded_bytes == sum(packed.num_bytes for packed in self._loaded.values())
        assert self._merging.keys() <= self._waiters.keys()
        assert len(self._merging) >= self._max_merging or not self._merge_queue

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()

    def _must_wait(self, digest: str, sequence: Sequence) -> bool:
        # Whether the adapter is not in RAM yet. Starts its load if there is room for another one. The oldest waiting sequence
        # needs no room: otherwise sequences that each have a part of their adapters could wait for each other for ever.
        is_merge = digest == sequence.merged_digest
        if digest in self._waiters or self._can_start_load(is_merge) or sequence in self._first_waiter():
            self._add_waiter(digest, sequence)
        elif is_merge and digest not in self._loaded:
            self._merge_queue.add(sequence)
        return digest not in self._loaded

    def _can_start_load(self, is_merge: bool) -> bool:
        # Merges take long, and one tenant can ask for any number of them, so they have a limit of their own.
        if is_merge:
            return len(self._merging) < self._max_merging
        return len(self._waiters) - len(self._merging) < self._max_loading

    def _is_deferred(self, digest: str, sequence: Sequence) -> bool:
        # A queued merge starts on its own when its tenant's turn comes.
        is_merge = digest == sequence.merged_digest
        return sequence in self._merge_queue if is_merge else not self._can_start_load(is_merge)

    def _add_waiter(self, digest: str, sequence: Sequence) -> None:
        if digest == sequence.merged_digest:
            self._merge_queue.discard(sequence)
            self._merging.setdefault(digest, sequence.request.tenant)
        if digest not in self._waiters and digest not in self._loaded:
            self._loader.start(digest, sequence.request)
        self._waiters.setdefault(digest, {})[sequence] = None

    def _end_load(self, digest: str) -> None:
        # Ends the load of an adapter. If it was a merge, the next queued merge starts.
        self._waiters.pop(digest, None)
        self._merging.pop(digest, None)
        while self._can_start_load(is_merge=True) and (sequence := self._merge_queue.pop(self._merging.values())):
            merged = sequence.merged_digest
            if merged and merged not in self._loaded and merged not in self.residents:  # else there is nothing to build
                self._add_waiter(merged, sequence)

    def _first_waiter(self) -> Iterable[Sequence]:
        return islice(next(iter(self._waiters.values()), {}), 1)

    def _make_resident(self, digest: str) -> bool:
        # Moves an adapter from RAM into a slot. Returns whether there was room.
        packed = self._loaded[digest]
        emptied = self.residents.make_room(packed.num_bytes)
        if emptied is None:
            return False
        for slot in emptied:
            self._pool.clear(slot)
        slot = self.residents.add(digest, packed.num_bytes, packed.config.scale)
        try:
            self._pool.put(slot, packed)
        except (MemoryError, RuntimeError, ValueError):
            self._pool.clear(self.residents.remove(digest))
            raise
        self._loaded.move_to_end(digest)
        return True

    def _term(self, digest: str, weight: ResidentWeight) -> tuple[int, Weight]:
        resident = self.residents.get(digest)
        if not isinstance(weight, tuple):
            return resident.slot, weight * resident.scale
        return resident.slot, self._pool.layer_weights(resident.slot, [block * resident.scale for block in weight])

    def _no_room(self, sequence: Sequence) -> Residency:
        self._remove_waiter(sequence)
        sizes = {digest: self._num_bytes(digest) for digest, _ in sequence.residents}
        pinned_sizes = [size for digest, size in sizes.items() if self.residents.is_pinned(digest)]
        num_slots = self.residents.num_slots - self.residents.num_pinned + len(pinned_sizes)
        max_bytes = self.residents.max_bytes - self.residents.num_pinned_bytes + sum(pinned_sizes)
        if len(sizes) <= num_slots and sum(sizes.values()) <= max_bytes:
            return "full"
        budget = f"{num_slots} slots and {max_bytes} bytes"
        self._failed[sequence] = f"its adapters do not fit together in the {budget} that the server has for adapters"
        return "loading"

    def _num_bytes(self, digest: str) -> int:
        return self.residents.get(digest).num_bytes if digest in self.residents else self._loaded[digest].num_bytes

    def _remove_waiter(self, sequence: Sequence) -> None:
        self._merge_queue.discard(sequence)
        for digest, _ in sequence.residents:
            waiting = self._waiters.get(digest, {})
            waiting.pop(sequence, None)
            if not waiting and digest in self._loaded:
                self._end_load(digest)

    def _add(self, digest: str, packed: PackedAdapter) -> None:
        if digest not in self._loaded:  # else it was requested again while it arrived
            self._loaded[digest] = packed
            self.num_loaded_bytes += packed.num_bytes

    def _trim(self) -> None:
        for digest in [*self._loaded]:
            if self.num_loaded_bytes <= self._max_loaded_bytes:
                return
            if not self._waiters.get(digest):
                self._unload(digest)

    def _unload(self, digest: str) -> None:
        self.num_loaded_bytes -= self._loaded.pop(digest).num_bytes
        self._end_load(digest)

    def _purge(self, digest: str) -> None:
        if digest not in self._dropped or self._waiters.get(digest) or self._loader.is_reading(digest):
            return
        if digest in self.residents:
            if not self.residents.get(digest).is_evictable:
                return
            self._pool.clear(self.residents.remove(digest))
        if digest in self._loaded:
            self._unload(digest)
        self._merge_parts.pop(digest, None)
        self._dropped.discard(digest)
