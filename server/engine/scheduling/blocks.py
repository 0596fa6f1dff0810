"""Which blocks of KV memory are free, cached or owned: plain ints and keys, no tensor, no tokens.

A block has as many owners as sequences use it. One that nobody owns is free or, when it has a key under which it can be found
again, cached: it is given away too, but last, and of the cached ones that first whose release is longest ago.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out `num_blocks` blocks, and finds those again that were published under a key."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be given away first

    @property
    def num_available(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Those of them that can be found again."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Returns `count` blocks of one new owner; there must be as many available."""
        assert count <= self.num_available
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._num_owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, key: bytes) -> int | None:
        """Returns the block that was published under `key`; its caller owns it only after `share`."""
        return self._by_key.get(key)

    def is_cached(self, block: int) -> bool:
        """Whether a block that was found is one of the available ones."""
        return not self._num_owners[block]

    def num_owners(self, block: int) -> int:
        """How many own a block."""
        return self._num_owners[block]

    def share(self, blocks: Iterable[int]) -> None:
        """Adds an owner to blocks that were found."""
        for block in blocks:
            if not self._num_owners[block]:
                del self._cached[block]
            self._num_owners[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Makes an owned block findable; where another already is under this key, that one stays."""
        assert self._num_owners[block]
        assert self._keys[block] is None
        if self._by_key.setdefault(key, block) == block:
            self._keys[block] = key

    def release(self, blocks: list[int]) -> None:
        """Takes an owner's blocks back and empties the list. Its last block will be given away first, its first one last."""
        while blocks:
            block = blocks.pop()
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
            assert self._num_owners[block] >= 0

    def check_integrity(self, owners: Iterable[Iterable[int]]) -> None:
        """Asserts that `owners` are all that own blocks, and that every block is free, cached or owned, once."""
        owned = Counter(block for blocks in owners for block in blocks)
        assert [owned[block] for block in range(self.num_blocks)] == self._num_owners, "owners are counted"
        assert sorted((*self._free, *self._cached, *owned)) == list(range(self.num_blocks)), "each block is there once"
        assert {key: block for block, key in enumerate(self._keys) if key is not None} == self._by_key
        assert all(self._keys[block] is None for block in self._free)
        assert all(self._keys[block] is not None for block in self._cached)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None
        return block
