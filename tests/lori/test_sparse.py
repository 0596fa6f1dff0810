"""A sparse B."""

import pytest
import torch

from lori.sparse import SparseB

ODD_SHAPES = [(1, 1), (1, 7), (1, 8), (3, 3), (5, 13), (9, 16), (129, 3)]
INT = torch.int32


def random_mask(shape: tuple[int, int], density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape[0] * 1000 + shape[1])) < density


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_dense_has_the_entries_and_zeros_elsewhere(shape: tuple[int, int], density: float) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = random_mask(shape, density)
    b = SparseB.from_dense(dense, mask)
    assert b.shape == shape
    assert b.values.shape == b.indices.shape == (int(mask.sum()),)
    assert torch.equal(b.mask, mask)
    assert torch.equal(b.dense(), torch.where(mask, dense, 0.0))
    assert torch.equal(b.rows, mask.nonzero()[:, 0])
    assert b.density == mask.double().mean()


def test_a_strided_b_is_stored_by_value() -> None:
    dense, mask = torch.randn(5, 13), random_mask((5, 13))
    ours, theirs = SparseB.from_dense(dense.T, mask.T), SparseB.from_dense(dense.T.contiguous(), mask.T.contiguous())
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.values, theirs.values)


def test_values_are_in_row_major_order() -> None:
    b = SparseB.from_dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[False, True], [True, False]]))
    assert b.indices.tolist() == [1, 2]
    assert b.values.tolist() == [2.0, 3.0]


def test_dense_has_the_requested_dtype() -> None:
    b = SparseB((1, 2), torch.tensor([0], dtype=INT), torch.tensor([1.5], dtype=torch.bfloat16))
    assert b.dense().dtype == torch.float32
    assert torch.equal(b.dense(torch.float64), torch.tensor([[1.5, 0.0]], dtype=torch.float64))


def test_from_dense_of_a_parameter_holds_no_graph() -> None:
    b = SparseB.from_dense(torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2, dtype=torch.bool))
    assert not b.values.requires_grad


def test_memory_is_positions_and_values() -> None:
    b = SparseB((100, 10), torch.arange(100, dtype=INT), torch.ones(100, dtype=torch.bfloat16))
    assert b.num_bytes == 100 * (4 + 2)


@pytest.mark.parametrize(
    ("indices", "values"),
    [
        (torch.arange(4), torch.ones(4)),
        (torch.arange(4, dtype=INT), torch.ones(3)),
        (torch.arange(4, dtype=INT).view(2, 2), torch.ones(2, 2)),
    ],
    ids=["indices of 64 bits", "a value too few", "indices not flat"],
)
def test_indices_and_values_that_do_not_fit_fail_an_assertion(indices: torch.Tensor, values: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        SparseB((4, 4), indices, values)
