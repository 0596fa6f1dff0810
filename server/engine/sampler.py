"""Picks the next tokens of a step, over the whole batch. Every request has a random stream of its own.

Shapes: P rows, V vocabulary.
"""

from collections.abc import Sequence as Items

import numpy as np
import torch

from server.engine.request import Sequence


def uniform(seed: int, position: int) -> float:
    """Returns the number in [0, 1) that decides token `position` of a request: the same whoever shares its batch."""
    word = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (word >> 11) * 2.0**-53


def sample(logits: torch.Tensor, sequences: Items[Sequence]) -> list[int]:
    """Returns the next token of each sequence from its row of `logits` (P, V): greedy at temperature 0, else by inverse CDF."""
    tokens = logits.argmax(-1)
    drawn = [i for i, s in enumerate(sequences) if s.request.temperature > 0]
    if drawn:
        chosen = [sequences[i] for i in drawn]
        heat = torch.tensor([s.request.temperature for s in chosen], dtype=torch.float64, device=logits.device)
        level = torch.tensor(
            [uniform(s.request.seed, len(s.output_ids)) for s in chosen], dtype=torch.float64, device=logits.device
        )
        # Below zero before it is divided: a tiny temperature gives minus infinity, and never infinity less infinity.
        scores = logits[drawn].double()
        mass = ((scores - scores.amax(-1, keepdim=True)) / heat[:, None]).softmax(-1).cumsum(-1)  # (P, V)
        picked = torch.searchsorted(mass, (level * mass[:, -1])[:, None], right=True)[:, 0]
        tokens[drawn] = picked.clamp(max=logits.shape[1] - 1)
    ids: list[int] = tokens.tolist()
    return ids


def log_probabilities(logits: torch.Tensor, tokens: Items[int], num_top: int) -> list[tuple[float, dict[int, float]]]:
    """Returns, for each row of `logits` (P, V), the log-probability of its token and the `num_top` likeliest alternatives."""
    scores = logits.log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if not num_top:
        return [(value, {}) for value in own]
    values, ids = (x.tolist() for x in scores.topk(num_top, dim=-1))
    return [(o, dict(zip(i, v, strict=True))) for o, i, v in zip(own, ids, values, strict=True)]
