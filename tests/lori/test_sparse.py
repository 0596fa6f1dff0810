"""A sparse B and its bitmap."""

import pytest
import torch

from lori.sparse import SparseB, pack_mask, unpack_mask

ODD_SHAPES = [(1, 1), (1, 7), (1, 8), (3, 3), (5, 13), (9, 16), (129, 3)]


def random_mask(shape: tuple[int, int], density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(shape[0] * 1000 + shape[1])) < density


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_mask_comes_back(shape: tuple[int, int], density: float) -> None:
    mask = random_mask(shape, density)
    bitmap = pack_mask(mask)
    assert bitmap.dtype == torch.uint8
    assert bitmap.shape == ((shape[0] * shape[1] + 7) // 8,)
    back = unpack_mask(bitmap, shape)
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)


def test_the_bitmap_is_row_major_lowest_bit_first() -> None:
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 4] = mask[1, 3] = mask[2, 4] = True  # bits 0, 4, 8 and 14
    assert pack_mask(mask).tolist() == [0b0001_0001, 0b0100_0001]


def test_a_strided_mask_packs_as_it_reads() -> None:
    mask = random_mask((5, 13))
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))


def test_bits_past_the_last_entry_are_ignored() -> None:
    mask = random_mask((3, 3))
    bitmap = pack_mask(mask)
    bitmap[-1] |= 0b1111_1110
    assert torch.equal(unpack_mask(bitmap, (3, 3)), mask)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_dense_has_the_kept_entries_and_zeros(shape: tuple[int, int], density: float) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = random_mask(shape, density)
    b = SparseB.from_dense(dense, mask)
    assert b.values.shape == (int(mask.sum()),)
    assert torch.equal(b.dense(), torch.where(mask, dense, 0.0))


def test_values_are_in_row_major_order() -> None:
    b = SparseB.from_dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[False, True], [True, False]]))
    assert b.values.tolist() == [2.0, 3.0]


def test_dense_takes_the_dtype_that_is_asked_for() -> None:
    b = SparseB(torch.tensor([[True, False]]), torch.tensor([1.5], dtype=torch.bfloat16))
    assert b.dense().dtype == torch.float32
    assert torch.equal(b.dense(torch.float64), torch.tensor([[1.5, 0.0]], dtype=torch.float64))


def test_from_dense_of_a_parameter_holds_no_graph() -> None:
    b = SparseB.from_dense(torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2, dtype=torch.bool))
    assert not b.values.requires_grad


@pytest.mark.parametrize(
    ("mask", "values"),
    [
        (torch.ones(2, 2), torch.ones(4)),
        (torch.ones(4, dtype=torch.bool), torch.ones(4)),
        (torch.ones(2, 2, dtype=torch.bool), torch.ones(3)),
        (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2)),
    ],
    ids=["mask of floats", "flat mask", "a value too few", "values not packed"],
)
def test_parts_that_do_not_fit_are_our_own_mistake(mask: torch.Tensor, values: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        SparseB(mask, values)
