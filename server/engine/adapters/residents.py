"""The slots' bookkeeping: which adapter is in which slot, and which must stay. Plain values; the bytes are elsewhere."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

Tier = Literal["disk", "loaded", "resident"]


class NoRoomError(Exception):
    """Pinning another adapter would leave too little room for unpinned ones."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """The bytes that an adapter takes in each tier; 0 if the tier does not hold the adapter."""

    bytes_loaded: int = 0
    bytes_resident: int = 0

    @property
    def tier(self) -> Tier:
        """The fastest tier that holds the adapter."""
        return "resident" if self.bytes_resident else "loaded" if self.bytes_loaded else "disk"


@dataclass(slots=True)
class Resident:
    """The adapter in a slot. `num_users` sequences use it. A pinned adapter stays even if it is unused."""

    slot: int
    num_bytes: int
    scale: float
    """alpha / r of the adapter."""
    num_users: int = 0
    is_pinned: bool = False

    @property
    def is_evictable(self) -> bool:
        """Whether the adapter may be evicted."""
        return not self.num_users and not self.is_pinned


class Residents:
    """Resident adapters by digest: at most `num_slots`, of `max_bytes` together. The least recently used one is evicted first."""

    def __init__(self, num_slots: int, max_bytes: int) -> None:
        self.num_slots, self.max_bytes = num_slots, max_bytes
        self.num_bytes = 0
        self.num_evictions = 0
        """Number of evictions so far."""
        self.num_in_use = 0
        """Number of adapters that sequences use. Kept as a counter, because other threads read it."""
        self.num_pinned = self.num_pinned_bytes = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_digest: OrderedDict[str, Resident] = OrderedDict()  # the least recently used first

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_digest

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def digests(self) -> frozenset[str]:
        """Digests of the resident adapters. Thread-safe: the copy is atomic."""
        return frozenset([*self._by_digest])

    def get(self, digest: str) -> Resident:
        """Return the entry of a resident adapter."""
        return self._by_digest[digest]

    def acquire(self, digest: str) -> None:
        """Add a user to a resident adapter, which then stays in its slot."""
        resident = self._by_digest[digest]
        self.num_in_use += not resident.num_users
        resident.num_users += 1
        self._by_digest.move_to_end(digest)

    def release(self, digest: str) -> None:
        """Remove a user of an adapter."""
        resident = self._by_digest[digest]
        resident.num_users -= 1
        assert resident.num_users >= 0
        self.num_in_use -= not resident.num_users
        self._by_digest.move_to_end(digest)

    def can_pin(self, digest: str, num_bytes: int) -> bool:
        """Whether pinning this adapter leaves half of the slots and of the bytes to unpinned ones."""
        if self.is_pinned(digest):
            return True
        return 2 * (self.num_pinned + 1) <= self.num_slots and 2 * (self.num_pinned_bytes + num_bytes) <= self.max_bytes

    def is_pinned(self, digest: str) -> bool:
        """Whether an adapter is resident and pinned."""
        return digest in self and self._by_digest[digest].is_pinned

    def pin(self, digest: str) -> None:
        """Keep a resident adapter in its slot until it is unpinned."""
        resident = self._by_digest[digest]
        self.num_pinned += not resident.is_pinned
        self.num_pinned_bytes += resident.num_bytes * (not resident.is_pinned)
        resident.is_pinned = True

    def unpin(self, digest: str) -> None:
        """Unpin an adapter, if it is pinned."""
        resident = self._by_digest.get(digest)
        if resident and resident.is_pinned:
            resident.is_pinned = False
            self.num_pinned -= 1
            self.num_pinned_bytes -= resident.num_bytes

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each resident adapter. Thread-safe, but may be slightly outdated."""
        # `dict.copy` is atomic: no other thread runs during it.
        return {digest: resident.num_bytes for digest, resident in dict.copy(self._by_digest).items()}

    def make_room(self, num_bytes: int) -> list[int] | None:
        """Evict as many adapters as needed to fit one of `num_bytes`, and return the emptied slots.

        Returns None and evicts nothing if it could not fit beside the adapters that are in use or pinned.
        """
        victims: list[str] = []
        num_free, bytes_left = len(self._free), self.max_bytes - self.num_bytes
        for digest, resident in self._by_digest.items():
            if num_free and bytes_left >= num_bytes:
                break
            if resident.is_evictable:
                victims.append(digest)
                num_free, bytes_left = num_free + 1, bytes_left + resident.num_bytes
        if not num_free or bytes_left < num_bytes:
            return None
        return [self._evict(digest) for digest in victims]

    def add(self, digest: str, num_bytes: int, scale: float) -> int:
        """Give an adapter a slot and return the slot. There must be room."""
        assert digest not in self._by_digest
        slot = self._free.pop()
        self._by_digest[digest] = Resident(slot, num_bytes, scale)
        self.num_bytes += num_bytes
        return slot

    def check_integrity(self, num_users: int) -> None:
        """Assert that slots and bytes add up, and that all adapters together have `num_users` users."""
        slots = [resident.slot for resident in self._by_digest.values()]
        assert sorted([*slots, *self._free]) == list(range(self.num_slots))
        assert self.num_bytes == sum(resident.num_bytes for resident in self._by_digest.values()) <= self.max_bytes
        assert sum(resident.num_users for resident in self._by_digest.values()) == num_users
        assert sum(resident.num_users > 0 for resident in self._by_digest.values()) == self.num_in_use
        pinned_sizes = [resident.num_bytes for resident in self._by_digest.values() if resident.is_pinned]
        assert (self.num_pinned, self.num_pinned_bytes) == (len(pinned_sizes), sum(pinned_sizes))

    def remove(self, digest: str) -> int:
        """Remove an evictable adapter and return its slot."""
        resident = self._by_digest.pop(digest)
        assert resident.is_evictable
        self._free.append(resident.slot)
        self.num_bytes -= resident.num_bytes
        return resident.slot

    def _evict(self, digest: str) -> int:
        self.num_evictions += 1
        return self.remove(digest)
