"""Merges: `linear` adds exactly the deltas of its adapters, and the methods that prune equal PEFT's."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraConfig, LoraModel
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

from lori.adapter import Adapter
from lori.base_identity import module_shapes
from lori.basis import Basis, Explicit, Seeded
from lori.config import new_config
from lori.errors import AdapterError, MergeCancelledError
from lori.format import seal
from lori.identity import BaseIdentity
from lori.merge import MergeMethod, MergeOptions, SignMethod, drop_and_rescale, keep_largest, merge
from lori.merge_options import MERGE_METHODS
from lori.sparse import VALUE_TYPES, SparseB, ValueType, rounded
from lori.store.store import AdapterStore
from lori.template import Template

SHAPES = {"layers.0.q_proj": (9, 5), "layers.0.up_proj": (16, 7), "layers.1.q_proj": (9, 5), "layers.1.up_proj": (16, 7)}
Q0, UP0, Q1, UP1 = SHAPES
ONE, OTHER = Seeded(5, 0), Seeded(5, 1)
OWN = Explicit.from_tensors({module: torch.full((3, shape[1]), 0.1) for module, shape in SHAPES.items()})
Terms = list[tuple[Adapter, float]]
PRUNING: list[MergeMethod] = [method for method in MERGE_METHODS if method != "linear"]
TIES: list[MergeMethod] = ["ties", "dare_ties"]
DARE: list[MergeMethod] = ["dare_linear", "dare_ties"]
SIGNS: list[SignMethod] = ["total", "frequency"]


def random_b(shape: tuple[int, int], nnz: int, seed: int) -> SparseB:
    """Return a B (D, R) with `nnz` entries."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=g)[:nnz]] = True
    return SparseB.from_dense(torch.randn(shape, generator=g), mask.view(shape))


