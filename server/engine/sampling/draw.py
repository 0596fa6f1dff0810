"""Draws a token from probabilities by inverse CDF, over the whole vocabulary in order of the ids.

Shapes: R rows, V vocabulary, B blocks of the vocabulary, W width of a block.
"""

import torch
from torch.nn.functional import pad

WIDTH = 128
"""The CDF is one of blocks, then one inside a block: in fp64 over the whole vocabulary it takes ten times as long."""


def draw(probabilities: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Returns the tokens (R,) that `levels` (R,) fp64, in [0, 1), draw from `probabilities` (R, V), which need not sum to one.

    A token without probability is never drawn. What a row that holds no numbers gives is any token.
    """
    num_tokens = probabilities.shape[1]
    missing = -num_tokens % WIDTH
    blocks = (pad(probabilities, (0, missing)) if missing else probabilities).unflatten(1, (-1, WIDTH))  # (R, B, W)
    mass = blocks.sum(-1).double()  # (R, B)
    until = mass.cumsum(-1)
    target = levels[:, None] * until[:, -1:]
    block = _first_above(until, target)  # (R, 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, WIDTH))[:, 0].double().cumsum(-1)  # (R, W)
    place = _first_above(inside, target - (until - mass).gather(1, block))
    return (block * WIDTH + place)[:, 0].clamp_(max=num_tokens - 1)


def _first_above(rising: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # Where each row of (R, N) first exceeds its target (R, 1): there it rises, whatever rounding did to the target.
    last = rising[:, -1:]
    target = target.clamp(min=0).minimum(last.nextafter(torch.zeros_like(last)))
    return torch.searchsorted(rising, target, right=True).clamp_(max=rising.shape[1] - 1)
