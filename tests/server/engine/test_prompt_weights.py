"""The prompt weigher, with a fake probe: priorities, turns of tenants, lengths of passes, and errors."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, cast

import numpy as np
import pytest

from lori.auto_weights import Shares, WeightQuery
from lori.gaussians import Array, Gaussians, joined
from lori.prompt_statistics import NUM_FEATURES, Background, ProbedPrompt, PromptStatistics
from server.engine.model.prompt_probe import MAX_PROMPTS, MAX_TOKENS, PromptProbe
from server.engine.prompt_weights import GAUSSIANS_PER_TOKEN, MAX_BUSY_TOKENS, OVERFLOW, ProbeError, PromptWeigher
from tests.lori.features import spherical

LENGTH = 100
GUILTY, OVERFLOWING, BREAKING = 1, 2, 3
"""First tokens of prompts that fail."""


def gaussian(mean: float) -> Gaussians:
    return spherical(np.full(NUM_FEATURES, mean), 0.1)


BACKGROUND = Background("b" * 64, np.zeros(NUM_FEATURES, np.float32), np.eye(NUM_FEATURES, dtype=np.float32), gaussian(5.0))
STATISTICS = PromptStatistics("a" * 64, BACKGROUND.digest, gaussian(2.0))


class FakeProbe:
    """A probe whose features are all 2. It notes its passes, and fails as the prompts' first tokens say."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def features(self, prompts: Sequence[ProbedPrompt]) -> list[Array]:
        firsts = [prompt.ids[0] for prompt in prompts]
        self.passes.append(firsts)
        for token, error in ((GUILTY, RuntimeError("out of luck")), (BREAKING, SystemError("gone"))):
            if token in firsts:
                raise error
        return [np.full(NUM_FEATURES, np.nan if first == OVERFLOWING else 2.0) for first in firsts]


class Rig:
    """A weigher that a test steps, a clock that it sets, and the outcomes by first token."""

    def __init__(self, max_priority_wait_s: float = inf) -> None:
        self.probe, self.outcomes, self.now = FakeProbe(), dict[int, Any](), 1000.0
        self.weigher = PromptWeigher(
            cast(PromptProbe, self.probe), lambda error: isinstance(error, SystemError), max_priority_wait_s, lambda: self.now
        )

    def submit(
        self,
        first: int,
        tenant: str = "",
        length: int = LENGTH,
        is_wanted: Callable[[], bool] = lambda: True,
        priority: int = 0,
        num_gaussians: int = 1,
    ) -> None:
        statistics = replace(STATISTICS, gaussians=joined([STATISTICS.gaussians] * num_gaussians))
        auto = WeightQuery(ProbedPrompt((first,) * length, 0, length), BACKGROUND, (statistics,))
        self.weigher.submit(auto, priority, tenant, is_wanted, lambda outcome: self.outcomes.update({first: outcome}))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_prompt_gets_its_shares(rig: Rig) -> None:
    assert not rig.weigher.has_work
    rig.submit(10)
    assert rig.weigher.has_work
    rig.weigher.step(is_busy=False)
    assert not rig.weigher.has_work
    assert rig.outcomes == {10: Shares((1.0,), 0.0)}


def test_tenants_take_turns(rig: Rig) -> None:
    for first in range(10, 40):
        rig.submit(first, "many", MAX_TOKENS // 4)
    rig.submit(50, "few", MAX_TOKENS // 4)
    rig.submit(51, "few", MAX_TOKENS // 4)
    rig.weigher.step(is_busy=False)
    rig.submit(60, "new", MAX_TOKENS // 4)
    rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[10, 50, 11, 51], [12, 60, 13, 14]]


def test_a_higher_priority_comes_first_and_tenants_take_turns_within_one(rig: Rig) -> None:
    length = MAX_TOKENS // 4
    for first in range(10, 20):
        rig.submit(first, "many", length, priority=1)
    rig.submit(30, "few", length, priority=1)
    for first in (40, 41):
        rig.submit(first, "many", length, priority=-5)
    rig.submit(50, "few", length, priority=-5)
    rig.weigher.step(is_busy=False)
    rig.submit(60, "many", length)
    rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[40, 50, 41, 10], [60, 30, 11, 12]]


def test_a_prompt_waits_a_limited_time_behind_higher_priorities() -> None:
    rig, length = Rig(max_priority_wait_s=60), MAX_TOKENS // 2
    for first in (10, 11, 12):
        rig.submit(first, "low", length, priority=5)
    rig.now += 59
    rig.submit(13, "low", length, priority=5)
    for first in range(20, 30):
        rig.submit(first, "high", length)
    rig.weigher.step(is_busy=False)
    rig.now += 1
    for _ in range(4):
        rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[20, 21], [22, 10], [23, 11], [24, 12], [25, 26]]
    while rig.weigher.has_work:
        rig.weigher.step(is_busy=False)
    assert rig.probe.passes[-2:] == [[27, 28], [29, 13]]


def test_many_raised_prompts_take_turns_with_their_own_tenant_s_others() -> None:
    """Regression: on a server without keys, prompts of the highest priority waited behind all that had been raised before."""
    rig, length = Rig(max_priority_wait_s=60), MAX_TOKENS // 2
    for first in range(10, 20):
        rig.submit(first, length=length, priority=5)
    rig.now += 60
    rig.submit(20, length=length)
    rig.weigher.step(is_busy=False)
    for first in (21, 22, 23):
        rig.submit(first, length=length)
    for _ in range(3):
        rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[20, 10], [11, 21], [12, 22], [13, 23]]


