"""Log-probabilities as the model gives them: before bias, penalties, temperature and cutoffs.

Shapes: P rows, V vocabulary, N alternatives.
"""

from collections.abc import Sequence as Items

import torch

from server.engine.replies import Score


def are_sound(logits: torch.Tensor) -> torch.Tensor:
    """Returns (P,) bool: whether a row of `logits` (P, V) holds neither NaN nor plus infinity, and a token that is possible."""
    return logits.amax(-1).isfinite()


def score(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """Returns (P, 1 + 2 N) fp64 for `logits` (P, V) and `tokens` (P,) int64, and does not wait for their device.

    A row is its token's log-probability, those of the `num_top` likeliest tokens, and these tokens.
    """
    scores = logits.log_softmax(-1)
    own = scores.gather(1, tokens[:, None])
    if not num_top:
        return own.double()
    values, ids = scores.topk(num_top, dim=-1)
    return torch.cat([own.double(), values.double(), ids.double()], 1)


def to_scores(rows: Items[Items[float]]) -> list[Score]:
    """Returns what the rows of `score` say, once they are plain numbers."""
    half = len(rows[0]) // 2 if rows else 0
    return [(row[0], dict(zip(map(int, row[1 + half :]), row[1 : 1 + half], strict=True))) for row in rows]