def adapter_of(
    name: str,
    modules: Mapping[str, SparseB],
    alpha: float = 6.0,
    alpha_pattern: Mapping[str, float] | None = None,
    basis: Basis = ONE,
    base: str = "b",
    templates: Sequence[Template] = ("chat",),
    values: ValueType = "float32",
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> Adapter:
    """Return a sealed adapter."""
    config = new_config(
        modules,
        basis,
        BaseIdentity(f"a/{base}", base * 64, shapes),
        alphas=dict.fromkeys(modules, alpha) | {m: own for m, own in (alpha_pattern or {}).items() if m in modules},
        target_modules=list(modules),
        values=values,
        templates=templates,
        training={},
    )
    return seal(Adapter(name, config, modules, basis)).adapter


def adapter(name: str, rank: int = 3, modules: Sequence[str] = tuple(SHAPES), seed: int | None = None, **more: Any) -> Adapter:
    """Return a random adapter with 13 entries in every module. Another name gives another B."""
    seed = sum(name.encode()) if seed is None else seed
    return adapter_of(name, {m: random_b((SHAPES[m][0], rank), 13, 10 * seed + i) for i, m in enumerate(modules)}, **more)


def mixed_ranks(name: str, ranks: Mapping[str, int], alphas: Mapping[str, float], **more: Any) -> Adapter:
    modules = {module: random_b((SHAPES[module][0], rank), 11, 7 * rank) for module, rank in ranks.items()}
    return adapter_of(name, modules, alpha_pattern=alphas, **more)


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    """Return the delta of `adapter` to the weight of `module`, (alpha / r) B A, (D, N) fp64."""
    shape = adapter.config.shape_of(module)
    assert shape is not None
    if module not in adapter.modules:
        return torch.zeros(shape, dtype=torch.float64)
    a = adapter.basis.draw(module, adapter.config.rank_of(module), shape[1]).double()
    return adapter.config.scale_of(module) * adapter.modules[module].dense(torch.float64) @ a


def folded(terms: Terms, module: str) -> torch.Tensor:
    """Return the weighted sum of the adapters' deltas to the weight of `module`, (D, N) fp64."""
    having = [(adapter, weight) for adapter, weight in terms if module in adapter.modules]
    return torch.stack([weight * delta(adapter, module) for adapter, weight in having]).sum(0)


def merged(terms: Terms, method: MergeMethod = "linear", **options: Any) -> Adapter:
    return merge([adapter for adapter, _ in terms], [weight for _, weight in terms], method, **options)


def is_same(one: SparseB, other: SparseB) -> bool:
    """Return whether two B's are bit-identical."""
    bits = [b.values.contiguous().view(torch.uint8) for b in (one, other)]
    return one.shape == other.shape and torch.equal(one.indices, other.indices) and torch.equal(*bits)


def are_same(one: Mapping[str, SparseB], other: Mapping[str, SparseB]) -> bool:
    return list(one) == list(other) and all(is_same(one[module], other[module]) for module in one)


ON_ONE_BASIS: dict[str, Terms] = {
    "one at a weight": [(adapter("a"), 0.37)],
    "two": [(adapter("a"), 1.0), (adapter("b"), 1.0)],
    "negative weights": [(adapter("a"), 0.7), (adapter("b"), -1.3), (adapter("c"), -0.2)],
    "three ranks": [(adapter("a", 3), 0.7), (adapter("b", 5), 0.5), (adapter("c", 8), -1.1)],
    "three ranks, one scale": [(adapter("a", 3), 0.7), (adapter("b", 5, alpha=10), 0.5), (adapter("c", 8, alpha=16), -1.1)],
    "targets that overlap": [(adapter("a", 3, [Q0, UP0]), 0.7), (adapter("b", 5, [UP0, UP1]), 0.5)],
    "targets that do not": [(adapter("a", 3, [Q0, Q1]), 0.7), (adapter("b", 3, [UP0], alpha=1.5), 0.5)],
    "patterns": [
        (mixed_ranks("a", {Q0: 2, UP0: 4, Q1: 4}, {Q0: 1.5, UP0: 8.0}), 0.7),
        (mixed_ranks("b", {Q0: 6, UP0: 2, UP1: 5}, {UP1: 0.25}), -0.4),
    ],
    "an explicit basis": [(adapter("a", basis=OWN), 0.7), (adapter("b", 2, basis=OWN), 0.5)],
    "an explicit basis of a lower rank": [(adapter("a", 5, basis=OWN), 0.7), (adapter("b", basis=OWN), 0.5)],
}
ON_SEVERAL: dict[str, Terms] = {
    "two": [(adapter("a", basis=ONE), 0.7), (adapter("b", basis=OTHER), 0.5)],
    "two, one scale": [(adapter("a", 3, basis=ONE), 1.0), (adapter("b", 3, basis=OTHER), 1.0)],
    "a seeded and an explicit one": [(adapter("a", 4, basis=ONE), 0.7), (adapter("b", 3, basis=OWN), -0.5)],
    "two on one of three": [
        (adapter("a", 3, basis=ONE), 0.7),
        (adapter("b", 5, basis=OTHER), -0.5),
        (adapter("c", 8, basis=ONE, alpha=1.0), 0.3),
        (adapter("d", 2, basis=OWN), 1.1),
    ],
    "targets that do not overlap": [(adapter("a", 3, [Q0], basis=ONE), 0.7), (adapter("b", 5, [UP0, Q1], basis=OTHER), 0.5)],
    "patterns": [
        (mixed_ranks("a", {Q0: 2, UP0: 4, Q1: 4}, {Q0: 1.5, UP0: 8.0}, basis=ONE), 0.7),
        (mixed_ranks("b", {Q0: 6, UP0: 2, UP1: 5}, {UP1: 0.25}, basis=OTHER), -0.4),
    ],
}
LINEAR = [*ON_ONE_BASIS.values(), *ON_SEVERAL.values()]
LINEAR_IDS = [*(f"one basis: {name}" for name in ON_ONE_BASIS), *(f"several: {name}" for name in ON_SEVERAL)]


@pytest.mark.parametrize("terms", LINEAR, ids=LINEAR_IDS)
def test_linear_adds_the_weighted_sum(terms: Terms) -> None:
    result = merged(terms)
    assert set(result.modules) == {module for adapter, _ in terms for module in adapter.modules}
    for module in result.modules:
        torch.testing.assert_close(delta(result, module), folded(terms, module), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("terms", ON_ONE_BASIS.values(), ids=ON_ONE_BASIS.keys())
def test_on_one_basis_rank_is_the_greatest_and_the_mask_the_union(terms: Terms) -> None:
    result = merged(terms)
    assert result.basis == terms[0][0].basis
    for module, b in result.modules.items():
        having = [adapter.modules[module] for adapter, _ in terms if module in adapter.modules]
        assert b.shape[1] == result.config.rank_of(module) == max(own.shape[1] for own in having)
        mask = torch.zeros(b.shape, dtype=torch.bool)
        for own in having:
            mask[:, : own.shape[1]] |= own.mask
        assert torch.equal(b.mask, mask)


@pytest.mark.parametrize("terms", ON_SEVERAL.values(), ids=ON_SEVERAL.keys())
def test_on_several_bases_each_basis_has_columns_of_its_own(terms: Terms) -> None:
    result = merged(terms)
    assert isinstance(result.basis, Explicit)
    for module, b in result.modules.items():
        ranks: dict[Basis, int] = {}
        for own, _ in terms:
            if module in own.modules:
                ranks[own.basis] = max(ranks.get(own.basis, 0), own.config.rank_of(module))
        assert b.shape[1] == result.config.rank_of(module) == result.basis.tensors[module].shape[0] == sum(ranks.values())
        assert result.config.scale_of(module) == 1.0


def test_with_equal_scales_b_is_the_weighted_sum_of_the_b_s() -> None:
    a, b = adapter("a", 3, alpha=0.3), adapter("b", 3, alpha=0.3)
    result = merge([a, b], [0.7, -0.2])
    assert (result.config.lora_alpha, result.config.r) == (0.3, 3)
    for module in SHAPES:
        exact = 0.7 * a.modules[module].dense(torch.float64) - 0.2 * b.modules[module].dense(torch.float64)
        assert torch.equal(result.modules[module].dense(), exact.float())


def test_different_scales_are_multiplied_into_b() -> None:
    result = merge([adapter("a", 3), mixed_ranks("b", {Q0: 3, UP0: 5}, {})], [1, 1])
    assert [result.config.scale_of(module) for module in SHAPES] == [1.0] * 4
    assert [result.config.rank_of(module) for module in SHAPES] == [3, 5, 3, 3]


IDENTITIES = {
    "plain": adapter("a", alpha=0.7),
    "patterns": mixed_ranks("a", {Q0: 3, UP0: 7, Q1: 3, UP1: 3}, {Q0: 0.1, UP0: 0.7, UP1: 1.3}, alpha=0.7),
    "zeros that are kept": adapter_of("a", {Q0: SparseB((9, 3), torch.tensor([0, 4, 9]).int(), torch.tensor([0.0, -0.0, 2.0]))}),
    "no entry": adapter_of("a", {Q0: random_b((9, 3), 0, 0)}),
    "explicit basis": adapter("a", basis=OWN),
}


@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("one", IDENTITIES.values(), ids=IDENTITIES.keys())
def test_one_adapter_at_weight_1_is_itself(one: Adapter, values: ValueType) -> None:
    modules = {module: rounded(b, values) for module, b in one.modules.items()}
    result = merge([replace(one, modules=modules)], [1], values=values)
    assert are_same(result.modules, modules)
    assert result.basis == one.basis
    for module in modules:
        assert result.config.rank_of(module) == one.config.rank_of(module)
        assert result.config.scale_of(module) == one.config.scale_of(module)


@pytest.mark.parametrize("stored", VALUE_TYPES)
def test_fp32_holds_the_values_of_an_adapter_of_any_type(stored: ValueType) -> None:
    modules = {module: rounded(b, stored) for module, b in adapter("a").modules.items()}
    result = merge([adapter_of("a", modules, values=stored)], [1])
    assert are_same(result.modules, {module: rounded(b, "float32") for module, b in modules.items()})


@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("method", MERGE_METHODS)
def test_values_are_rounded_and_the_config_says_so(values: ValueType, method: MergeMethod) -> None:
    terms = ON_ONE_BASIS["three ranks"]
    result, exact = merged(terms, method, values=values), merged(terms, method)
    assert result.config.lori.values == values
    for module, b in result.modules.items():
        assert torch.equal(b.dense(), rounded(exact.modules[module], values).dense())
        assert bool((b.values != 0).all())


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_an_adapter_of_weight_0_counts_for_nothing(method: MergeMethod) -> None:
    one, other = adapter("a", 3, [Q0, UP0]), adapter("b", 5, basis=OTHER)
    result, alone = merge([one, other], [1, 0], method), merge([one], [1], method)
    assert are_same(result.modules, alone.modules)
    assert (result.config, result.basis) == (alone.config, ONE)


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_weights_that_are_all_0_keep_modules_and_no_entry(method: MergeMethod) -> None:
    result = merge([adapter("a", 3, [Q0, UP0])], [0], method)
    assert {module: (b.shape, b.values.numel()) for module, b in result.modules.items()} == {Q0: ((9, 3), 0), UP0: ((16, 3), 0)}
    assert result.config.lori.sparsity == 1.0
    several = merge([adapter("a", 3, [Q0]), adapter("b", 5, [UP0], basis=OTHER)], [0, 0], method)
    assert len(several.modules) == 1
    assert several.nnz == 0


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_the_weights_of_an_adapter_that_is_named_twice_add(method: MergeMethod) -> None:
    one, other = adapter("a"), adapter("b")
    twice, once = merge([one, other, one], [0.25, 0.7, 0.5], method), merge([one, other], [0.75, 0.7], method)
    assert are_same(twice.modules, once.modules)
    assert twice.config == once.config
    assert merge([one, one], [1, -1], method).nnz == 0


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_a_merge_that_is_cancelled_ends_before_the_next_module(method: MergeMethod) -> None:
    num_asked = 0

    def is_cancelled() -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked == 2

    adapters = [adapter("a"), adapter("b", seed=5)]
    with pytest.raises(MergeCancelledError):
        merge(adapters, [0.5, 1], method, is_cancelled=is_cancelled)
    assert num_asked == 2
    assert len(SHAPES) > 1
    completed = merge(adapters, [0.5, 1], method, is_cancelled=lambda: False)
    assert are_same(completed.modules, merge(adapters, [0.5, 1], method).modules)


def test_entries_that_cancel_are_left_out() -> None:
    modules = adapter("a").modules
    other = dict(modules) | {Q0: random_b((9, 3), 13, 99)}
    result = merge([adapter_of("a", modules), adapter_of("b", other)], [1, -1])
    assert [b.values.numel() for b in result.modules.values()][1:] == [0, 0, 0]
    assert result.modules[Q0].values.numel() > 13


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_the_order_of_the_adapters_makes_no_difference_to_a_bit(method: MergeMethod) -> None:
    weights = {3: 0.7, 5: 0.1, 8: -0.4, 4: 1.0, 2: 0.3, 6: 2.0}
    terms = [(adapter(f"rank-{rank}", rank), weight) for rank, weight in weights.items()]
    terms.append((terms[0][0], 0.15))
    first = merged(terms, method)
    for seed in range(5):
        shuffled = merged(random.Random(seed).sample(terms, len(terms)), method)
        assert are_same(shuffled.modules, first.modules)
        assert shuffled.config == first.config


def test_the_order_of_the_adapters_makes_no_difference_on_several_bases() -> None:
    terms = ON_SEVERAL["two on one of three"]
    first, last = merged(terms), merged(terms[::-1])
    assert are_same(first.modules, last.modules)
    assert (first.config, first.basis) == (last.config, last.basis)


ADAPTERS = [adapter("a", 3), adapter("b", 5), adapter("c", 3, [Q0, UP1], alpha=1.0), adapter("d", 2)]
WEIGHTS = st.floats(-4, 4, allow_subnormal=False, width=32)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.lists(WEIGHTS, min_size=4, max_size=4), st.integers(-3, 3), st.booleans())
def test_linear_is_linear_in_any_order(order: list[int], weights: list[float], exponent: int, is_negative: bool) -> None:
    factor = math.ldexp(-1.0 if is_negative else 1.0, exponent)  # a power of two: scaling by it rounds nothing
    plain = merge(ADAPTERS, weights)
    scaled = merge([ADAPTERS[i] for i in order], [factor * weights[i] for i in order])
    assert plain.modules.keys() == scaled.modules.keys()
    for module in plain.modules:
        exact, actual = delta(plain, module), delta(scaled, module)
        torch.testing.assert_close(actual, factor * exact, rtol=1e-12, atol=1e-30)


class Stack:
    """Adapters on one module with `nnz` entries each, and their dense B's times their scales, as PEFT takes them."""

    def __init__(self, alphas: Sequence[float], nnz: int, overlap: bool = True) -> None:
        shape = (16, 4)
        seeds = range(len(alphas))
        bs = [random_b(shape, nnz, seed) for seed in seeds]
        if overlap:  # many positions with an entry in several adapters
            bs = [SparseB(shape, bs[0].indices, random_b(shape, nnz, seed).values) for seed in seeds]
        self.adapters = [
            adapter_of(f"adapter-{i}", {UP0: b}, alpha=alpha) for i, (b, alpha) in enumerate(zip(bs, alphas, strict=True))
        ]
        self.nnz = nnz

    @property
    def dense(self) -> list[torch.Tensor]:
        return [a.config.scale * a.modules[UP0].dense(torch.float64) for a in self.adapters]

    def peft_density(self, density: float) -> float:
        """Return PEFT's density, a fraction of all entries, at which as many survive as at `density` of the nonzero ones."""
        return (round(density * self.nnz) + 0.5) / 64


def total(result: Adapter) -> torch.Tensor:
    return result.config.scale * result.modules[UP0].dense(torch.float64)


WEIGHT_SETS = [(1.0, 1.0, 1.0), (0.7, 0.5, -0.4), (2.0, -1.0, 0.0625)]
STACKS = [Stack((4.0, 4.0, 4.0), 30), Stack((4.0, 1.0, 0.3), 30), Stack((4.0, 1.0, 0.3), 45, overlap=False)]
STACK_IDS = ["one scale", "three scales", "masks that differ"]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("stack", STACKS, ids=STACK_IDS)
def test_ties_is_peft_s_on_the_dense_b(stack: Stack, sign: SignMethod, weights: Sequence[float], density: float) -> None:
    result = merge(stack.adapters, weights, "ties", sign=sign, density=density)
    expected = merge_utils.ties(stack.dense, torch.tensor(weights, dtype=torch.float64), stack.peft_density(density), sign)
    torch.testing.assert_close(total(result), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("stack", STACKS, ids=STACK_IDS)
def test_magnitude_is_peft_s_on_the_dense_b(stack: Stack, weights: Sequence[float], density: float) -> None:
    result = merge(stack.adapters, weights, "magnitude", density=density)
    expected = merge_utils.magnitude_prune(
        stack.dense, torch.tensor(weights, dtype=torch.float64), density=stack.peft_density(density)
    )
    torch.testing.assert_close(total(result), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("method", TIES)
def test_a_tied_election_elects_plus(method: MergeMethod, sign: SignMethod) -> None:
    one, other = (
        adapter_of(name, {Q0: SparseB((9, 3), torch.tensor([4]).int(), torch.tensor([value]))})
        for name, value in (("a", 2.0), ("b", -2.0))
    )
    result = merge([one, other], [0.5, 1], method, density=1, sign=sign)
    assert result.modules[Q0].indices.tolist() == [4]
    assert result.modules[Q0].values.tolist() == [1.0]


def test_the_two_elections_differ() -> None:
    terms = [
        adapter_of(name, {Q0: SparseB((9, 3), torch.tensor([4]).int(), torch.tensor([value]))})
        for name, value in (("a", 1.0), ("b", 2.0), ("c", -8.0))
    ]
    by_sign = {sign: merge(terms, [1, 1, 1], "ties", sign=sign).modules[Q0].values.tolist() for sign in SIGNS}
    assert by_sign == {"total": [-8.0], "frequency": [1.5]}


@pytest.mark.parametrize(("density", "expected"), [(0.01, 1), (0.1, 1), (0.3, 4), (0.5, 6), (0.9, 12), (1.0, 13)])
def test_density_is_a_fraction_of_the_nonzero_entries(density: float, expected: int) -> None:
    one = adapter("a")  # 13 entries in each module
    result = merge([one], [1], "magnitude", density=density)
    for module, b in result.modules.items():
        own = one.modules[module].values.abs()
        assert sorted(b.values.abs().tolist()) == sorted(own.tolist())[-expected:]


def test_the_first_of_equal_magnitudes_survive() -> None:
    indices = torch.tensor([1, 3, 5, 7, 9, 11]).int()
    one = adapter_of("a", {Q0: SparseB((9, 3), indices, torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0, 0.5]))})
    assert merge([one], [1], "magnitude", density=0.5).modules[Q0].indices.tolist() == [1, 3, 5]


def test_surviving_entries_stay_in_order() -> None:
    indices = torch.tensor([1, 3, 5, 7]).int()
    pruned = keep_largest(SparseB((9, 3), indices, torch.tensor([1.0, -2.0, 0.5, 4.0])), 0.75)
    assert (pruned.indices.tolist(), pruned.values.tolist()) == ([1, 3, 7], [1.0, -2.0, 4.0])


@pytest.mark.parametrize("method", PRUNING)
def test_an_empty_adapter_can_be_pruned(method: MergeMethod) -> None:
    empty = adapter_of("a", {Q0: random_b((9, 3), 0, 0)})
    assert merge([empty], [1], method).nnz == 0


def large(name: str, seed: int, alpha: float = 6.0) -> Adapter:
    """Return an adapter with half of 60,000 entries."""
    return adapter_of(name, {"m": random_b((20_000, 3), 30_000, seed)}, alpha=alpha, shapes={"m": (20_000, 2)})


LARGE = [large("a", 0), large("b", 1), large("c", 2, alpha=1.5)]


def survivors(one: Adapter, density: float, seed: int = 0) -> torch.Tensor:
    """Return the mask of the entries of B that survive DARE, (D, R) bool."""
    return merge([one], [1], "dare_linear", density=density, seed=seed).modules["m"].mask


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_each_entry_with_the_probability_asked_and_rescales_it(density: float) -> None:
    result = merge([LARGE[0]], [1], "dare_linear", density=density).modules["m"]
    own = LARGE[0].modules["m"].dense(torch.float64)
    assert torch.equal(result.dense(), torch.where(result.mask, own / density, 0.0).float())
    deviation = math.sqrt(30_000 * density * (1 - density))
    assert abs(result.values.numel() - 30_000 * density) < 4 * deviation
    halves = result.mask.flatten().chunk(2)
    assert abs(int(halves[0].sum()) - int(halves[1].sum())) < 5 * deviation


@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_dare_linear_sums_the_surviving_entries(density: float, weights: Sequence[float]) -> None:
    result = merge(LARGE, weights, "dare_linear", density=density, seed=3).modules["m"].dense(torch.float64)
    expected = torch.zeros_like(result)
    for one, weight in zip(LARGE, weights, strict=True):
        own = one.config.scale * one.modules["m"].dense(torch.float64) * survivors(one, density, seed=3)
        expected += weight * own / density
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("weights", WEIGHT_SETS)
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_dare_ties_averages_the_surviving_entries_of_the_elected_sign(
    density: float, weights: Sequence[float], sign: SignMethod
) -> None:
    result = merge(LARGE, weights, "dare_ties", density=density, sign=sign, seed=3).modules["m"].dense(torch.float64)
    pruned = torch.stack(
        [one.config.scale * one.modules["m"].dense(torch.float64) * survivors(one, density, seed=3) / density for one in LARGE]
    )
    votes = (pruned if sign == "total" else pruned.sign()).sum(0)
    agree = pruned * torch.where(votes < 0, -1.0, 1.0) > 0
    weighted = torch.tensor(weights, dtype=torch.float64).view(3, 1, 1) * pruned
    expected = (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_the_draw_depends_on_the_seed_the_content_and_the_module() -> None:
    def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one == other).double().mean())

    shapes = {"m": (20_000, 2), "n": (20_000, 2)}
    modules = {module: SparseB((20_000, 3), torch.arange(60_000).int(), torch.ones(60_000)) for module in shapes}
    one, other = (adapter_of("a", modules, alpha=alpha, shapes=shapes) for alpha in (6.0, 5.0))
    mask = survivors(one, 0.5)
    assert torch.equal(survivors(replace(one, name="b"), 0.5), mask)
    independent = {
        "seed": survivors(one, 0.5, seed=1),
        "content": survivors(other, 0.5),
        "module": merge([one], [1], "dare_linear").modules["n"].mask,
    }
    assert {what: round(agreement(mask, drawn), 1) for what, drawn in independent.items()} == dict.fromkeys(independent, 0.5)


