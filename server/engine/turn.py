"""The tensors of one turn: the model's logits for a step's chunks, the tokens picked from them, and the scores asked for.

Shapes: P positions whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from lori.device import to_device
from server.engine.model.runner import Runner
from server.engine.replies import Score
from server.engine.sampling.read_back import read_back
from server.engine.sampling.sampler import Sampler
from server.engine.sampling.scores import are_sound, score, to_scores
from server.engine.scheduling.kv_cache import must_score
from server.engine.scheduling.scheduler import Chunk

NOTHING_LEFT = "what the request forbids leaves no token"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step made of a chunk: the next token where it is the last, and the scores that were asked for."""

    chunk: Chunk
    token: int | None
    is_sound: bool
    """False where the model's numbers overflow, or what the request asks for leaves no token: then only `fault` has a meaning."""
    prompt_scores: Items[Score]
    score: Score | None
    fault: str = ""
    """Why the request leaves no token, where that is it."""


class Turn:
    """Computes steps. It changes no sequence, so a step that fails may be tried again, in parts."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self.runner, self._sampler = runner, sampler

    def compute(self, chunks: Items[Chunk]) -> list[Outcome]:
        """Returns the outcome of every chunk. It waits for the device once, at the end."""
        spans = [_wanted(chunk) for chunk in chunks]
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        positions = [start + row for start, span in zip(starts, spans, strict=False) for row in span]
        logits = self.runner.forward(chunks, positions)
        parts = dict(zip(chunks, logits.split([len(span) for span in spans]), strict=True))
        last = [chunk for chunk in chunks if chunk.is_last]
        # Most steps want one row of each chunk: then the logits are the rows to sample from.
        rows = logits if len(last) == len(positions) else torch.stack([parts[c][-1] for c in last]) if last else logits[:0]
        picked = self._sampler.pick(rows, [chunk.sequence for chunk in last])
        asked = [row for row, chunk in enumerate(last) if chunk.sequence.request.num_logprobs is not None]
        scored = [chunk for chunk in chunks if must_score(chunk.sequence)]
        of_prompts = [_score_prompt(chunk, parts[chunk]) for chunk in scored]
        picks, of_outputs, *of_scored = read_back([picked, _score_outputs(rows, picked[0], last, asked), *of_prompts])
        tokens = {c: (int(token), int(is_sound)) for c, token, is_sound in zip(last, *picks, strict=True)}
        faults = {c: self._sampler.fault(c.sequence) or NOTHING_LEFT for c, (_, is_sound) in tokens.items() if is_sound < 0}
        scores = dict(zip((last[row] for row in asked), to_scores(of_outputs), strict=True))
        prompts = dict(zip(scored, of_scored, strict=True))
        outcomes = [_outcome(c, tokens.get(c, (None, 1)), prompts.get(c, ()), scores.get(c)) for c in chunks]
        return [replace(o, fault=faults[o.chunk]) if o.chunk in faults else o for o in outcomes]


def _outcome(chunk: Chunk, picked: tuple[int | None, int], of_prompt: Items[Items[float]], score: Score | None) -> Outcome:
    # Rows of the prompt begin with whether they are sound.
    token, sound = picked
    is_sound = sound > 0 and all(row[0] for row in of_prompt)
    return Outcome(chunk, token, is_sound, to_scores([row[1:] for row in of_prompt]) if is_sound else (), score)


def _wanted(chunk: Chunk) -> range:
    # Rows of the chunk whose logits are needed: those that predict a prompt token to be scored, and the one to sample from.
    last = chunk.stop - chunk.start - 1
    if not must_score(chunk.sequence):
        return range(last, last + 1) if chunk.is_last else range(0)
    num_scored = min(chunk.stop, len(chunk.sequence.request.prompt_ids) - 1) - chunk.start
    return range(last + 1 if chunk.is_last else num_scored)


def _score_prompt(chunk: Chunk, logits: torch.Tensor) -> torch.Tensor:
    # For each prompt token that the chunk's logits predict: whether they are sound, and its `score`.
    request = chunk.sequence.request
    targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
    assert request.num_logprobs is not None
    rows = logits[: len(targets)]
    tokens = to_device(torch.tensor(targets, dtype=torch.int64), logits.device)
    return torch.cat([are_sound(rows)[:, None].double(), score(rows, tokens, request.num_logprobs)], 1)


def _score_outputs(logits: torch.Tensor, tokens: torch.Tensor, chunks: Items[Chunk], asked: Items[int]) -> torch.Tensor:
    # Of the rows that are asked for.
    if not asked:
        return logits[:0]
    most = max(chunks[row].sequence.request.num_logprobs or 0 for row in asked)
    if len(asked) == len(chunks):
        return score(logits, tokens, most)
    rows = to_device(torch.tensor(asked, dtype=torch.int64), logits.device)
    return score(logits[rows], tokens[rows], most)
