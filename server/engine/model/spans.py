"""Which tokens of a step are which sequence's, and where its keys and values lie. Plain values."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """The step's tokens [row, row + num_tokens) stand at the positions from `position` on of a sequence with these `blocks`."""

    row: int
    num_tokens: int
    position: int
    blocks: Sequence[int]
