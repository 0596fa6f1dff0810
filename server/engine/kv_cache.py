"""Which blocks of KV memory are free and which are owned: plain ints, no tensor."""


class BlockAllocator:
    """Hands out blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The share of all blocks that is owned."""
        return 1 - self.num_free / self.num_blocks

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_hold(self, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens fit into what is free now."""
        return self.num_needed(num_tokens) <= self.num_free

    def allocate(self, num_tokens: int) -> list[int]:
        """Returns blocks for `num_tokens` tokens, now owned by the caller."""
        count = self.num_needed(num_tokens)
        assert count <= self.num_free
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Takes owned blocks back and empties the list."""
        self._free += reversed(blocks)
        blocks.clear()
        assert len(self._free) <= self.num_blocks
