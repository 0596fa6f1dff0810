"""Which adapter lies in which slot, and for whom it must stay there. Plain values; the bytes are elsewhere."""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class Resident:
    """What lies in a slot. `num_pins` sequences use it; it is kept where it stays unused, too."""

    slot: int
    num_bytes: int
    scale: float
    """alpha / r of the adapter."""
    num_pins: int = 0
    is_kept: bool = False

    @property
    def can_go(self) -> bool:
        """Whether it may make room for others."""
        return not self.num_pins and not self.is_kept


class Residents:
    """At most `num_slots` adapters of `max_bytes` in all, by digest; the one that is unused longest goes first."""

    def __init__(self, num_slots: int, max_bytes: int) -> None:
        self.num_slots, self.max_bytes = num_slots, max_bytes
        self.num_bytes = 0
        self.num_evictions = 0
        """So far."""
        self.num_pinned = 0
        """Adapters that some sequence uses. Counted, for it is read while another thread moves them."""
        self.num_kept = self.num_kept_bytes = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_digest: OrderedDict[str, Resident] = OrderedDict()  # the one unused longest first

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_digest

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def digests(self) -> frozenset[str]:
        """What is resident now. Any thread may ask: the copy is made at once."""
        return frozenset([*self._by_digest])

    def get(self, digest: str) -> Resident:
        """Return what is known of a resident adapter."""
        return self._by_digest[digest]

    def pin(self, digest: str) -> None:
        """Keep a resident adapter in its slot for one more sequence."""
        of = self._by_digest[digest]
        self.num_pinned += not of.num_pins
        of.num_pins += 1
        self._by_digest.move_to_end(digest)

    def unpin(self, digest: str) -> None:
        """Take a pin back."""
        of = self._by_digest[digest]
        of.num_pins -= 1
        assert of.num_pins >= 0
        self.num_pinned -= not of.num_pins
        self._by_digest.move_to_end(digest)

    def can_keep(self, digest: str, num_bytes: int) -> bool:
        """Whether half of the slots and of the bytes are left for others where this one is kept, too."""
        if self.is_kept(digest):
            return True
        return 2 * (self.num_kept + 1) <= self.num_slots and 2 * (self.num_kept_bytes + num_bytes) <= self.max_bytes

    def is_kept(self, digest: str) -> bool:
        """Whether an adapter is resident and kept so."""
        return digest in self and self._by_digest[digest].is_kept

    def keep(self, digest: str) -> None:
        """Keep a resident adapter in its slot until it is released."""
        of = self._by_digest[digest]
        self.num_kept += not of.is_kept
        self.num_kept_bytes += of.num_bytes * (not of.is_kept)
        of.is_kept = True

    def release(self, digest: str) -> None:
        """Let an adapter that may have been kept make room for others."""
        of = self._by_digest.get(digest)
        if of and of.is_kept:
            of.is_kept = False
            self.num_kept -= 1
            self.num_kept_bytes -= of.num_bytes

    def sizes(self) -> dict[str, int]:
        """Return what each resident adapter takes, in bytes. Any thread may ask: what it hears was so a moment ago."""
        return {digest: of.num_bytes for digest, of in dict.copy(self._by_digest).items()}  # copied without Python's loop

    def make_room(self, num_bytes: int) -> list[int] | None:
        """Evict what must go so that an adapter of `num_bytes` fits, and returns the slots that are empty now.

        `None`, and nothing is evicted, where it could not fit beside what is pinned or kept.
        """
        victims: list[str] = []
        num_free, left = len(self._free), self.max_bytes - self.num_bytes
        for digest, of in self._by_digest.items():
            if num_free and left >= num_bytes:
                break
            if of.can_go:
                victims.append(digest)
                num_free, left = num_free + 1, left + of.num_bytes
        if not num_free or left < num_bytes:
            return None
        return [self._evict(digest) for digest in victims]

    def add(self, digest: str, num_bytes: int, scale: float) -> int:
        """Give an adapter a slot; there must be room."""
        assert digest not in self._by_digest
        slot = self._free.pop()
        self._by_digest[digest] = Resident(slot, num_bytes, scale)
        self.num_bytes += num_bytes
        return slot

    def check_integrity(self, num_pins: int) -> None:
        """Assert that slots and bytes add up, and that there are `num_pins` pins."""
        slots = [of.slot for of in self._by_digest.values()]
        assert sorted([*slots, *self._free]) == list(range(self.num_slots))
        assert self.num_bytes == sum(of.num_bytes for of in self._by_digest.values()) <= self.max_bytes
        assert sum(of.num_pins for of in self._by_digest.values()) == num_pins
        assert sum(of.num_pins > 0 for of in self._by_digest.values()) == self.num_pinned
        kept = [of.num_bytes for of in self._by_digest.values() if of.is_kept]
        assert (self.num_kept, self.num_kept_bytes) == (len(kept), sum(kept))

    def remove(self, digest: str) -> int:
        """Take out an adapter that may go, and return its slot."""
        of = self._by_digest.pop(digest)
        assert of.can_go
        self._free.append(of.slot)
        self.num_bytes -= of.num_bytes
        return of.slot

    def _evict(self, digest: str) -> int:
        self.num_evictions += 1
        return self.remove(digest)