def test_the_draw_is_the_same_in_every_version() -> None:
    b = SparseB((9, 3), torch.arange(27).int(), torch.ones(27))
    drawn = drop_and_rescale(b, 0.5, "7|math|layers.0.q_proj")
    assert drawn.indices.tolist() == [0, 3, 7, 9, 10, 11, 12, 14, 18, 22]
    assert drawn.values.tolist() == [2.0] * 10


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_an_adapter_merges_alike_before_and_after_it_is_saved(tmp_path: Path, method: MergeMethod) -> None:
    adapters = [adapter("a"), adapter("b", 5)]
    saved = [AdapterStore(tmp_path).add(one).load() for one in adapters]
    before, after = merge(adapters, [0.7, 0.5], method), merge(saved, [0.7, 0.5], method)
    assert are_same(before.modules, after.modules)
    assert before.config == after.config


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("terms", ON_SEVERAL.values(), ids=ON_SEVERAL.keys())
def test_only_linear_merges_several_bases(terms: Terms, method: MergeMethod) -> None:
    with pytest.raises(AdapterError, match=rf"^{method} merges adapters on one basis, found .*seed 5, stream 0 of .*'a'"):
        merged(terms, method)


BAD: dict[str, tuple[Sequence[Adapter], Sequence[float], dict[str, Any], str]] = {
    "none": ([], [], {}, "0 weights for 0 adapters"),
    "too few weights": (ADAPTERS[:2], [1], {}, "1 weights for 2 adapters"),
    "too many weights": (ADAPTERS[:1], [1, 2], {}, "2 weights for 1 adapters"),
    "nan": (ADAPTERS[:2], [1, math.nan], {}, "the weight of 'b' is nan, expected finite"),
    "infinity": (ADAPTERS[:2], [-math.inf, 1], {}, "the weight of 'a' is -inf, expected finite"),
    "infinite together": ([ADAPTERS[0]] * 2, [1e308, 1e308], {}, "the weight of 'a' is inf, expected finite"),
    "density 0": (ADAPTERS[:1], [1], {"density": 0}, "density is 0, expected 0 < density <= 1"),
    "density above 1": (ADAPTERS[:1], [1], {"density": 1.01}, "density is 1.01, expected"),
    "density nan": (ADAPTERS[:1], [1], {"density": math.nan}, "density is nan, expected"),
    "method": (ADAPTERS[:1], [1], {"method": "svd"}, "method is 'svd', expected one of linear, ties"),
    "sign": (ADAPTERS[:1], [1], {"sign": "most"}, "sign is 'most', expected one of total, frequency"),
    "base": (
        [adapter("a"), adapter("x", base="c")],
        [1, 0],
        {},
        r"'[ax]' is of a/. \((b|c){12}\), expected a/. ",
    ),
    "shape": (
        [adapter("a"), adapter_of("b", {Q0: random_b((8, 3), 4, 0)}, shapes={Q0: (8, 5)})],
        [1, 1],
        {},
        r"of layers.0.q_proj are \(\d, 5\) in '[ab]', expected \(\d, 5\)",
    ),
    "too large": (ADAPTERS[:2], [1e39, 1], {}, "not finite in float32, in .*layers.0.q_proj"),
    "too large for fp16": (ADAPTERS[:1], [1e6], {"values": "float16"}, "not finite in float16"),
    "too large for int8": (ADAPTERS[:2], [1e308, 1e308], {"values": "int8", "method": "magnitude"}, "not finite in int8"),
}


