"""The score of a merge's weights on rows: how much it keeps of what single adapters gain there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.template import Template, common_templates
from training.data import DataError, Row
from training.evaluation.local_adapters import AdapterSelection, apply_adapter
from training.evaluation.local_answerer import row_log_likelihoods
from training.weight_trials import Weights, repeat_in_blocks, split_blocks, unit_weights

MIN_GAIN = 0.005
"""Gain of the best single adapter, in nats a token, below which the shares of a source's gain would be noise."""


@dataclass(slots=True)
class MergeScorer:
    """Scores of the weights of `adapters` on the rows of each source. Caches every loss. Not thread-safe.

    Weights are those of the first adapter, one for each of `num_blocks` blocks of layers, then those of the next. A gain is the
    base's loss minus that with the adapters, in nats a token.
    """

    base: BaseModel
    adapters: Sequence[Adapter]
    rows: Mapping[str, Sequence[Row]]
    """By source."""
    num_blocks: int = 1
    _templates: Sequence[Template] = field(init=False)
    _losses: dict[Weights, Mapping[str, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._templates = common_templates([(adapter.name, adapter.config.lori.templates) for adapter in self.adapters])

    def losses(self, weights: Weights) -> Mapping[str, float]:
        """Return the mean negative log-likelihood of the answers' tokens, in nats, for each source.

        Raises `DataError` for an answer without tokens, or with a likelihood that is not finite.
        """
        if weights not in self._losses:
            merged = self._selection(weights).merged() if any(weights) else None
            with apply_adapter(self.base.model, merged):
                self._losses[weights] = {source: self._loss(rows) for source, rows in self.rows.items()}
        return self._losses[weights]

    def _selection(self, weights: Weights) -> AdapterSelection:
        if self.num_blocks == 1:
            return AdapterSelection(self.adapters, weights)
        ones = (1.0,) * len(self.adapters)
        return AdapterSelection(self.adapters, ones, block_weights=split_blocks(weights, self.num_blocks))

    def _loss(self, rows: Sequence[Row]) -> float:
        likelihoods = row_log_likelihoods(self.base, rows, self._templates, shows_progress=False)
        for row, likelihood in zip(rows, likelihoods, strict=True):
            if not likelihood.num_tokens or not math.isfinite(likelihood.total):
                numbers = f"{likelihood.num_tokens} tokens, with a likelihood of {likelihood.total}"
                raise DataError(f"{row.origin}: the answer has {numbers}: it cannot be measured")
        return -sum(one.total for one in likelihoods) / sum(one.num_tokens for one in likelihoods)

    def shares(self, weights: Weights) -> Mapping[str, float]:
        """Return, for each source, the merge's gain divided by the best single adapter's at weight 1.

        The first call also measures the base and each adapter alone. Raises `DataError` if no adapter alone gains on a source.
        """
        base, merged = self._base_losses(), self.losses(weights)
        return {source: (base[source] - merged[source]) / gain for source, gain in self.gains().items()}

    def gains(self) -> Mapping[str, float]:
        """Return the gain of the best single adapter at weight 1 on each source. Raises as `shares`."""
        base = self._base_losses()
        alone = [self.losses(repeat_in_blocks(unit, self.num_blocks)) for unit in unit_weights(len(self.adapters))]
        gains = {source: base[source] - min(losses[source] for losses in alone) for source in self.rows}
        for source, gain in gains.items():
            if gain < MIN_GAIN:
                difference = f"the best gains {gain:.3f} nats a token, expected {MIN_GAIN} at least"
                raise DataError(f"{source}: no adapter alone raises the likelihood of its answers: {difference}")
        return gains

    def _base_losses(self) -> Mapping[str, float]:
        return self.losses((0.0,) * len(self.adapters) * self.num_blocks)

    def score(self, weights: Weights) -> float:
        """Return the mean of the shares."""
        return fmean(self.shares(weights).values())
