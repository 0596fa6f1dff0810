"""The operator's policy beside any adapters of a request: the answers equal those of a model with both folded in."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model
from lori.merge import MergeOptions, merge
from lori.template import encode
from server.engine.generate_request import GenerateRequest
from server.engine.request import SamplingParams
from tests.server.rig import Heard, Rig, build, fold, greedy

FOX = "The quick brown fox jumps over the lazy dog. "
NUM_TOKENS = 24
WEIGHTS = (1.0, 0.75)
POLICY = (("intent", 0.6),)
"""The policy's adapter is on another basis than math and safety."""
MERGES = {
    "linear": MergeOptions(),
    "ties": MergeOptions("ties", density=0.6),
    "dare_linear": MergeOptions("dare_linear", density=0.5, seed=4),
    "dare_ties": MergeOptions("dare_ties", density=0.7, seed=5),
    "magnitude": MergeOptions("magnitude", density=0.4),
}


@pytest.fixture(scope="module")
def rig(writer_model: Path, adapters: Path) -> Rig:
    """Return one engine for the whole file, which is idle between tests."""
    return build(writer_model, adapters)


def folded(writer_model: Path, terms: Sequence[tuple[Adapter, float]]) -> PreTrainedModel:
    return fold(load_base_model(str(writer_model), torch.float32).model, terms)


def values(heard: Heard) -> list[float]:
    return [one.value for one in heard.logprobs if one.value is not None]


def scores(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first, given the tokens before it."""
    with torch.inference_mode():
        rows = model(torch.tensor([[*ids]])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor([ids[1:]]).T)[:, 0].tolist()


@pytest.mark.parametrize("name", MERGES)
def test_a_policy_beside_a_merge_equals_both_folded_in(rig: Rig, writer: BaseModel, writer_model: Path, name: str) -> None:
    options = MERGES[name]
    parents = [rig.adapters["math"], rig.adapters["safety"]]
    made = merge(
        parents, WEIGHTS, options.method, density=options.density, sign=options.sign, seed=options.seed, templates=["chat"]
    )
    ask = GenerateRequest(
        prompt=FOX,
        adapters=("math", "safety"),
        weights=WEIGHTS,
        merge=options,
        policy=POLICY,
        max_tokens=NUM_TOKENS,
        sampling=SamplingParams(num_logprobs=0, echo=True),
    )
    (heard,) = rig.run([ask])
    ids = encode(writer.tokenizer, FOX).ids
    both = folded(writer_model, [(made, 1.0), (rig.adapters["intent"], 0.6)])
    assert heard.tokens == greedy(both, ids, NUM_TOKENS)
    assert values(heard) == pytest.approx(scores(both, [*ids, *heard.tokens]), abs=1e-3)
    for other in ([(made, 1.0)], [(made, 1.0), (rig.adapters["intent"], 1.0)], [(rig.adapters["intent"], 0.6)]):
        assert values(heard) != pytest.approx(scores(folded(writer_model, other), [*ids, *heard.tokens]), abs=1e-2)


@pytest.mark.parametrize("names", [(), ("math",)])
def test_a_policy_has_its_own_weight_however_many_adapters_are_asked_for(
    rig: Rig, writer: BaseModel, writer_model: Path, names: tuple[str, ...]
) -> None:
    (heard,) = rig.run(
        [
            GenerateRequest(
                prompt=FOX,
                adapters=names,
                policy=POLICY,
                max_tokens=NUM_TOKENS,
                sampling=SamplingParams(num_logprobs=0, echo=True),
            )
        ]
    )
    ids = encode(writer.tokenizer, FOX).ids
    model = folded(writer_model, [*((rig.adapters[name], 1.0) for name in names), (rig.adapters["intent"], 0.6)])
    assert heard.tokens == greedy(model, ids, NUM_TOKENS)
    assert values(heard) == pytest.approx(scores(model, [*ids, *heard.tokens]), abs=1e-3)


def test_requests_with_and_without_a_policy_share_a_batch_but_no_keys(rig: Rig) -> None:
    """Tenants with different policies share no keys and values, though prompt and adapters are the same."""
    asks = [
        GenerateRequest(prompt=FOX * 2, adapters=("math", "safety"), merge=merge, policy=policy, max_tokens=12)
        for merge in (MergeOptions(), MERGES["ties"])
        for policy in ((), POLICY, (("intent", 1.2),))
    ]
    alone = [alone_tokens(rig, ask) for ask in asks]
    assert len({tuple(tokens) for tokens in alone}) == len(asks)
    assert [heard.tokens for heard in rig.run(asks)] == alone


def alone_tokens(rig: Rig, ask: GenerateRequest) -> list[int]:
    (heard,) = rig.run([ask])
    return heard.tokens