@pytest.mark.parametrize(("adapters", "weights", "options", "message"), BAD.values(), ids=BAD.keys())
def test_adapters_that_do_not_fit_together_are_refused(
    adapters: Sequence[Adapter], weights: Sequence[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        merge(adapters, weights, **options)


def test_a_rank_that_no_file_may_have_is_refused() -> None:
    shapes = {"m": (2, 2)}
    wide = [
        adapter_of(f"a{stream}", {"m": random_b((2, 4096), 4, 0)}, basis=Seeded(5, stream), shapes=shapes) for stream in range(2)
    ]
    with pytest.raises(AdapterError, match=r"no adapter that can be read: .*4096"):
        merge(wide, [1, 1])


def test_the_config_records_the_origin_of_the_merge() -> None:
    one, other = adapter("a", 3, [Q0, UP0]), adapter("b", 5, [UP0, UP1])
    config = merge([one, other], [0.5, -2], "dare_ties", density=0.25, sign="frequency", seed=9).config
    record = config.lori.training["merge"]
    parents = {parent["name"]: parent["weight"] for parent in record.pop("adapters")}
    assert record == {"method": "dare_ties", "density": 0.25, "sign": "frequency", "seed": 9}
    assert parents == {"a": 0.5, "b": -2.0}
    assert set(config.target_modules) == {Q0, UP0, UP1}
    assert (config.base_model_name_or_path, config.lori.base_digest) == ("a/b", "b" * 64)
    assert merge([one, other], [0.5, -2]).version != config.lori.content_digest[:12]


@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("linear", {"method"}),
        ("magnitude", {"method", "density"}),
        ("ties", {"method", "density", "sign"}),
        ("dare_linear", {"method", "density", "seed"}),
        ("dare_ties", {"method", "density", "sign", "seed"}),
    ],
)
def test_only_options_that_have_an_effect_are_recorded(method: MergeMethod, used: set[str]) -> None:
    assert set(MergeOptions(method).used) == used


