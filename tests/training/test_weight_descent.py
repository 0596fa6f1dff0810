"""`training.weight_descent`: losses of weighted adapters are those of the merge, and gradients those of the losses."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model
from tests.server.rig import write_adapter
from training.data import Example, Row, tokenize
from training.evaluation.answerer import Sampling
from training.evaluation.local_adapters import AdapterSelection, apply_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.merge_score import MergeScorer
from training.progress import TrainingError
from training.weight_descent import DescentOptions, WeightDescent
from training.weight_trials import Weights

GAINS = {"one": 0.5, "two": 2.0}
PAIR_IN_BLOCKS: Weights = (0.9, 0.2, 0.4, 1.3)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32, "eager")


@pytest.fixture(scope="module")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Return adapters of two ranks on one basis; the second changes fewer modules. Both were trained on plain prompts."""
    place = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(place / "one", base, seed=1, templates=("plain",)),
        write_adapter(place / "two", base, seed=2, rank=6, targets=("q_proj", "down_proj"), templates=("plain",)),
    ]


@pytest.fixture(scope="module")
def rows() -> Mapping[str, Sequence[Row]]:
    """Return rows of two sources. No end of text is learned after them, as in a likelihood."""
    return {
        name: [
            Row(prompt=f"{name} {i}:", completion=f" {word}" * (i + 1), template="plain", truncated=True).set_origin(f"row {i}")
            for i in range(3)
        ]
        for name, word in (("one", "red"), ("two", "or blue"))
    }


def descent_of(base: BaseModel, adapters: Sequence[Adapter], rows: Mapping[str, Sequence[Row]], num_blocks: int) -> WeightDescent:
    return WeightDescent(base, adapters, examples_of(base, rows), GAINS, num_blocks)


def at(descent: WeightDescent, weights: Weights) -> WeightDescent:
    with torch.no_grad():
        descent.weights.copy_(torch.tensor(weights).view_as(descent.weights))
    return descent


def examples_of(base: BaseModel, rows: Mapping[str, Sequence[Row]]) -> Mapping[str, Sequence[Example]]:
    return {source: tokenize(base.tokenizer, own, ["plain"], 512) for source, own in rows.items()}


def merged_loss(base: BaseModel, adapters: Sequence[Adapter], rows: Mapping[str, Sequence[Row]], weights: Weights) -> float:
    """Return the loss of the merge with these weights, by `MergeScorer`."""
    losses = MergeScorer(base, adapters, rows, len(weights) // len(adapters)).losses(weights)
    return sum(losses[source] / GAINS[source] for source in rows) / len(rows)


@pytest.mark.parametrize("weights", [(0.7, 1.2), PAIR_IN_BLOCKS])
def test_losses_are_those_of_the_merge(
    base: BaseModel, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]], weights: Weights
) -> None:
    descent = at(descent_of(base, adapters, rows, len(weights) // 2), weights)
    loss = descent.backward(examples_of(base, rows))
    assert loss == pytest.approx(merged_loss(base, adapters, rows, weights), rel=1e-5)


def test_losses_in_bfloat16_are_those_of_the_merge(
    tiny_model: Path, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]]
) -> None:
    base = load_base_model(str(tiny_model), torch.bfloat16, "eager")
    descent = at(descent_of(base, adapters, rows, 2), PAIR_IN_BLOCKS)
    loss = descent.backward(examples_of(base, rows))
    assert loss == pytest.approx(merged_loss(base, adapters, rows, PAIR_IN_BLOCKS), rel=0.01)
    assert descent.weights.grad is not None
    assert descent.weights.grad.isfinite().all()


