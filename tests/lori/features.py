"""Random features of prompts, and statistics of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lori.gaussians import NUM_AXES, Array, Gaussians, as_float32, fit_gaussian, joined
from lori.prompt_statistics import NUM_FEATURES, Background, PromptStatistics, fit_background

NUM_PROMPTS = 120
SEEDS = (11, 12, 13)
"""Seeds of the features of `make_adapters`, whose centre is 3."""


def draw(seed: int, centre: float = 0.0, count: int = NUM_PROMPTS) -> Array:
    """Return features (P, F) around `centre` in a random direction, with more spread in a few directions."""
    random = np.random.default_rng(seed)
    spread = random.standard_normal((5, NUM_FEATURES))
    direction = random.standard_normal(NUM_FEATURES)
    noise = random.standard_normal((count, NUM_FEATURES)) + random.standard_normal((count, 5)) @ spread
    return centre * direction + noise


def spherical(mean: Array, variance: float = 1.0) -> Gaussians:
    """Return a Gaussian around `mean` (F,) with one variance in all directions."""
    axes, scales = np.zeros((1, NUM_AXES, NUM_FEATURES), np.int8), np.zeros((1, NUM_AXES), np.float32)
    return Gaussians(as_float32(mean[None]), axes, scales, np.full(1, variance, np.float32))


def make_background() -> Background:
    """Return a background of two groups."""
    return fit_background("b" * 64, [draw(1), draw(2)])


def make_adapters(background: Background, seeds: Sequence[int] = SEEDS) -> list[PromptStatistics]:
    """Return the statistics of adapters whose prompts are drawn with `seeds` around the centre 3."""
    centres = [draw(seed, 3.0) for seed in seeds]
    return [PromptStatistics("a" * 64, background.digest, fit_gaussian(background.whiten(z))) for z in centres]


def copies(
    originals: Sequence[PromptStatistics], count: int, spread: float, random: np.random.Generator
) -> list[PromptStatistics]:
    """Return `count` copies of the statistics, in turn, with random means around theirs, of the standard deviation `spread`.

    Each has its own arrays, as adapters that were read from files do.
    """
    made = []
    for index in range(count):
        one = originals[index % len(originals)]
        means = one.gaussians.means + spread * random.standard_normal(one.gaussians.means.shape)
        made.append(replace(one, gaussians=replace(joined([one.gaussians]), means=as_float32(means))))
    return made


def draw_prompt(gaussians: Gaussians, background: Background, seed: int) -> Array:
    """Return features (F,) of a prompt, drawn from the first of the Gaussians."""
    z: Array = np.linalg.solve(background.whitening.T.astype(np.float64), gaussians.draw(1, seed)[0, 0]) + background.mean
    return z
