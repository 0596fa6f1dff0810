"""The prompt weigher: a queue of prompts, and what they say about adapters, computed on the engine's thread."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lori.auto_weights import PromptQuery
from lori.gaussians import Array
from server.engine.model.prompt_probe import MAX_PROMPTS, MAX_TOKENS, PromptProbe

logger = logging.getLogger(__name__)
IsWanted = Callable[[], bool]
OnOutcome = Callable[[Any], None]
"""Function of a query's result, or of its error."""
MAX_BUSY_TOKENS = 512
"""Tokens of one pass while sequences run, which wait for it."""
GAUSSIANS_PER_TOKEN = 4
"""Comparisons with Gaussians that count as one token of a pass. They take about as long for a model of 135M parameters (24 us a
comparison and 110 us a token, one thread of an AMD EPYC (Zen 4)), and less for larger ones."""
MIN_UNTIL_DROP = 64
"""Prompts, at least, that are queued before those that nobody wants are dropped again."""
OVERFLOW = "the base model's numbers overflow on this prompt"


class ProbeError(Exception):
    """The features of one prompt could not be computed."""


@dataclass(frozen=True, slots=True)
class _Queued:
    query: PromptQuery[Any]
    is_wanted: IsWanted
    on_outcome: OnOutcome
    queued_at: float
    """Monotonic seconds."""


_Flow = tuple[str, bool]
"""The tenant of prompts, and whether they were raised to a higher priority."""


class PromptWeigher:
    """The queue of prompts to weigh: those of the highest priority (the lowest number) first.

    Within a priority tenants take turns, and a tenant's prompts come in the order of their arrival. A prompt that has waited for
    `max_priority_wait_s` is raised to the highest priority present. A tenant's raised prompts have turns of their own, so that
    many of them do not hold up the tenant's others. Only the engine's thread may use the queue. `is_broken` says of an error that
    nothing more can be computed after it.
    """

    def __init__(
        self,
        probe: PromptProbe,
        is_broken: Callable[[Exception], bool],
        max_priority_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe, self._is_broken = probe, is_broken
        self._max_priority_wait_s, self._clock = max_priority_wait_s, clock
        self._queues: dict[int, dict[_Flow, deque[_Queued]]] = {}
        """Queued prompts by priority, then by flow, without empty entries. The first flow of a priority is next."""
        self._num_until_drop = MIN_UNTIL_DROP

    def submit(self, query: PromptQuery[Any], priority: int, tenant: str, is_wanted: IsWanted, on_outcome: OnOutcome) -> None:
        """Queue a prompt. One of the next steps calls `on_outcome` with its query's result or error, if `is_wanted()` then."""
        if not self._num_until_drop:
            self._drop_unwanted()
        self._num_until_drop -= 1
        self._add(_Queued(query, is_wanted, on_outcome, self._clock()), priority, (tenant, False))

    @property
    def has_work(self) -> bool:
        """Whether a prompt is queued."""
        return bool(self._queues)

    def step(self, is_busy: bool) -> None:
        """Weigh the prompts of one pass; it is short if `is_busy`. Raises an error after which nothing can be computed."""
        batch = self._take(MAX_BUSY_TOKENS if is_busy else MAX_TOKENS)
        for queued, outcome in zip(batch, self._outcomes(batch), strict=True):
            queued.on_outcome(outcome)

    def _take(self, max_tokens: int) -> list[_Queued]:
        # At least one prompt, so that a long one is not kept waiting by `max_tokens`.
        self._raise_overdue()
        batch: list[_Queued] = []
        while self._queues and len(batch) < MAX_PROMPTS:
            priority = min(self._queues)
            flow, queue = next(iter(self._queues[priority].items()))
            if queue[0].is_wanted():
                query = queue[0].query
                max_tokens -= len(query.prompt.ids) + query.num_gaussians // GAUSSIANS_PER_TOKEN
                if batch and max_tokens < 0:
                    break
                batch.append(queue[0])
            queue.popleft()
            self._remove(priority, flow)
            if queue:
                self._queues.setdefault(priority, {})[flow] = queue  # at the end
        return batch

    def _raise_overdue(self) -> None:
        last_overdue = self._clock() - self._max_priority_wait_s
        top = min(self._queues, default=0)
        for priority in sorted(self._queues)[1:]:
            for flow, queue in [*self._queues[priority].items()]:
                while queue and queue[0].queued_at <= last_overdue:
                    self._add(queue.popleft(), top, (flow[0], True))
                if not queue:
                    self._remove(priority, flow)

    def _drop_unwanted(self) -> None:
        # Prompts of clients that left, for which no turn comes while there are higher priorities.
        num_left = 0
        for priority, flows in [*self._queues.items()]:
            for flow, queue in [*flows.items()]:
                flows[flow] = deque(queued for queued in queue if queued.is_wanted())
                num_left += len(flows[flow])
                if not flows[flow]:
                    self._remove(priority, flow)
        self._num_until_drop = max(MIN_UNTIL_DROP, num_left)

    def _add(self, queued: _Queued, priority: int, flow: _Flow) -> None:
        self._queues.setdefault(priority, {}).setdefault(flow, deque()).append(queued)

    def _remove(self, priority: int, flow: _Flow) -> None:
        del self._queues[priority][flow]
        if not self._queues[priority]:
            del self._queues[priority]

    def _outcomes(self, batch: Sequence[_Queued]) -> list[Any]:
        # An error in a pass may come from one prompt. Each is tried alone, so that only its request fails.
        if not batch:
            return []
        try:
            features = self._probe.features([queued.query.prompt for queued in batch])
            return [self._outcome(queued.query, z) for queued, z in zip(batch, features, strict=True)]
        except Exception as error:
            if self._is_broken(error):
                raise
            logger.exception("the probe of %d prompts failed", len(batch))
            if len(batch) == 1:
                return [ProbeError(f"the prompt's features could not be computed: {error!r}")]
            return [outcome for queued in batch for outcome in self._outcomes([queued])]

    def _outcome(self, query: PromptQuery[Any], z: Array) -> Any:
        return query.evaluate(z) if np.isfinite(z).all() else ProbeError(OVERFLOW)