def test_a_raised_prompt_stays_raised_when_a_higher_priority_comes() -> None:
    rig, length = Rig(max_priority_wait_s=60), MAX_TOKENS // 2
    for first in (10, 11, 12):
        rig.submit(first, "low", length, priority=5)
    rig.now += 60
    rig.submit(13, "low", length)
    rig.weigher.step(is_busy=False)
    for first in range(20, 30):
        rig.submit(first, "high", length, priority=-5)
    for _ in range(2):
        rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[13, 10], [20, 11], [21, 12]]


def test_prompts_that_nobody_wants_are_dropped_behind_higher_priorities_too(rig: Rig) -> None:
    """Regression: they were kept as long as there were prompts of a higher priority."""
    wanted: dict[int, bool] = {}
    for first in range(10, 10_010):
        wanted[first] = True
        rig.submit(first, is_wanted=partial(wanted.get, first, False), priority=1)
        wanted[first - 10] = False
    for first in (5, 6):
        rig.submit(first, length=MAX_TOKENS)
    rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[5]]
    assert len([one for one in gc.get_objects() if isinstance(one, WeightQuery)]) < 200
    for _ in range(2):
        rig.weigher.step(is_busy=False)
    assert rig.probe.passes[1:] == [[6], [*range(10_000, 10_010)]]
    assert not rig.weigher.has_work


@pytest.mark.parametrize(("is_busy", "num_tokens"), [(False, MAX_TOKENS), (True, MAX_BUSY_TOKENS)])
def test_a_pass_is_short_while_sequences_run(rig: Rig, is_busy: bool, num_tokens: int) -> None:
    for first in range(10, 40):
        rig.submit(first)
    rig.weigher.step(is_busy)
    assert rig.probe.passes == [[*range(10, 10 + num_tokens // LENGTH)]]


def test_comparisons_count_in_a_pass_while_sequences_run(rig: Rig) -> None:
    """Regression: 64 adapters of 64 forms could make a pass of short prompts take more than a second."""
    for first in range(10, 30):
        rig.submit(first, num_gaussians=GAUSSIANS_PER_TOKEN * LENGTH)
    rig.weigher.step(is_busy=True)
    assert len(rig.probe.passes[0]) == MAX_BUSY_TOKENS // (2 * LENGTH)


def test_a_long_prompt_is_weighed_while_sequences_run(rig: Rig) -> None:
    rig.submit(10, length=MAX_TOKENS)
    rig.submit(11)
    rig.weigher.step(is_busy=True)
    assert rig.probe.passes == [[10]]


def test_a_pass_has_a_greatest_number_of_prompts(rig: Rig) -> None:
    for first in range(10, 210):
        rig.submit(first, length=1)
    rig.weigher.step(is_busy=False)
    assert list(map(len, rig.probe.passes)) == [MAX_PROMPTS]


def test_prompts_that_nobody_wants_are_dropped(rig: Rig) -> None:
    rig.submit(10, is_wanted=lambda: False)
    rig.submit(11, length=MAX_TOKENS)
    rig.submit(12, "other", length=MAX_TOKENS, is_wanted=lambda: False)
    rig.weigher.step(is_busy=False)
    assert not rig.weigher.has_work
    assert rig.probe.passes == [[11]]
    assert rig.outcomes.keys() == {11}


def test_if_nobody_waits_nothing_is_computed(rig: Rig) -> None:
    rig.submit(10, is_wanted=lambda: False)
    rig.weigher.step(is_busy=False)
    assert not rig.weigher.has_work
    assert not rig.probe.passes


def test_only_the_prompt_that_raises_fails(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for first in (10, GUILTY, 11):
        rig.submit(first)
    rig.weigher.step(is_busy=False)
    assert rig.probe.passes == [[10, GUILTY, 11], [10], [GUILTY], [11]]
    assert [type(rig.outcomes[first]) for first in (10, GUILTY, 11)] == [Shares, ProbeError, Shares]
    assert str(rig.outcomes[GUILTY]) == "the prompt's features could not be computed: RuntimeError('out of luck')"
    assert "the probe of 3 prompts failed" in caplog.text


def test_only_the_prompt_that_overflows_fails(rig: Rig) -> None:
    for first in (10, OVERFLOWING):
        rig.submit(first)
    rig.weigher.step(is_busy=False)
    assert len(rig.probe.passes) == 1
    assert isinstance(rig.outcomes[10], Shares)
    assert str(rig.outcomes[OVERFLOWING]) == OVERFLOW


def test_after_an_error_that_breaks_the_device_nothing_is_tried_again(rig: Rig) -> None:
    for first in (10, BREAKING):
        rig.submit(first)
    with pytest.raises(SystemError, match="gone"):
        rig.weigher.step(is_busy=False)
    assert len(rig.probe.passes) == 1
