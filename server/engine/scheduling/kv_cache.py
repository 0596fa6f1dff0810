"""The KV cache's bookkeeping: free, cached and owned blocks, and the blocks of each sequence. Plain ints; no tensor.

A block has as many owners as sequences use it. A block without an owner is free, or cached when it has a key. Cached blocks are
given away last, the one released longest ago first. The key of a full block is a digest of all tokens up to its end, of the
adapters and weights they were computed with, and of the base: other adapters or weights give another key.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from server.engine.request import Request, Sequence


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
        """Return `count` blocks of one new owner; there must be as many available."""
        assert count <= self.num_available
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._num_owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, key: bytes) -> int | None:
        """Return the block that was published under `key`; its caller owns it only after `share`."""
        return self._by_key.get(key)

    def is_cached(self, block: int) -> bool:
        """Whether a block that was found is one of the available ones."""
        return not self._num_owners[block]

    def num_owners(self, block: int) -> int:
        """How many own a block."""
        return self._num_owners[block]

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks that were found."""
        for block in blocks:
            if not self._num_owners[block]:
                del self._cached[block]
            self._num_owners[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Make an owned block findable; where another already is under this key, that one stays."""
        assert self._num_owners[block]
        assert self._keys[block] is None
        if self._by_key.setdefault(key, block) == block:
            self._keys[block] = key

    def release(self, blocks: list[int]) -> None:
        """Take an owner's blocks back and empties the list. Its last block will be given away first, its first one last."""
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
        """Assert that `owners` are all that own blocks, and that every block is free, cached or owned, once."""
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


DIGEST_SIZE = 32
"""Bytes of a key: who could make two texts of one key would read another's answers."""


class KvCache:
    """The KV memory of `num_blocks` blocks of `block_size` tokens, by sequence. `base` says which weights compute it."""

    def __init__(self, num_blocks: int, block_size: int, base: str) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._pool, self._base = BlockPool(num_blocks), base
        self.num_asked_tokens = 0
        """Prompt tokens of the sequences that have looked for theirs."""
        self.num_found_tokens = 0
        """Those that did not have to be computed."""

    @property
    def num_available(self) -> int:
        """Blocks that nobody owns."""
        return self._pool.num_available

    @property
    def num_cached(self) -> int:
        """Blocks that nobody owns but that can be found again."""
        return self._pool.num_cached

    @property
    def usage(self) -> float:
        """The share of all blocks that is owned."""
        return 1 - self.num_available / self.num_blocks

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, sequence: Sequence) -> list[int]:
        """Return the blocks of the longest computed beginning of a sequence without blocks; at least its last token is left.

        A sequence finds nothing while the logits of its whole prompt are wanted.
        """
        found: list[int] = []
        if must_score(sequence):
            return found
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._pool.find(self._key(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def has_room(self, sequence: Sequence, found: Items[int], headroom: int) -> bool:
        """Whether the sequence's tokens, `found` among them, fit in, and `headroom` blocks are left."""
        num_new = self.num_needed(sequence.num_tokens) - len(found)
        if num_new + headroom > self.num_available:
            return False
        return num_new + headroom + sum(map(self._pool.is_cached, found)) <= self.num_available

    def num_to_close(self, sequence: Sequence, others: Items[Sequence], headroom: int) -> int | None:
        """How many of `others`, in their order, must close for a sequence to have room: one at least.

        Each of them needs a block less of `headroom`. None where all of them would not do.
        """
        found = set(self.find(sequence))
        lacking = self.num_needed(sequence.num_tokens) - len(found) + headroom - self.num_available
        lacking += sum(map(self._pool.is_cached, found))
        closed: Counter[int] = Counter()
        for count, other in enumerate(others, 1):
            closed.update(other.blocks)
            # Blocks that others share are free with the last of them; those that were found are counted above.
            freed = [block for block in other.blocks if closed[block] == self._pool.num_owners(block) and block not in found]
            lacking -= len(freed) + 1
            if lacking <= 0:
                return count
        return None

    def open(self, sequence: Sequence, found: Items[int]) -> None:
        """Give a sequence that has room all blocks of its tokens, and counts what was `found` as computed."""
        assert not sequence.blocks
        self._pool.share(found)
        num_new = self.num_needed(sequence.num_tokens) - len(found)
        sequence.blocks = [*found, *self._pool.allocate(num_new)]
        sequence.num_computed = sequence.num_found = len(found) * self.block_size
        if not sequence.num_preemptions and not must_score(sequence):
            sequence.num_cached = sequence.num_computed
            self.num_asked_tokens += len(sequence.request.prompt_ids)
            self.num_found_tokens += sequence.num_cached

    def lacks_block(self, sequence: Sequence) -> bool:
        """Whether the sequence has outgrown its blocks."""
        return len(sequence.blocks) * self.block_size < sequence.num_tokens

    def grow(self, sequence: Sequence) -> bool:
        """Give a sequence that lacks a block one more; returns whether there was one."""
        if not self.num_available:
            return False
        sequence.blocks += self._pool.allocate(1)
        return True

    def publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Make the blocks findable that became full as the tokens from `start` to `stop` were computed."""
        for index in range(start // self.block_size, stop // self.block_size):
            self._pool.publish(sequence.blocks[index], self._key(sequence, index))

    def close(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; those that were published can still be found."""
        self._pool.release(sequence.blocks)
        sequence.num_computed = 0

    def share_keys(self, sequence: Sequence, other: Sequence) -> None:
        """Spares `other`, of the same request, the digests of its prompt that `sequence` has."""
        other.keys[:] = sequence.keys[: len(sequence.request.prompt_ids) // self.block_size]

    def check_integrity(self, owners: Iterable[Sequence]) -> None:
        """Assert that `owners` are all that have blocks, and that every block is free, cached or owned, once."""
        self._pool.check_integrity(sequence.blocks for sequence in owners)

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys, size = sequence.keys, self.block_size
        while len(keys) <= index:
            parent = keys[-1] if keys else root_key(self._base, sequence.request)
            start = len(keys) * size
            keys.append(block_key(parent, sequence.ids(start, start + size)))
        return keys[index]


def must_score(sequence: Sequence) -> bool:
    """Whether the logits of all prompt tokens are wanted of this sequence: of one choice, until it has an output."""
    request = sequence.request
    return request.echo and request.num_logprobs is not None and sequence.choice == 0 and not sequence.output_ids


def root_key(base: str, request: Request) -> bytes:
    """Return the parent of a first block's key: what its tokens are computed with, and whose they are.

    A tenant that found what another one asked would learn it from how soon it is answered.
    """
    return hashlib.blake2b(repr((base, request.tenant, request.residents)).encode(), digest_size=DIGEST_SIZE).digest()


def block_key(parent: bytes, ids: Items[int]) -> bytes:
    """Return the key of the block of tokens `ids` that follows the block of key `parent`."""
    return hashlib.blake2b(parent + array("I", ids).tobytes(), digest_size=DIGEST_SIZE).digest()