def test_a_batch_in_parts_has_the_same_loss_and_gradient(
    base: BaseModel, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, in_parts = (at(descent_of(base, adapters, rows, 2), PAIR_IN_BLOCKS) for _ in range(2))
    loss = whole.backward(examples_of(base, rows))
    monkeypatch.setattr("training.weight_descent.BATCH_TOKENS", 1)
    assert in_parts.backward(examples_of(base, rows)) == pytest.approx(loss, rel=1e-5)
    assert whole.weights.grad is not None
    torch.testing.assert_close(in_parts.weights.grad, whole.weights.grad, rtol=1e-3, atol=1e-4)


def test_adapters_on_several_bases_can_be_weighted(base: BaseModel, rows: Mapping[str, Sequence[Row]], tmp_path: Path) -> None:
    adapters = [write_adapter(tmp_path / f"on{i}", base, seed=i, stream=i, templates=("plain",)) for i in range(2)]
    loss = at(descent_of(base, adapters, rows, 1), (0.7, 1.2)).backward(examples_of(base, rows))
    assert loss == pytest.approx(merged_loss(base, adapters, rows, (0.7, 1.2)), rel=1e-5)


def test_gradients_are_those_of_the_losses(base: BaseModel, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]]) -> None:
    descent, step = at(descent_of(base, adapters, rows, 2), PAIR_IN_BLOCKS), 0.01
    descent.backward(examples_of(base, rows))
    assert descent.weights.grad is not None

    def moved(index: int, difference: float) -> Weights:
        return tuple(weight + difference * (i == index) for i, weight in enumerate(PAIR_IN_BLOCKS))

    for index, gradient in enumerate(descent.weights.grad.flatten().tolist()):
        ends = [merged_loss(base, adapters, rows, moved(index, sign * step)) for sign in (-1, 1)]
        assert gradient == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=0.05, abs=0.02)


def test_a_descent_comes_down_and_leaves_the_model_as_it_was(
    base: BaseModel, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]]
) -> None:
    prompt = base.tokenizer("red", return_tensors="pt").input_ids
    before, start = base.model(prompt).logits, (0.5, 0.5, 0.5, 0.5)
    descent = descent_of(base, adapters, rows, 2)
    steps = [*descent.descend(start, DescentOptions(num_steps=30, batch_size=6, max_weight=1.25, seed=0))]
    assert len(steps) == 30
    assert all(-1.25 <= weight <= 1.25 and weight == round(weight, 2) for weights in steps for weight in weights)
    assert merged_loss(base, adapters, rows, steps[-1]) < merged_loss(base, adapters, rows, start) - 0.05
    assert torch.equal(base.model(prompt).logits, before)
    again = descent.descend(start, DescentOptions(num_steps=30, batch_size=6, max_weight=1.25, seed=0))
    assert [*again] == steps, "a second descent depends on nothing of the first"


def test_every_row_is_seen_before_any_is_seen_again(
    base: BaseModel, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]]
) -> None:
    descent, seen = descent_of(base, adapters, rows, 1), list[Example]()
    compute = descent.backward

    def note(batch: Mapping[str, Sequence[Example]]) -> float:
        seen.extend(batch["one"])
        return compute(batch)

    descent.backward = note  # type: ignore[method-assign]  # to see its batches
    assert len([*descent.descend((1.0, 1.0), DescentOptions(num_steps=6, batch_size=2, max_weight=2, seed=0))]) == 6
    assert len({*seen[:3]}) == len({*seen[3:]}) == 3


def test_an_adapter_that_harms_is_subtracted(base: BaseModel, adapters: list[Adapter]) -> None:
    merged = AdapterSelection(adapters, (-1.0, 0.0)).merged()
    prompts = [f"red {i}:" for i in range(6)]
    with apply_adapter(base.model, merged):
        answers = LocalAnswerer(base.model, base.tokenizer).complete(prompts, Sampling(6))
    rows = {
        "one": [
            Row(prompt=p, completion=a, template="plain", truncated=True) for p, [a] in zip(prompts, answers, strict=True) if a
        ]
    }
    options = DescentOptions(num_steps=60, batch_size=6, max_weight=0.75, seed=0)
    *_, weights = descent_of(base, adapters, rows, 1).descend((-0.25, 0.0), options)
    assert weights[0] == -0.75, "it would be less"


def test_a_loss_that_is_not_finite_ends_the_descent(
    base: BaseModel, adapters: list[Adapter], rows: Mapping[str, Sequence[Row]]
) -> None:
    descent = WeightDescent(base, adapters, examples_of(base, rows), {"one": math.nan, "two": 1.0}, 1)
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower --max-weight, now 2"):
        next(descent.descend((1.0, 1.0), DescentOptions(num_steps=6, batch_size=2, max_weight=2, seed=0)))
