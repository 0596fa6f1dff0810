"""The tensors of one turn: the model's logits for a step's chunks, the tokens picked from them, and the scores asked for.

Shapes: P positions whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import torch

from server.engine.model.runner import Runner
from server.engine.replies import Score
from server.engine.sampling.sampler import Sampler, log_probabilities, sound_rows
from server.engine.scheduling.kv_cache import must_score
from server.engine.scheduling.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step made of a chunk: the next token where it is the last, and the scores that were asked for."""

    chunk: Chunk
    token: int | None
    is_sound: bool
    """False where the model's numbers overflow: then nothing else here means anything."""
    prompt_scores: Items[Score]
    score: Score | None


class Turn:
    """Computes steps. It changes no sequence, so a step that fails may be tried again, in parts."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self.runner, self._sampler = runner, sampler

    def compute(self, chunks: Items[Chunk]) -> list[Outcome]:
        """Returns the outcome of every chunk."""
        spans = [_wanted(chunk) for chunk in chunks]
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        positions = [start + row for start, span in zip(starts, spans, strict=False) for row in span]
        logits = self.runner.forward(chunks, positions)
        parts = dict(zip(chunks, logits.split([len(span) for span in spans]), strict=True))
        scored = {chunk: _score_prompt(chunk, part) for chunk, part in parts.items() if must_score(chunk.sequence)}
        last = [chunk for chunk in chunks if chunk.is_last]
        # Most steps want one row of each chunk: then the logits are the rows to sample from.
        rows = logits if len(last) == len(positions) else torch.stack([parts[c][-1] for c in last]) if last else logits[:0]
        sampled = self._sampler.sample(rows, [chunk.sequence for chunk in last])
        scores = _score_outputs(rows, last, sampled.tokens)
        of = {c: (t, s) for c, t, s in zip(last, sampled.tokens, sampled.is_sound, strict=True)}
        outcomes = []
        for chunk in chunks:
            token, is_sound = of.get(chunk, (None, True))
            prompt_scores = scored.get(chunk, ())
            outcomes.append(Outcome(chunk, token, is_sound and prompt_scores is not None, prompt_scores or (), scores.get(chunk)))
        return outcomes


def _wanted(chunk: Chunk) -> range:
    # Rows of the chunk whose logits are needed: those that predict a prompt token to be scored, and the one to sample from.
    last = chunk.stop - chunk.start - 1
    if not must_score(chunk.sequence):
        return range(last, last + 1) if chunk.is_last else range(0)
    num_scored = min(chunk.stop, len(chunk.sequence.request.prompt_ids) - 1) - chunk.start
    return range(last + 1 if chunk.is_last else num_scored)


def _score_prompt(chunk: Chunk, logits: torch.Tensor) -> Items[Score] | None:
    # None where the logits are not sound.
    request = chunk.sequence.request
    targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
    assert request.num_logprobs is not None
    if not all(sound_rows(logits[: len(targets)])):
        return None
    return log_probabilities(logits[: len(targets)], targets, request.num_logprobs) if targets else ()


def _score_outputs(logits: torch.Tensor, chunks: Items[Chunk], tokens: Items[int]) -> dict[Chunk, Score]:
    asked = [i for i, chunk in enumerate(chunks) if chunk.sequence.request.num_logprobs is not None]
    if not asked:
        return {}
    most = max(chunks[i].sequence.request.num_logprobs or 0 for i in asked)
    scores = log_probabilities(logits[asked], [tokens[i] for i in asked], most)
    return {chunks[i]: score for i, score in zip(asked, scores, strict=True)}