TEMPLATES: list[tuple[Sequence[Template], Sequence[Template], set[Template]]] = [
    (("chat", "plain"), ("plain", "chat"), {"chat", "plain"}),
    (("chat", "plain"), ("plain",), {"plain"}),
]


@pytest.mark.parametrize(("one", "other", "shared"), TEMPLATES)
def test_a_merge_has_the_common_templates(one: Sequence[Template], other: Sequence[Template], shared: set[Template]) -> None:
    result = merge([adapter("a", templates=one), adapter("b", templates=other)], [1, 1])
    assert set(result.config.lori.templates) == shared


def test_without_a_common_template_one_must_be_named() -> None:
    # The server refuses such a request. Regression: the merge chose a template by the order of the digests.
    adapters = [adapter("a", templates=("chat",)), adapter("b", templates=("plain",))]
    with pytest.raises(AdapterError, match=r"trained on no common template \(.*a: chat.*\): say which"):
        merge(adapters, [1, 1])
    assert merge(adapters, [1, 1], templates=("plain",)).config.lori.templates == ("plain",)


@pytest.mark.parametrize("terms", [ON_ONE_BASIS["patterns"], *ON_SEVERAL.values()], ids=["one basis", *ON_SEVERAL])
def test_a_merge_can_be_saved_and_read_again(tmp_path: Path, terms: Terms) -> None:
    result = merged(terms, name="mix")
    loaded = AdapterStore(tmp_path).add(result).load()
    assert loaded.basis == result.basis
    assert loaded.config.lori.training == result.config.lori.training
    for module, b in result.modules.items():
        assert is_same(loaded.modules[module], b)
        assert torch.equal(delta(loaded, module), delta(result, module))


