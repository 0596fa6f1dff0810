"""Merges: `linear` adds exactly the deltas of its adapters, and neither their order nor a save changes a bit."""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lori.adapter import Adapter
from lori.basis import Basis, Explicit
from lori.config import UNSEALED
from lori.errors import AdapterError, MergeCancelledError
from lori.merge import MergeMethod, blocks_of_layers, merge
from lori.merge_options import MERGE_METHODS
from lori.sparse import VALUE_TYPES, SparseB, ValueType, rounded
from lori.store.store import AdapterStore
from tests.lori.merges import (
    ADAPTERS,
    ON_ONE_BASIS,
    ON_SEVERAL,
    ONE,
    OTHER,
    OWN,
    Q0,
    Q1,
    SHAPES,
    UP0,
    UP1,
    Terms,
    adapter,
    adapter_of,
    delta,
    merged,
    mixed_ranks,
    random_b,
)


def folded(terms: Terms, module: str) -> torch.Tensor:
    """Return the weighted sum of the adapters' deltas to the weight of `module`, (D, N) fp64."""
    having = [(adapter, weight) for adapter, weight in terms if module in adapter.modules]
    return torch.stack([weight * delta(adapter, module) for adapter, weight in having]).sum(0)


def is_same(one: SparseB, other: SparseB) -> bool:
    """Return whether two B's are bit-identical."""
    bits = [b.values.contiguous().view(torch.uint8) for b in (one, other)]
    return one.shape == other.shape and torch.equal(one.indices, other.indices) and torch.equal(*bits)


def are_same(one: Mapping[str, SparseB], other: Mapping[str, SparseB]) -> bool:
    return list(one) == list(other) and all(is_same(one[module], other[module]) for module in one)


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


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_an_adapter_merges_alike_before_and_after_it_is_saved(tmp_path: Path, method: MergeMethod) -> None:
    adapters = [adapter("a"), adapter("b", 5)]
    saved = [AdapterStore(tmp_path).add(one).load() for one in adapters]
    before, after = merge(adapters, [0.7, 0.5], method), merge(saved, [0.7, 0.5], method)
    assert are_same(before.modules, after.modules)
    assert before.config == after.config


@pytest.mark.parametrize("terms", [ON_ONE_BASIS["patterns"], *ON_SEVERAL.values()], ids=["one basis", *ON_SEVERAL])
def test_a_merge_can_be_saved_and_read_again(tmp_path: Path, terms: Terms) -> None:
    result = merged(terms, name="mix")
    loaded = AdapterStore(tmp_path).add(result).load()
    assert loaded.basis == result.basis
    assert loaded.config.lori.training == result.config.lori.training
    for module, b in result.modules.items():
        assert is_same(loaded.modules[module], b)
        assert torch.equal(delta(loaded, module), delta(result, module))


def blocks_of(adapter: Adapter, weights: tuple[float, float]) -> Mapping[str, float]:
    """Return the factor of each module of an adapter for two blocks of layers."""
    layers = sorted({module.split(".")[1] for module in adapter.modules})
    return {module: weights[2 * layers.index(module.split(".")[1]) // len(layers)] for module in adapter.modules}


@pytest.mark.parametrize("terms", LINEAR, ids=LINEAR_IDS)
def test_block_weights_are_factors_in_the_layers_of_the_adapter(terms: Terms) -> None:
    adapters, weights = zip(*terms, strict=True)
    blocks = [(0.5, -2.0) if i == 0 else () for i in range(len(terms))]
    result = merge(adapters, weights, block_weights=blocks)
    factors = blocks_of(adapters[0], (0.5, -2.0))
    for module in result.modules:
        scaled = [(one, weight * (factors.get(module, 1.0) if i == 0 else 1.0)) for i, (one, weight) in enumerate(terms)]
        torch.testing.assert_close(delta(result, module), folded(scaled, module), rtol=1e-6, atol=1e-6)
    turned = merge(adapters[::-1], weights[::-1], block_weights=blocks[::-1])
    assert are_same(result.modules, turned.modules)
    same = merge(adapters, weights, block_weights=[(1.0, 1.0, 1.0) for _ in terms])
    assert are_same(same.modules, merged(terms).modules)


def test_blocks_do_not_move_beside_another_adapter() -> None:
    """Regression: the layers of all adapters were divided, so an adapter of weight 0 did not move them, and one of 1e-9 did."""
    late, both = adapter("late", modules=(Q1, UP1)), adapter("both")
    alone = merge([late], [1.0], block_weights=[(0.5, 2.0)])
    beside = merge([late, both], [1.0, 1e-12], block_weights=[(0.5, 2.0), ()])
    for module in (Q1, UP1):
        torch.testing.assert_close(delta(beside, module), delta(alone, module), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 7, 25, 100])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 100])
def test_blocks_are_of_about_equal_length(num_layers: int, num_blocks: int) -> None:
    by_layer = blocks_of_layers(tuple(f"layers.{i}.q_proj" for i in range(num_layers)), num_blocks)
    blocks = [*by_layer.values()]
    assert [*by_layer] == [f"layers.{i}" for i in range(num_layers)]
    assert blocks == sorted(blocks)
    counts = Counter(blocks).values()
    assert max(counts) - min(counts) <= 1
    if num_layers >= num_blocks:
        assert len(counts) == num_blocks


def test_an_adapter_named_twice_with_other_block_weights_counts_twice() -> None:
    one = adapter("a")
    twice = merge([one, one], [1.0, 1.0], block_weights=[(1.0, 0.0), (0.0, 1.0)])
    assert are_same(twice.modules, merge([one], [1.0], block_weights=[(1.0, 1.0)]).modules)


def test_an_adapter_of_block_weights_0_does_not_count() -> None:
    result = merge([adapter("a"), adapter("b", basis=OTHER)], [1.0, 1.0], block_weights=[(), (0.0, 0.0)])
    assert result.basis == ONE
    assert are_same(result.modules, adapter("a").modules)


def test_unsound_block_weights_are_refused() -> None:
    [terms, *_] = ON_ONE_BASIS.values()
    adapters, weights = zip(*terms, strict=True)
    with pytest.raises(AdapterError, match="lists of block weights for"):
        merge(adapters, weights, block_weights=[()] * (len(adapters) + 1))
    with pytest.raises(AdapterError, match="a block weight is not finite"):
        merge(adapters, weights, block_weights=[(math.nan,)] * len(adapters))
    with pytest.raises(AdapterError, match="block weights are for linear merges, found ties"):
        merge(adapters, weights, "ties", block_weights=[(1.0,)] * len(adapters))


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_an_unsealed_merge_differs_only_in_its_digests(method: MergeMethod) -> None:
    terms = ON_ONE_BASIS["three ranks"]
    sealed, unsealed = merged(terms, method), merged(terms, method, is_sealed=False)
    assert are_same(sealed.modules, unsealed.modules)
    assert unsealed.config.lori.content_digest == UNSEALED
    digests = {"lori": {"content_digest", "config_digest"}}
    assert unsealed.config.model_dump(exclude=digests) == sealed.config.model_dump(exclude=digests)
    with pytest.raises(AssertionError, match="told apart by their digests"):
        merge([unsealed, adapter("d")], [1, 1])
