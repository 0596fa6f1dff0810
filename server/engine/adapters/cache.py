"""The adapter cache: an adapter is registered (on disk), loaded (in RAM, packed) or resident (in the kernels' operands).

Each tier has a budget in bytes. The least recently used adapter is evicted first; one that a sequence uses or waits for, or that
is pinned, never. The engine's thread owns all of this; the loader reads files in a thread of its own. Merges that wait for a
place are taken from the tenants in turn, and within a tenant in order of arrival: weights are free numbers, so one tenant can
ask for any number of merges, and they must delay only its own requests.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lori.packed_adapter import PackedAdapter
from lori.pool import AdapterPool
from server.engine.adapters.loader import Loader, named
from server.engine.adapters.residents import Residents
from server.engine.request import Request, Sequence
from server.engine.scheduling.scheduler import Residency

logger = logging.getLogger(__name__)


Tier = Literal["disk", "loaded", "resident"]


class NoRoomError(Exception):
    """So much would be kept resident that too little is left for others."""


@dataclass(frozen=True, slots=True)
class Place:
    """What an adapter takes in each tier, in bytes; 0 where it is not there."""

    bytes_loaded: int = 0
    bytes_resident: int = 0

    @property
    def tier(self) -> Tier:
        """The highest in which it is."""
        return "resident" if self.bytes_resident else "loaded" if self.bytes_loaded else "disk"


class MergeQueue:
    """A queue per tenant. Every operation takes the same time however many sequences wait."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Sequence, None]] = OrderedDict()  # the one whose turn is next first

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._tenants.get(sequence.request.tenant, ())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its tenant; one that is queued keeps its place."""
        self._tenants.setdefault(sequence.request.tenant, OrderedDict())[sequence] = None

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, if it is queued."""
        tenant = sequence.request.tenant
        queue = self._tenants.get(tenant)
        if queue is None:
            return
        queue.pop(sequence, None)
        if not queue:
            del self._tenants[tenant]

    def take(self, busy: Collection[str]) -> Sequence | None:
        """Take out and return the sequence whose turn it is; None when none is queued.

        The tenants in `busy`, of whom a merge is under way, have their turn after all others.
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
"""Adapters that are read, or wait in RAM for the sequences that asked for them, at a time; others are asked for later."""
MAX_MERGING = 2
"""Merges that are built, or wait in RAM, at a time, beside `MAX_LOADING`: one is built while the one before it is taken."""


class AdapterTiers:
    """Keeps resident what running sequences need: the scheduler's `ResidencyGate`.

    A step that could begin waits `patience_s` for an adapter that is just being read.
    """

    def __init__(
        self,
        pool: AdapterPool,
        residents: Residents,
        loader: Loader,
        max_loaded_bytes: int,
        max_loading: int = MAX_LOADING,
        patience_s: float = 0.0,
        max_merging: int = MAX_MERGING,
    ) -> None:
        self._pool, self.residents, self._loader = pool, residents, loader
        self._max_loaded_bytes, self._max_loading, self._max_merging = max_loaded_bytes, max_loading, max_merging
        self._patience_s = patience_s
        self._loaded: OrderedDict[str, PackedAdapter] = OrderedDict()  # the one unused longest first
        self._wanted: dict[str, dict[Sequence, None]] = {}
        self._merging: dict[str, str] = {}  # of those wanted, the merges, each with the tenant that asked first
        self._merge_queue = MergeQueue()  # empty while a merge more may be wanted
        self._failed: dict[Sequence, str] = {}
        self._dropped: set[str] = set()  # those that go as soon as they can
        self._expected: Counter[str] = Counter()
        """By digest of a merge that is no sum, the requests in the engine that want it."""
        self._made_of: dict[str, tuple[str, ...]] = {}  # of merges that are no sums, what was merged
        self.num_loaded_bytes = 0
        self.num_failures = 0
        """Adapters that could not be read, or not be made resident, so far."""
        self.observe_load: Callable[[float], None] = lambda _: None
        """Is told the seconds that reading each adapter took."""

    @property
    def num_loaded(self) -> int:
        """Adapters in RAM."""
        return len(self._loaded)

    def on_arrival(self, notify: Callable[[], None]) -> None:
        """Have `notify` called, from the loader's thread, whenever `collect` has something."""
        self._loader.notify = notify

    def prefetch(self, request: Request) -> None:
        """Have the adapters of a request read that is on its way to the engine, while a step runs and the loader is idle.

        Any thread may: it looks up keys alone, and what it finds may be out of date, which costs a reading at most.
        """
        missing = [digest for digest, _ in request.residents if digest not in self.residents and digest not in self._loaded]
        if missing and not self._loader.num_reading:
            for digest in missing[: self._max_loading]:
                self._loader.start(digest, request)

    def expect(self, request: Request) -> None:
        """Note that a request has entered the engine. What it wants merged is built until its `release`."""
        if merged := request.merged_digest:
            self._expected[merged] += 1

    def release(self, request: Request) -> None:
        """Note that a request has ended, after its sequences were unpinned. Gives up a merge that no other request wants."""
        merged = request.merged_digest
        if not merged:
            return
        self._expected[merged] -= 1
        if self._expected[merged]:
            return
        del self._expected[merged]
        self._loader.cancel(merged)
        if not self._loader.is_reading(merged) and merged not in self._loaded:
            self._want_no_more(merged)
        self._purge(merged)

    def pin(self, sequence: Sequence) -> Residency:
        """See `ResidencyGate`. Nothing is held for a sequence that hears "loading", but that what it waits for stays in RAM."""
        digests = [digest for digest, _ in sequence.residents]
        self._dropped.difference_update(digests)
        missing = [digest for digest in digests if digest not in self.residents]
        awaited = [digest for digest in missing if self._is_awaited(digest, sequence)]
        if awaited:
            return "loading"
        pinned: list[str] = []
        for digest in sorted(digests, key=missing.__contains__):  # first what is here, which must not go for what is not
            try:
                fits = digest in self.residents or self._settle(digest)
            except (MemoryError, RuntimeError, ValueError) as error:  # one adapter's failure is not the engine's
                logger.exception("an adapter could not be made resident")
                self.num_failures += 1
                self._failed[sequence] = f"an adapter could not be made resident: {error!r}"
                fits = False
            if not fits:
                for other in pinned:
                    self.residents.unpin(other)
                return "loading" if sequence in self._failed else self._refuse(sequence)
            self.residents.pin(digest)
            pinned.append(digest)
        self._forget(sequence)
        found = [(self.residents.get(digest), weight) for digest, weight in sequence.residents]
        sequence.terms = [(of.slot, weight * of.scale) for of, weight in found]
        return "ready"

    def is_behind(self, sequence: Sequence) -> bool:
        """See `ResidencyGate`."""
        if sequence in self._first_waiting():
            return False
        is_behind = False
        for digest, _ in sequence.residents:
            if digest not in self._wanted and digest not in self._loaded and digest not in self.residents:
                if not self._is_held_up(digest, sequence):
                    return False
                is_behind = True
        return is_behind

    def unpin(self, sequence: Sequence) -> None:
        """See `ResidencyGate`."""
        if sequence.terms is None:
            self._forget(sequence)
        else:
            for digest, _ in sequence.residents:
                self.residents.unpin(digest)
            sequence.terms = None
        for digest, _ in sequence.residents if self._dropped else ():
            self._purge(digest)

    def collect(self) -> bool:
        """Take in what was read, and what is just being read where that is waited for; returns whether anything was, so that the
        scheduler is to ask again."""
        if self._patience_s and self._loader.num_reading:
            self._loader.wait(self._patience_s)
        arrived = self._loader.collect()
        for loaded in arrived:
            waiting = self._wanted.get(loaded.digest, {})
            if loaded.packed is None:
                self.num_failures += bool(waiting)  # else it is read again for who asked
                # Each is told by its own name: what another calls the same content may be none of its business.
                self._failed |= {of: f"adapter {named(loaded.digest, of.request)} {loaded.fault}" for of in waiting}
                self._want_no_more(loaded.digest)
                self._dropped.discard(loaded.digest)
                continue
            if not waiting:
                self._want_no_more(loaded.digest)
            self.observe_load(loaded.seconds)
            self._add(loaded.digest, loaded.packed)
            if loaded.made_of:
                there = {digest: of for digest, of in self._made_of.items() if digest in self._loaded or digest in self.residents}
                self._made_of = there | {loaded.digest: loaded.made_of}
            self._purge(loaded.digest)
        self._trim()
        return bool(arrived)

    def take_failed(self) -> dict[Sequence, str]:
        """Return the sequences whose adapters cannot be served, each with the reason, once."""
        failed, self._failed = self._failed, {}
        return failed

    def places(self) -> Mapping[str, Place]:
        """Return where the adapters are that are not on disk alone. Any thread may ask: what it hears was so a moment ago."""
        loaded, resident = dict.copy(self._loaded), self.residents.sizes()  # copied without Python's loop
        sizes = {digest: packed.num_bytes for digest, packed in loaded.items()}
        return {digest: Place(sizes.get(digest, 0), resident.get(digest, 0)) for digest in sizes | resident}

    def take_in(self, digest: str, packed: PackedAdapter) -> bool:
        """Take in an adapter that was read elsewhere, and makes it resident where there is room; returns whether it is."""
        self._dropped.discard(digest)
        self._add(digest, packed)
        try:
            return digest in self.residents or self._settle(digest)
        except (MemoryError, RuntimeError):  # there is none; a request that asks for it will hear so
            logger.exception("%r could not be made resident", packed.name)
            return False
        finally:
            self._trim()

    def keep(self, digest: str, packed: PackedAdapter) -> bool:
        """Take an adapter in and keeps it resident until it is released; returns False where all room is used just now.

        Raises `NoRoomError` where too little would be left for others.
        """
        residents = self.residents
        if not residents.can_keep(digest, packed.num_bytes):
            found = f"{residents.num_kept} adapters of {residents.num_kept_bytes} bytes, and this one has {packed.num_bytes}"
            half = f"half at most of {residents.num_slots} slots and {residents.max_bytes} bytes"
            raise NoRoomError(f"pinned are {found}, expected {half}")
        is_resident = self.take_in(digest, packed)
        if is_resident:
            residents.keep(digest)
        return is_resident

    def drop(self, digest: str) -> None:
        """Free what an adapter takes, and what was merged of it, as soon as no sequence uses it or waits for it."""
        self.residents.release(digest)
        for one in (digest, *(merged for merged, parts in self._made_of.items() if digest in parts)):
            self._dropped.add(one)
            self._purge(one)

    def check_integrity(self, running: Items[Sequence]) -> None:
        """Assert that pins are those of the running sequences, and bytes those of what is there."""
        self.residents.check_integrity(sum(len(s.residents) for s in running))
        assert self.num_loaded_bytes == sum(of.num_bytes for of in self._loaded.values())
        assert self._merging.keys() <= self._wanted.keys()
        assert len(self._merging) >= self._max_merging or not self._merge_queue

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _is_awaited(self, digest: str, sequence: Sequence) -> bool:
        # Whether the adapter is not in RAM; has it read if there is room for one more. Who waits longest need not ask for room:
        # else those who have some of their adapters could wait for each other.
        is_merge = digest == sequence.merged_digest
        if digest in self._wanted or self._has_place(is_merge) or sequence in self._first_waiting():
            self._want(digest, sequence)
        elif is_merge and digest not in self._loaded:
            self._merge_queue.add(sequence)
        return digest not in self._loaded

    def _has_place(self, is_merge: bool) -> bool:
        # Merges take long, and one tenant can want any number of them: they have places of their own.
        if is_merge:
            return len(self._merging) < self._max_merging
        return len(self._wanted) - len(self._merging) < self._max_loading

    def _is_held_up(self, digest: str, sequence: Sequence) -> bool:
        # A merge that is queued is begun when its turn comes, unasked.
        is_merge = digest == sequence.merged_digest
        return sequence in self._merge_queue if is_merge else not self._has_place(is_merge)

    def _want(self, digest: str, sequence: Sequence) -> None:
        if digest == sequence.merged_digest:
            self._merge_queue.discard(sequence)
            self._merging.setdefault(digest, sequence.request.tenant)
        if digest not in self._wanted and digest not in self._loaded:
            self._loader.start(digest, sequence.request)
        self._wanted.setdefault(digest, {})[sequence] = None

    def _want_no_more(self, digest: str) -> None:
        # Gives up the place of an adapter; that of a merge goes to the next one.
        self._wanted.pop(digest, None)
        self._merging.pop(digest, None)
        while self._has_place(is_merge=True) and (sequence := self._merge_queue.take(self._merging.values())):
            merged = sequence.merged_digest
            if merged and merged not in self._loaded and merged not in self.residents:  # else there is nothing to build
                self._want(merged, sequence)

    def _first_waiting(self) -> Iterable[Sequence]:
        return islice(next(iter(self._wanted.values()), {}), 1)

    def _settle(self, digest: str) -> bool:
        # Moves an adapter from RAM into a slot; returns whether there was room.
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

    def _refuse(self, sequence: Sequence) -> Residency:
        self._forget(sequence)
        sizes = {digest: self._num_bytes(digest) for digest, _ in sequence.residents}
        own = [size for digest, size in sizes.items() if self.residents.is_kept(digest)]
        num_slots = self.residents.num_slots - self.residents.num_kept + len(own)
        max_bytes = self.residents.max_bytes - self.residents.num_kept_bytes + sum(own)
        if len(sizes) <= num_slots and sum(sizes.values()) <= max_bytes:
            return "full"
        budget = f"{num_slots} slots and {max_bytes} bytes"
        self._failed[sequence] = f"its adapters do not fit together in the {budget} that the server has for adapters"
        return "loading"

    def _num_bytes(self, digest: str) -> int:
        return self.residents.get(digest).num_bytes if digest in self.residents else self._loaded[digest].num_bytes

    def _forget(self, sequence: Sequence) -> None:
        self._merge_queue.discard(sequence)
        for digest, _ in sequence.residents:
            waiting = self._wanted.get(digest, {})
            waiting.pop(sequence, None)
            if not waiting and digest in self._loaded:
                self._want_no_more(digest)

    def _add(self, digest: str, packed: PackedAdapter) -> None:
        if digest not in self._loaded:  # else it was asked for again just as it came
            self._loaded[digest] = packed
            self.num_loaded_bytes += packed.num_bytes

    def _trim(self) -> None:
        for digest in [*self._loaded]:
            if self.num_loaded_bytes <= self._max_loaded_bytes:
                return
            if not self._wanted.get(digest):
                self._unload(digest)

    def _unload(self, digest: str) -> None:
        self.num_loaded_bytes -= self._loaded.pop(digest).num_bytes
        self._want_no_more(digest)

    def _purge(self, digest: str) -> None:
        if digest not in self._dropped or self._wanted.get(digest) or self._loader.is_reading(digest):
            return
        if digest in self.residents:
            if not self.residents.get(digest).can_go:
                return
            self._pool.clear(self.residents.remove(digest))
        if digest in self._loaded:
            self._unload(digest)
        self._made_of.pop(digest, None)
        self._dropped.discard(digest)