def peft_model(folder: Path, adapters: Sequence[Adapter]) -> Any:
    """Return the model with `adapters` as dense LoRA adapters of PEFT, A and B exact in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    configs = {
        one.name: LoraConfig(r=one.config.r, lora_alpha=int(one.config.lora_alpha), target_modules=list(one.modules))
        for one in adapters
    }
    tuner: Any = LoraModel(model, dict(list(configs.items())[:1]), adapters[0].name)
    for one in adapters[1:]:
        tuner.peft_config[one.name] = configs[one.name]
        tuner.inject_adapter(tuner.model, one.name)
    for one in adapters:
        for module, b in one.modules.items():
            layer = tuner.model.get_submodule(module)
            layer.lora_A[one.name].weight.data.copy_(one.basis.draw(module, b.shape[1], layer.in_features))
            layer.lora_B[one.name].weight.data.copy_(b.dense())
    return tuner


def llama_adapter(
    folder: Path, name: str, lasts: Sequence[str], rank: int, alpha: float, basis: Basis, seed: int
) -> tuple[Adapter, list[str]]:
    """Return a random adapter for the modules of `folder`'s model with a last name part in `lasts`, and these modules' names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shapes = {module: shape for module, shape in module_shapes(model).items() if module.rpartition(".")[2] in lasts}
    modules = {module: random_b((shape[0], rank), shape[0], seed + i) for i, (module, shape) in enumerate(shapes.items())}
    return adapter_of(name, modules, alpha=alpha, basis=basis, shapes=shapes), list(shapes)


