"""Served merges of the demo adapters equal an oracle: the same merge folded into the base's weights, in float64."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lori.embedded import embedded_model
from lori.format import load_adapter
from lori.merge import merge
from lori.merge_options import MergeOptions
from server.engine.generate_request import GenerateRequest
from server.engine.request import SamplingParams
from tests.server.rig import Heard, Rig, build, fold

pytestmark = pytest.mark.slow
ADAPTERS = Path(__file__).parents[3] / "server" / "adapters"
TOLERANCE = 1e-4
"""Of the largest logit. transformers' own norms are in fp32 whatever the model's dtype is."""
NUM_TOP = 5
PROMPT = (
    "Question: Tom has 3 boxes of 12 pens and sells 7 of them. How many pens are left?\nAnswer: Tom had 36 pens, now he has 29."
)
Terms = tuple[tuple[str, float], ...]
MERGES: dict[str, tuple[Terms, MergeOptions]] = {
    "the base": ((), MergeOptions()),
    "of two": ((("math", 1.0), ("safety", 0.8)), MergeOptions()),
    "of all, at weights as automatic ones": (
        (("intent", 0.0625), ("math", 0.75), ("nlu", 0.125), ("safety", 0.0625)),
        MergeOptions(),
    ),
    "with a negative weight": ((("nlu", 1.5), ("intent", -0.5)), MergeOptions()),
    "with weights in blocks of layers": ((("math", 1.0), ("safety", 0.5), ("nlu", 1.0)), MergeOptions()),
    "by TIES": ((("math", 1.0), ("nlu", 0.5), ("safety", 1.0)), MergeOptions("ties", density=0.7)),
}
BLOCK_WEIGHTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "with weights in blocks of layers": ((1.5, 0.5, 1.0, -0.5), (), (0.0, 1.0))
}


@pytest.fixture(scope="module")
def rig() -> Rig:
    """Return an engine in fp32 with the demo adapters."""
    return build(embedded_model(), ADAPTERS, max_step_tokens=32)


def ask(name: str) -> GenerateRequest:
    terms, options = MERGES[name]
    return GenerateRequest(
        prompt=PROMPT,
        max_tokens=4,
        adapters=tuple(adapter for adapter, _ in terms),
        weights=tuple(weight for _, weight in terms) or None,
        merge=options,
        block_weights=BLOCK_WEIGHTS.get(name, ()),
        sampling=SamplingParams(echo=True, num_logprobs=NUM_TOP, ignore_eos=True),
    )


@cache
def oracle_logits(name: str, ids: tuple[int, ...]) -> torch.Tensor:
    """Return the logits (T, vocabulary) of transformers' own model, in float64."""
    terms, options = MERGES[name]
    adapters = [(load_adapter(ADAPTERS / adapter), weight) for adapter, weight in terms]
    block_weights = BLOCK_WEIGHTS.get(name, ())
    if options.method != "linear" or block_weights:
        parts, weights = zip(*adapters, strict=True)
        merged = merge(parts, weights, options.method, density=options.density, templates=["plain"], block_weights=block_weights)
        adapters = [(merged, 1.0)]
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float64, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = fold(model, adapters)(torch.tensor([ids])).logits[0]
    return logits


def assert_like_the_oracle(name: str, heard: Heard) -> None:
    ids = (*heard.sequence.request.prompt_ids, *heard.tokens)
    logits = oracle_logits(name, ids)[:-1]
    expected, tolerance = logits.log_softmax(-1), TOLERANCE * float(logits.abs().max())
    assert len(heard.logprobs) == len(ids)
    actual = torch.tensor([[one.value] for one in heard.logprobs[1:]], dtype=torch.float64)
    torch.testing.assert_close(actual, expected.gather(1, torch.tensor(ids)[1:, None]), rtol=0, atol=tolerance)
    best = torch.tensor([largest(one.top.values()) for one in heard.logprobs[1:]], dtype=torch.float64)
    torch.testing.assert_close(best, expected.topk(NUM_TOP).values, rtol=0, atol=tolerance)


def largest(values: Iterable[float]) -> list[float]:
    """Return the `NUM_TOP` largest values, descending. The token itself is listed too if it is not among the likeliest."""
    return sorted(values, reverse=True)[:NUM_TOP]


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_alone_equals_its_oracle(rig: Rig, name: str) -> None:
    (heard,) = rig.run([ask(name)])
    assert_like_the_oracle(name, heard)


def test_merges_in_one_batch_equal_their_oracles(rig: Rig) -> None:
    for name, heard in zip(MERGES, rig.run([ask(name) for name in MERGES]), strict=True):
        assert_like_the_oracle(name, heard)
