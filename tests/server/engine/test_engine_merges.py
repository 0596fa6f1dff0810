"""Merges that requests name: their answers equal those of the same merges published as adapters."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from lori.format import save_adapter
from lori.merge import merge
from lori.merge_options import MergeOptions
from server.engine.generate_request import GenerateRequest
from server.engine.request import SamplingParams
from tests.server.rig import Heard, Rig, build, write_adapter

FOX = "The quick brown fox jumps over the lazy dog. "
MERGES = {
    "ties": (MergeOptions("ties", density=0.6), (1.0, 0.75)),
    "ties by frequency": (MergeOptions("ties", density=0.6, sign="frequency"), (1.0, 0.75)),
    "dare-linear": (MergeOptions("dare_linear", density=0.5, seed=4), (0.5, 1.0)),
    "dare-ties": (MergeOptions("dare_ties", density=0.7, seed=5), (1.0, -0.5)),
    "magnitude": (MergeOptions("magnitude", density=0.4), (1.5, 0.5)),
    "linear": (MergeOptions(), (0.5, 0.75)),
}


@pytest.fixture(scope="module")
def rig(writer_model: Path, writer: BaseModel, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Return an engine with the adapters, another one of another rank (law), and each merge of math and law as an adapter."""
    place = Path(shutil.copytree(adapters, tmp_path_factory.mktemp("store") / "adapters"))
    law = write_adapter(place / "law", writer, seed=7, rank=6, targets=("q_proj", "v_proj", "down_proj"))
    parents = [build(writer_model, adapters).adapters["math"], law]
    for name, (options, weights) in MERGES.items():
        made = merge(
            parents, weights, options.method, density=options.density, sign=options.sign, seed=options.seed, templates=["chat"]
        )
        save_adapter(made, place / name.replace(" ", "-"))
    return build(writer_model, place)


def values(heard: Heard) -> list[float]:
    return [one.value for one in heard.logprobs if one.value is not None]


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_of_a_request_equals_that_merge_as_an_adapter(rig: Rig, name: str) -> None:
    options, weights = MERGES[name]
    ask = GenerateRequest(prompt=FOX, max_tokens=30, sampling=SamplingParams(num_logprobs=0, echo=True))
    both = replace(ask, adapters=("math", "law"), weights=weights)
    merged, published, base = rig.run([replace(both, merge=options), replace(ask, adapters=(name.replace(" ", "-"),)), ask])
    assert values(merged) == pytest.approx(values(published), abs=1e-3)
    assert merged.tokens == published.tokens
    assert merged.tokens != base.tokens
    if options.method != "linear":
        (summed,) = rig.run([both])
        assert values(merged) != pytest.approx(values(summed), abs=1e-2), "the merge has to differ from the plain sum"


def test_a_merge_is_built_once_and_stays(rig: Rig) -> None:
    options, weights = MERGES["ties"]
    seconds: list[float] = []
    rig.engine.adapter_cache.observe_load = seconds.append
    ask = GenerateRequest(prompt="once", max_tokens=4, adapters=("math", "safety"), weights=weights, merge=options)
    reordered = GenerateRequest(prompt="more", max_tokens=4, adapters=("safety", "math"), weights=weights[::-1], merge=options)
    rig.run([ask, reordered, ask])
    rig.run([reordered])
    assert len(seconds) == 1


def test_requests_with_different_merges_share_a_batch(rig: Rig) -> None:
    asks = [
        GenerateRequest(prompt=FOX, max_tokens=12, adapters=("math", "law"), weights=weights, merge=options)
        for options, weights in MERGES.values()
    ]
    alone = [rig.run([ask])[0].tokens for ask in asks]
    assert [heard.tokens for heard in rig.run(asks)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 3
