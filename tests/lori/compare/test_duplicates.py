"""Near duplicates among many adapters: only the planted ones are found, and the sketch stays within its error bound."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.compare import duplicates
from lori.compare.duplicates import MARGIN, NUM_BUCKETS, Duplicate, near_duplicates, sketch
from lori.compare.pairs import compare
from lori.sparse import SparseB
from tests.lori.adapters import make_adapter, make_config

SHAPES = {"layers.0.q_proj": (24, 20), "layers.0.up_proj": (40, 20), "layers.1.q_proj": (24, 20), "layers.1.up_proj": (40, 20)}
BASIS = Seeded(seed=3, stream=0)
OTHER = Seeded(seed=3, stream=1)


def random_adapter(seed: int, rank: int = 4, alpha: float = 6.0, basis: Seeded = BASIS) -> Adapter:
    return make_adapter(f"r{seed}", SHAPES, rank=rank, alpha=alpha, basis=basis, seed=seed)


def with_values(adapter: Adapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    modules = {module: SparseB(b.shape, b.indices, change(b.values)) for module, b in adapter.modules.items()}
    return replace(adapter, modules=modules)


def noisy(adapter: Adapter, noise: float, seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return with_values(adapter, lambda values: values + noise * torch.randn(values.shape, generator=g))


def padded(adapter: Adapter, rank: int) -> Adapter:
    """Return an adapter of a larger rank with the same alpha / r and the same delta."""
    modules = {}
    for module, b in adapter.modules.items():
        indices = b.rows * rank + b.indices.long() % b.shape[1]
        modules[module] = SparseB((b.shape[0], rank), indices.int(), b.values)
    config = make_config(SHAPES, rank=rank, alpha=adapter.config.scale * rank, basis=BASIS)
    return replace(adapter, config=config, modules=modules)


def copied_basis(adapter: Adapter) -> Adapter:
    basis = Explicit.from_tensors({module: adapter.basis.draw(module, 4, SHAPES[module][1]) for module in adapter.modules})
    return replace(adapter, basis=basis)


def found_pairs(adapters: dict[str, Adapter], threshold: float = 0.95) -> dict[tuple[str, str], float]:
    pairs = near_duplicates({name: partial(adapters.__getitem__, name) for name in adapters}, threshold)
    return {(duplicate.a, duplicate.b): duplicate.cosine for duplicate in pairs}


@pytest.fixture(scope="module")
def strangers() -> dict[str, Adapter]:
    """Return 60 random adapters on two bases, with two ranks."""
    return {f"r{i}": random_adapter(i, (4, 6)[i % 2], basis=(BASIS, OTHER)[i // 30]) for i in range(60)}


@pytest.mark.parametrize(("block", "group"), [(512, 16), (7, 1)])
def test_planted_copies_are_found_and_nothing_else(
    strangers: dict[str, Adapter], block: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    monkeypatch.setattr(duplicates, "GROUP", group)
    source = strangers["r8"]
    planted = {
        "copy": source,
        "scaled": with_values(source, lambda values: 0.01 * values),
        "noisy": noisy(source, 0.1),
        "ranked": padded(source, 9),
        "explicit": copied_basis(source),
        "negated": with_values(source, torch.neg),
        "too noisy": noisy(source, 0.6),
        "on another basis": replace(source, basis=OTHER),
        "of another base model": replace(source, config=make_config(SHAPES, rank=4, basis=BASIS, base_digest="c" * 64)),
    }
    cosines = found_pairs(strangers | planted)
    alike = ["r8", "copy", "scaled", "noisy", "ranked", "explicit"]
    assert cosines.keys() == {(a, b) for i, a in enumerate(alike) for b in alike[i + 1 :]}
    everything = strangers | planted
    for (a, b), cosine in cosines.items():
        assert cosine == pytest.approx(compare(everything[a], everything[b]).total.cosine, abs=1e-12)
    assert cosines["r8", "noisy"] < 0.9999
    assert cosines["r8", "scaled"] == pytest.approx(1.0, abs=1e-6)


def test_pairs_come_in_the_order_of_the_entries() -> None:
    a, b = random_adapter(1), random_adapter(2)
    names = {"z": a, "y": b, "x": a, "w": b, "v": a}
    assert list(found_pairs(names)) == [("z", "x"), ("z", "v"), ("y", "w"), ("x", "v")]


@pytest.mark.parametrize("noise", [0.2, 0.3, 0.4, 0.6])
def test_the_threshold_is_that_of_the_exact_cosine(noise: float) -> None:
    adapters = {"a": random_adapter(1), "b": noisy(random_adapter(1), noise)}
    cosine = compare(adapters["a"], adapters["b"]).total.cosine
    assert cosine is not None
    assert found_pairs(adapters, cosine - 1e-6) == {("a", "b"): pytest.approx(cosine)}
    assert found_pairs(adapters, cosine + 1e-6) == {}


def test_a_copy_is_found_at_the_highest_threshold() -> None:
    adapter = random_adapter(1, rank=7)
    assert found_pairs({"a": adapter, "b": adapter}, 1.0) == {("a", "b"): pytest.approx(1.0)}


def test_deltas_are_compared_not_the_entries_of_b() -> None:
    """If two rows of A are almost equal, disjoint masks give almost the same delta."""
    row = torch.rand(1, 20, generator=torch.Generator().manual_seed(0))
    basis = Explicit.from_tensors({"layers.0.q_proj": torch.cat([row, 1.01 * row])})
    values = torch.randn(24, generator=torch.Generator().manual_seed(1))
    left, right = (
        replace(
            make_adapter("x", SHAPES, rank=2),
            modules={"layers.0.q_proj": SparseB((24, 2), 2 * torch.arange(24, dtype=torch.int32) + column, values)},
            basis=basis,
        )
        for column in (0, 1)
    )
    assert found_pairs({"left": left, "right": right}) == {("left", "right"): pytest.approx(1.0, abs=1e-6)}


def test_adapters_without_a_delta_are_no_duplicates() -> None:
    empty = with_values(random_adapter(1), torch.zeros_like)
    assert found_pairs({"a": empty, "b": empty, "c": random_adapter(1)}, 0.01) == {}


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_adapters_have_no_duplicates(count: int) -> None:
    assert near_duplicates({f"r{i}": lambda: random_adapter(0) for i in range(count)}) == []


def test_only_candidates_are_loaded_again(strangers: dict[str, Adapter]) -> None:
    loads: Counter[str] = Counter()

    def loader(name: str, adapter: Adapter) -> Callable[[], Adapter]:
        def load() -> Adapter:
            loads[name] += 1
            return adapter

        return load

    entries = {name: loader(name, adapter) for name, adapter in (strangers | {"copy": strangers["r8"]}).items()}
    (duplicate,) = near_duplicates(entries)
    assert duplicate == Duplicate("r8", "copy", duplicate.cosine)
    assert loads == dict.fromkeys(strangers, 1) | {"r8": 2, "copy": 2}


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold is .*, expected 0 < threshold <= 1"):
        near_duplicates({}, threshold)


def cosine_of_sketches(a: Adapter, b: Adapter) -> float:
    one, two = sketch(a).astype(np.float64), sketch(b).astype(np.float64)
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0])
def test_the_sketch_estimates_the_cosine_within_the_margin(noise: float) -> None:
    errors = []
    for seed in range(20):
        a = random_adapter(seed)
        b = noisy(a, noise, seed)
        errors.append(cosine_of_sketches(a, b) - (compare(a, b).total.cosine or 0.0))
    assert np.abs(errors).max() < MARGIN
    assert np.sqrt(np.mean(np.square(errors))) < 1.5 / np.sqrt(NUM_BUCKETS)


def test_deltas_of_one_sign_that_share_no_entry_have_unlike_sketches() -> None:
    shapes = {"layers.0.q_proj": (4000, 5), "layers.0.up_proj": (4000, 5)}
    a = make_adapter("a", shapes, rank=1)
    b = SparseB((4000, 1), torch.arange(4000, dtype=torch.int32), torch.ones(4000))
    left, right = (replace(a, modules={module: b}) for module in shapes)
    assert abs(cosine_of_sketches(left, right)) < MARGIN


def test_the_norm_of_the_sketch_is_that_of_the_delta() -> None:
    ratios = []
    for seed in range(20):
        a = random_adapter(seed, rank=5, alpha=3.0)
        ratios.append(float(np.square(sketch(a), dtype=np.float64).sum()) / compare(a, a).total.square_a)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.02)
    assert np.abs(np.array(ratios) - 1).max() < 2 * MARGIN


def test_the_sketch_is_linear() -> None:
    a = random_adapter(1)
    np.testing.assert_allclose(sketch(with_values(a, lambda values: -2 * values)), -2 * sketch(a), rtol=1e-5, atol=1e-6)


def test_one_b_on_two_bases_or_in_two_modules_has_unlike_sketches() -> None:
    a = random_adapter(1)
    first, second, *_ = a.modules
    moved = [replace(a, modules={module: a.modules[first]}) for module in (first, "layers.1.q_proj")]
    assert second != "layers.1.q_proj"
    assert abs(cosine_of_sketches(a, replace(a, basis=OTHER))) < MARGIN
    assert abs(cosine_of_sketches(*moved)) < 2 * MARGIN


def test_the_sketch_is_a_row_of_fp64() -> None:
    out = sketch(random_adapter(1))
    assert out.shape == (NUM_BUCKETS,)
    assert out.dtype == np.float64
    assert np.isfinite(out).all()


@pytest.mark.parametrize("alpha", [1e-9, 1e9])
def test_copies_of_a_tiny_or_a_huge_delta_are_found(alpha: float) -> None:
    # Regression: neither norm fits into fp32, and the copies were not found.
    a = make_adapter("a", alpha=alpha)
    assert [(pair.a, pair.b) for pair in near_duplicates({"a": lambda: a, "b": lambda: a})] == [("a", "b")]
