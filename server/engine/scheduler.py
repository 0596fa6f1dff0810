"""Which sequences run in a step, and how many tokens of each. No tensor in it.

First come, first served. A sequence joins when the KV memory holds all that it can grow to, so it never has to be put back;
running sequences decode in every step, and what is left of the step's token budget goes to prompts, in chunks.
"""

from collections import deque
from dataclasses import dataclass

from server.engine.kv_cache import BlockAllocator
from server.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens `start` to `stop` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the token after this chunk is to be sampled."""
        return self.stop == self.sequence.num_tokens and self.sequence.request.max_tokens > 0


class Scheduler:
    """Owns the waiting and the running sequences, and their blocks."""

    def __init__(self, allocator: BlockAllocator, max_sequences: int, max_step_tokens: int) -> None:
        assert max_step_tokens > max_sequences, "a step must have room for prompts beside decoding"
        self.allocator = allocator
        self.max_sequences, self.max_step_tokens = max_sequences, max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.waiting.append(sequence)

    def drop_aborted(self) -> list[Sequence]:
        """Takes out the sequences marked as aborted, frees what they own, and returns them."""
        aborted = [s for s in (*self.waiting, *self.running) if s.is_aborted]
        for sequence in aborted:
            self.finish(sequence)
        return aborted

    def plan(self) -> list[Chunk]:
        """Returns the chunks of the next step, decoding first."""
        while self.waiting and len(self.running) < self.max_sequences and self.allocator.can_hold(self.waiting[0].max_num_tokens):
            sequence = self.waiting.popleft()
            sequence.blocks = self.allocator.allocate(sequence.max_num_tokens)
            self.running.append(sequence)
        budget = self.max_step_tokens
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1):
            count = min(budget, sequence.num_tokens - sequence.num_computed)
            if count:
                chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_computed + count))
                budget -= count
        return chunks

    def commit(self, chunk: Chunk, token: int | None) -> None:
        """Records that a chunk is computed, and the token sampled after it."""
        chunk.sequence.num_computed = chunk.stop
        if token is not None:
            chunk.sequence.output_ids.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.allocator.release(sequence.blocks)

    def check_integrity(self) -> None:
        """Asserts that every block is free or owned, once."""
        owned = sum(len(s.blocks) for s in self.running)
        assert owned + self.allocator.num_free == self.allocator.num_blocks
        assert not any(s.blocks for s in self.waiting)
