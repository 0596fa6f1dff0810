"""What sampling keeps from one step to the next: of each sequence, and of the batch as long as the same sequences share it.

Shapes: R rows that are drawn.
"""

from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray

from lori.device import to_device
from server.engine.request import Sequence
from server.engine.sampling.cutoff import Cutoff
from server.engine.sampling.grammar_state import GrammarState
from server.engine.sampling.logit_edits import LogitEdits
from server.engine.sampling.random_stream import RandomStream

TEMPERATURES = (1e-30, 1e30)
"""Beyond these nothing changes but that fp32 overflows."""


class SamplingState:
    """What is kept of one sequence from step to step. It does not hold the sequence, with which it ends."""

    def __init__(self, sequence: Sequence, stop_ids: NDArray[np.int64], grammar: GrammarState | None = None) -> None:
        sampling = sequence.request.sampling
        self.stream = RandomStream(sampling.seed, sequence.choice)
        self.cutoff = Cutoff.of(sampling)
        self.temperature = sampling.temperature if sampling.top_k != 1 else 0.0  # Of one token there is nothing to draw.
        self.edits = LogitEdits(sequence, stop_ids)
        self.grammar = grammar


class SamplingBatch:
    """What depends on nothing but which sequences share a step: mostly the same ones as the step before.

    The rows that are drawn stand in order: those without a cutoff first.
    """

    def __init__(self, sequences: Items[Sequence], states: Items[SamplingState], device: torch.device) -> None:
        self.sequences, self.states = list(sequences), list(states)
        self.grammars = {row: state.grammar for row, state in enumerate(states) if state.grammar}
        self.edited = {row: state.edits for row, state in enumerate(states) if state.edits.can_change}
        drawn = [row for row, state in enumerate(states) if state.temperature]
        self.drawn = sorted(drawn, key=lambda row: not states[row].cutoff.is_none)
        self.cutoffs = [c for row in self.drawn if not (c := states[row].cutoff).is_none]
        self.rows = to_device(torch.tensor(self.drawn, dtype=torch.int64), device)  # (R,)
        self.is_all = self.drawn == list(range(len(states)))
        low, high = TEMPERATURES
        coldness = [1 / min(max(states[row].temperature, low), high) for row in self.drawn]
        self.coldness = to_device(torch.tensor(coldness, dtype=torch.float32), device)[:, None]  # (R, 1)

    def levels(self, device: torch.device) -> torch.Tensor:
        """Returns the random numbers (R,) fp64 that decide the next tokens."""
        numbers = [self.states[row].stream.at(len(self.sequences[row].output_ids)) for row in self.drawn]
        return to_device(torch.tensor(numbers, dtype=torch.float64), device)
