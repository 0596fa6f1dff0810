"""The KV cache's bookkeeping: free, cached and owned blocks, and the blocks of each sequence. Plain ints; no tensor.

Each sequence that uses a block is an owner of the block. A block without owners is cached if it has a key, else free. Free blocks
are allocated first, then cached ones, in the order in which they were released. The key of a full block is a digest of all tokens
up to its end, of the adapters and weights that they were computed with, and of the base model.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from server.engine.request import Request, Sequence


class BlockPool:
    """A pool of `num_blocks` blocks. Full blocks can be published under a key and found again."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # in the order of eviction

    @property
    def num_available(self) -> int:
        """Number of blocks without owners."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Number of available blocks that can be found by key."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks with one new owner. At least `count` blocks must be available."""
        assert count <= self.num_available
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._num_owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, key: bytes) -> int | None:
        """Return the block published under `key`, or None. The caller owns it only after `acquire`."""
        return self._by_key.get(key)

    def is_cached(self, block: int) -> bool:
        """Whether a published block has no owners, so it counts as available."""
        return not self._num_owners[block]

    def num_owners(self, block: int) -> int:
        """Number of owners of a block."""
        return self._num_owners[block]

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add an owner to blocks returned by `find`."""
        for block in blocks:
            if not self._num_owners[block]:
                del self._cached[block]
            self._num_owners[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Make an owned block findable. If another block is already published under this key, that block stays."""
        assert self._num_owners[block]
        assert self._keys[block] is None
        if self._by_key.setdefault(key, block) == block:
            self._keys[block] = key

    def release(self, blocks: list[int]) -> None:
        """Remove an owner's blocks from the list and release them. The last block is evicted first, the first one last."""
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
        """Assert that `owners` own exactly the owned blocks, and that every block is either free, cached or owned."""
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
"""Bytes of a key. A tenant who finds two texts with the same key would read another tenant's answers, so keys are long."""