def peft_delta(model: Any, name: str, module: str) -> torch.Tensor:
    weight: torch.Tensor = model.model.get_submodule(module).get_delta_weight(name)
    return weight.detach().double()


@pytest.mark.parametrize("other", [ONE, OTHER], ids=["one basis", "two bases"])
def test_linear_is_peft_s_cat(tiny_model: Path, other: Basis) -> None:
    made = [
        llama_adapter(tiny_model, "math", ["q_proj", "down_proj"], 3, 6.0, ONE, 0),
        llama_adapter(tiny_model, "safety", ["q_proj", "down_proj"], 5, 4.0, other, 100),
        llama_adapter(tiny_model, "intent", ["down_proj", "v_proj"], 8, 8.0, ONE, 200),
    ]
    adapters, weights = [one for one, _ in made], [0.7, 0.5, 1.3]
    model = peft_model(tiny_model, adapters)
    model.add_weighted_adapter([one.name for one in adapters], weights, "cat", combination_type="cat")
    result = merge(adapters, weights)
    assert set(result.modules) == {module for _, modules in made for module in modules}
    for module in result.modules:
        torch.testing.assert_close(delta(result, module), peft_delta(model, "cat", module), rtol=1e-5, atol=1e-6)


def test_peft_s_linear_doubles_a_sum_on_one_basis(tiny_model: Path) -> None:
    # PEFT adds the A's too: (A + A)(B1 + B2) instead of A (B1 + B2). So PEFT's linear is no oracle for ours.
    made = [llama_adapter(tiny_model, name, ["q_proj"], 4, 4.0, ONE, seed) for name, seed in (("math", 0), ("safety", 100))]
    adapters = [one for one, _ in made]
    model = peft_model(tiny_model, adapters)
    model.add_weighted_adapter(["math", "safety"], [1.0, 1.0], "sum", combination_type="linear")
    result = merge(adapters, [1, 1])
    for module in result.modules:
        torch.testing.assert_close(2 * delta(result, module), peft_delta(model, "sum", module), rtol=1e-5, atol=1e-6)
