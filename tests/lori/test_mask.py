"""The global top-k mask."""

import pytest
import torch

from lori.errors import MaskError
from lori.mask import GRANULARITIES, Granularity, group_of, mask_nnz, top_k_mask

SHAPES = {"b": (7, 3), "a": (1, 5), "c": (4, 4)}  # not in alphabetical order on purpose
NUM_ENTRIES = 42


def random_deltas(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def total(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize(
    ("num_entries", "sparsity", "expected"),
    [(100, 0.9, 10), (10, 0.9, 1), (42, 0.5, 21), (42, 0.0, 42), (3, 0.9, 1), (1, 0.99, 1), (7, 0.1, 6), (1000, 0.999, 1)],
)
def test_mask_nnz(num_entries: int, sparsity: float, expected: int) -> None:
    assert mask_nnz(num_entries, sparsity) == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exactly_k_of_random_entries_survive(sparsity: float, seed: int) -> None:
    assert total(top_k_mask(random_deltas(seed), sparsity)) == mask_nnz(NUM_ENTRIES, sparsity)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_ties_go_to_the_first_positions_in_module_order(value: float, sparsity: float) -> None:
    deltas = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    masks = top_k_mask(deltas, sparsity)
    flat = torch.cat([masks[name].flatten() for name in SHAPES])
    nnz = mask_nnz(NUM_ENTRIES, sparsity)
    assert flat.tolist() == [True] * nnz + [False] * (NUM_ENTRIES - nnz)


def test_ties_at_the_threshold_only() -> None:
    masks = top_k_mask({"a": torch.tensor([[1.0, 3.0, 1.0]]), "b": torch.tensor([[-1.0, 0.5, 2.0]])}, 0.5)
    assert masks["a"].tolist() == [[True, True, False]]
    assert masks["b"].tolist() == [[False, False, True]]


def test_one_threshold_for_all_modules() -> None:
    deltas = {"small": torch.full((4, 5), 0.1), "large": torch.full((2, 5), 10.0), "mid": torch.full((2, 5), -1.0)}
    masks = top_k_mask(deltas, 0.5)  # 20 of 40: all of the two larger modules, none of the small one
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 0, "large": 10, "mid": 10}


def test_kept_entries_are_larger_than_dropped_ones() -> None:
    deltas = random_deltas()
    masks = top_k_mask(deltas, 0.7)
    flat = torch.cat([deltas[name].flatten().abs() for name in SHAPES])
    keep = torch.cat([masks[name].flatten() for name in SHAPES])
    assert flat[keep].min() > flat[~keep].max()


def test_sparsity_zero_keeps_all() -> None:
    assert all(mask.all() for mask in top_k_mask(random_deltas(), 0.0).values())


def test_masks_have_the_shapes_and_names_of_the_deltas() -> None:
    masks = top_k_mask(random_deltas(), 0.5)
    assert {name: (tuple(mask.shape), mask.dtype) for name, mask in masks.items()} == {
        name: (shape, torch.bool) for name, shape in SHAPES.items()
    }
    assert list(masks) == list(SHAPES)


def test_parameters_and_strided_deltas_are_read_by_value() -> None:
    deltas = random_deltas()
    strided = {name: torch.nn.Parameter(delta.T.contiguous().T) for name, delta in deltas.items()}
    expected = top_k_mask(deltas, 0.6)
    assert all(torch.equal(mask, expected[name]) for name, mask in top_k_mask(strided, 0.6).items())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_an_unsound_sparsity_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= sparsity < 1"):
        top_k_mask(random_deltas(), sparsity)


# --- granularities (as the reference's extract_mask.py groups them)

NAMES = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("granularity", "num_groups"), [("model", 1), ("module", 2), ("layer", 3), ("projection", 3), ("matrix", 9)]
)
def test_each_group_keeps_its_own_largest(granularity: Granularity, num_groups: int) -> None:
    g = torch.Generator().manual_seed(0)
    deltas = {name: torch.randn(5 + i % 3, 4, generator=g) * 10**i for i, name in enumerate(NAMES)}
    masks = top_k_mask(deltas, 0.75, granularity)
    assert list(masks) == NAMES
    groups: dict[str, list[str]] = {}
    for name in NAMES:
        groups.setdefault(group_of(name, granularity), []).append(name)
    assert len(groups) == num_groups
    for members in groups.values():
        kept = torch.cat([deltas[name][masks[name]].abs() for name in members])
        dropped = torch.cat([deltas[name][~masks[name]].abs() for name in members])
        assert len(kept) == mask_nnz(len(kept) + len(dropped), 0.75)
        assert kept.min() >= dropped.max()


@pytest.mark.parametrize(
    ("granularity", "group"),
    [("model", ""), ("module", "self_attn"), ("layer", "model.layers.12"), ("projection", "q_proj"), ("matrix", None)],
)
def test_a_group_is_named_by_the_common_part_of_its_modules(granularity: Granularity, group: str | None) -> None:
    module = "model.layers.12.self_attn.q_proj"
    assert group_of(module, granularity) == (module if group is None else group)


def test_a_name_without_a_number_is_one_layer() -> None:
    assert group_of("encoder.dense.up_proj", "layer") == ""
    assert group_of("encoder.dense.up_proj", "module") == "encoder.dense"
    assert set(GRANULARITIES) == {"model", "module", "layer", "projection", "matrix"}


def test_avoided_entries_are_never_kept_and_the_count_stays() -> None:
    deltas = random_deltas()
    avoided = {name: delta.abs() > 0.8 for name, delta in deltas.items()}
    masks = top_k_mask(deltas, 0.75, avoided=avoided)
    assert total(masks) == mask_nnz(NUM_ENTRIES, 0.75)
    assert not any((masks[name] & avoided[name]).any() for name in masks)
    free = torch.cat([deltas[name].abs()[~avoided[name]] for name in SHAPES])
    kept = torch.cat([deltas[name].abs()[masks[name]] for name in SHAPES])
    assert kept.min() >= free.sort(descending=True).values[total(masks) - 1]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_too_few_entries_that_are_not_avoided_are_refused(granularity: Granularity) -> None:
    deltas = {"model.layers.0.self_attn.q_proj": torch.ones(4, 5), "model.layers.0.mlp.up_proj": torch.ones(4, 5)}
    avoided = {name: torch.arange(20).view(4, 5) >= 2 for name in deltas}
    assert total(top_k_mask(deltas, 0.9, granularity, avoided)) == 4
    with pytest.raises(MaskError, match="raise sparsity or avoid fewer adapters"):
        top_k_mask(deltas, 0.7, granularity, avoided)