class KvCache:
    """The KV cache: `num_blocks` blocks of `block_size` tokens, by sequence. `base` identifies the base model's weights."""

    def __init__(self, num_blocks: int, block_size: int, base: str) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._pool, self._base = BlockPool(num_blocks), base
        self.num_prefix_query_tokens = 0
        """Prompt tokens of all sequences that looked up the prefix cache."""
        self.num_prefix_hit_tokens = 0
        """Prompt tokens that were found in the prefix cache."""

    @property
    def num_available(self) -> int:
        """Number of blocks without owners."""
        return self._pool.num_available

    @property
    def num_cached(self) -> int:
        """Number of blocks without owners that can be found again."""
        return self._pool.num_cached

    @property
    def usage(self) -> float:
        """Fraction of all blocks that is owned."""
        return 1 - self.num_available / self.num_blocks

    def num_needed(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of the longest computed prefix of a sequence that has no blocks.

        At least the last token is left out. Returns nothing while the logits of the sequence's whole prompt are needed.
        """
        prefix_blocks: list[int] = []
        if needs_prompt_logprobs(sequence):
            return prefix_blocks
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._pool.find(self._key(sequence, index))
            if block is None:
                break
            prefix_blocks.append(block)
        return prefix_blocks

    def has_room(self, sequence: Sequence, prefix_blocks: Items[int], headroom: int) -> bool:
        """Whether the blocks of the sequence, `prefix_blocks` among them, fit in with `headroom` blocks left."""
        num_new = self.num_needed(sequence.num_tokens) - len(prefix_blocks)
        if num_new + headroom > self.num_available:
            return False
        return num_new + headroom + sum(map(self._pool.is_cached, prefix_blocks)) <= self.num_available

    def num_to_preempt(self, sequence: Sequence, others: Items[Sequence], headroom: int) -> int | None:
        """Return how many of `others`, in order, must be preempted to make room for a sequence: at least one.

        Each preempted sequence lowers `headroom` by one block. None if preempting all of them would not be enough.
        """
        prefix_blocks = set(self.find_prefix(sequence))
        num_lacking = self.num_needed(sequence.num_tokens) - len(prefix_blocks) + headroom - self.num_available
        num_lacking += sum(map(self._pool.is_cached, prefix_blocks))
        num_released: Counter[int] = Counter()
        for count, other in enumerate(others, 1):
            num_released.update(other.blocks)
            # A shared block is freed with its last owner. Prefix blocks are already counted above.
            freed_blocks = [
                block
                for block in other.blocks
                if num_released[block] == self._pool.num_owners(block) and block not in prefix_blocks
            ]
            num_lacking -= len(freed_blocks) + 1
            if num_lacking <= 0:
                return count
        return None

    def allocate(self, sequence: Sequence, prefix_blocks: Items[int]) -> None:
        """Allocate all blocks of a sequence that has room. Its `prefix_blocks` count as computed."""
        assert not sequence.blocks
        self._pool.acquire(prefix_blocks)
        num_new = self.num_needed(sequence.num_tokens) - len(prefix_blocks)
        sequence.blocks = [*prefix_blocks, *self._pool.allocate(num_new)]
        sequence.num_computed = sequence.num_prefix_tokens = len(prefix_blocks) * self.block_size
        if not sequence.num_preemptions and not needs_prompt_logprobs(sequence):
            sequence.num_cached = sequence.num_computed
            self.num_prefix_query_tokens += len(sequence.request.prompt_ids)
            self.num_prefix_hit_tokens += sequence.num_cached

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether the sequence has more tokens than its blocks hold."""
        return len(sequence.blocks) * self.block_size < sequence.num_tokens

    def grow(self, sequence: Sequence) -> bool:
        """Allocate one more block for a sequence that needs it. Return whether a block was available."""
        if not self.num_available:
            return False
        sequence.blocks += self._pool.allocate(1)
        return True

    def publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Publish the blocks that became full when the tokens from `start` to `stop` were computed."""
        for index in range(start // self.block_size, stop // self.block_size):
            self._pool.publish(sequence.blocks[index], self._key(sequence, index))

    def free(self, sequence: Sequence) -> None:
        """Release a sequence's blocks. Published blocks can still be found."""
        self._pool.release(sequence.blocks)
        sequence.num_computed = 0

    def copy_block_keys(self, sequence: Sequence, other: Sequence) -> None:
        """Copy the block keys of `sequence`'s prompt to `other`, of the same request, so that they are not computed again."""
        other.block_keys[:] = sequence.block_keys[: len(sequence.request.prompt_ids) // self.block_size]

    def check_integrity(self, owners: Iterable[Sequence]) -> None:
        """Assert that `owners` own exactly the owned blocks, and that every block is either free, cached or owned."""
        self._pool.check_integrity(sequence.blocks for sequence in owners)

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys, size = sequence.block_keys, self.block_size
        while len(keys) <= index:
            parent = keys[-1] if keys else root_key(self._base, sequence.request)
            start = len(keys) * size
            keys.append(block_key(parent, sequence.ids(start, start + size)))
        return keys[index]


def needs_prompt_logprobs(sequence: Sequence) -> bool:
    """Whether the logits of all prompt tokens are needed: for a request's first choice, until it has an output token."""
    request = sequence.request
    is_scored = request.sampling.echo and request.sampling.num_logprobs is not None
    return is_scored and sequence.choice == 0 and not sequence.output_ids


def root_key(base: str, request: Request) -> bytes:
    """Return the parent key of a first block: the base model, the tenant, and the adapters with their weights.

    The tenant is part of it because a fast answer would reveal that another tenant sent the same prompt.
    """
    return hashlib.blake2b(repr((base, request.tenant, request.residents)).encode(), digest_size=DIGEST_SIZE).digest()


def block_key(parent: bytes, ids: Items[int]) -> bytes:
    """Return the key of the block with tokens `ids` that follows the block with key `parent`."""
    return hashlib.blake2b(parent + array("I", ids).tobytes(), digest_size=DIGEST_SIZE).digest()
