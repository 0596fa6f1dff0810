"""Invariance of answers in bf16 on a CPU: bit for bit the same, whatever is computed beside or before, in any chunks."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from server.engine.generate_request import GenerateRequest
from server.engine.request import SamplingParams
from tests.server.rig import Rig, build

pytestmark = [pytest.mark.needs("kernels"), pytest.mark.slow]

NUM_REQUESTS = 48
CHOICES: Sequence[tuple[str, ...]] = ((), ("math",), ("safety",), ("math", "safety"), ("intent", "math", "safety"))
TEXT = "The quick brown fox jumps over the lazy dog, and sums of two numbers or more are asked for again. "

Answer = tuple[list[int], list[float | None], list[dict[str, float]]]


def requests() -> list[GenerateRequest]:
    """Return greedy and seeded requests of many lengths for the base, adapters and merges."""
    rng = random.Random(7)
    asks = []
    for number in range(NUM_REQUESTS):
        adapters = rng.choice(CHOICES)
        sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=number, num_logprobs=3, ignore_eos=True)
        asks.append(
            GenerateRequest(
                prompt=TEXT[rng.randrange(20) :][: rng.choice([1, 5, 17, 50, 80])],
                adapters=adapters,
                weights=tuple(rng.choice([0.5, 1.0, -0.25]) for _ in adapters) or None,
                max_tokens=rng.randint(1, 40),
                sampling=sampling,
            )
        )
    return asks


def answers(rig: Rig, asks: Sequence[GenerateRequest], at_once: int = NUM_REQUESTS) -> list[Answer]:
    """Run requests some at a time; return their tokens and log-probabilities."""
    heard = [one for first in range(0, len(asks), at_once) for one in rig.run(asks[first : first + at_once])]
    return [(one.tokens, [token.value for token in one.logprobs], [token.top for token in one.logprobs]) for one in heard]


@pytest.fixture(scope="module")
def alone(writer_model: Path, adapters: Path) -> list[Answer]:
    """Return the answers of a server that computes one request at a time, each prompt in one step."""
    return answers(make_rig(writer_model, adapters, max_step_tokens=512), requests(), 1)


def make_rig(model: Path, adapters: Path, **options: int) -> Rig:
    return build(model, adapters, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 32, "max_step_tokens": 512},
        {"max_batch": 32, "max_step_tokens": 33},
        {"max_batch": 3, "max_step_tokens": 4},
        {"max_batch": 32, "max_step_tokens": 64, "num_blocks": 8},
    ],
    ids=["32 at once", "in short steps", "in chunks of few tokens", "preempted"],
)
def test_an_answer_is_the_same_beside_others(
    writer_model: Path, adapters: Path, alone: list[Answer], options: dict[str, int]
) -> None:
    rig = make_rig(writer_model, adapters, **options)
    assert answers(rig, requests()) == alone
    assert answers(rig, requests()) == alone, "all adapters are resident now, so all requests run from the first step"
    if "num_blocks" in options:
        assert rig.scheduler.num_preemptions > 0, "requests have to be preempted"


def test_an_answer_is_the_same_in_another_order_and_where_its_prompt_is_cached(
    writer_model: Path, adapters: Path, alone: list[Answer]
) -> None:
    rig = make_rig(writer_model, adapters, max_batch=32, max_step_tokens=64, num_blocks=512)
    assert answers(rig, requests()[::-1])[::-1] == alone
    again = rig.run(requests())
    assert sum(one.done.num_cached_tokens > 0 for one in again) > NUM_REQUESTS // 3, "many prompts have to be cached"
    assert answers(rig, requests()) == alone


@pytest.mark.usefixtures("three_threads")
def test_an_answer_is_the_same_with_another_number_of_threads(writer_model: Path, adapters: Path, alone: list[Answer]) -> None:
    assert answers(make_rig(writer_model, adapters, max_batch=32, max_step_tokens=512), requests()) == alone


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
