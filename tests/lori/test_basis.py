"""The frozen A: its random stream, its digest, and explicit bases."""

import hashlib
import tracemalloc

import numpy as np
import pytest
import torch

from lori.basis import GENERATOR, PIECE, Explicit, Seeded

# Checked once against a Philox4x64-10 written from its paper (Salmon et al. 2011), with key and mapping as in lori/basis.
GOLDEN_VALUES = {
    (0, 0, "q_proj", 2, 5): [
        "-0x1.349588p-3", "-0x1.b170e0p-4", "0x1.7bb2f8p-2", "-0x1.810758p-3", "-0x1.ed4228p-3",
        "-0x1.5da4d2p-4", "-0x1.412ae8p-4", "-0x1.103352p-2", "0x1.a95e1ap-2", "-0x1.b227ccp-2",
    ],
    (7, 2, "model.layers.0.mlp.up_proj", 1, 9): [
        "-0x1.9e8a7ep-3", "-0x1.fd5e56p-8", "-0x1.49204ap-2", "-0x1.06b880p-7", "-0x1.1cde7ap-2",
        "0x1.0169d4p-2", "0x1.37d190p-4", "-0x1.68bb32p-3", "-0x1.043e62p-3",
    ],
}  # fmt: skip
GOLDEN_SHAPES = {"a": (2, 3), "b.c": (5, 7), "model.layers.1.self_attn.k_proj": (8, 48)}
GOLDEN_DIGEST = "871a0de9099d3f60a1fa5e2fde086b0461b6d3a8c3c20864dd4404a85453058e"


@pytest.mark.parametrize("drawn_from", GOLDEN_VALUES)
def test_values_are_the_same_for_ever(drawn_from: tuple[int, int, str, int, int]) -> None:
    seed, stream, module, rank, num_inputs = drawn_from
    drawn = Seeded(seed, stream).draw(module, rank, num_inputs)
    assert drawn.flatten().tolist() == [float.fromhex(value) for value in GOLDEN_VALUES[drawn_from]]


def test_digest_is_the_same_for_ever() -> None:
    assert Seeded().digest(GOLDEN_SHAPES) == GOLDEN_DIGEST


def test_digest_does_not_depend_on_the_order_of_modules() -> None:
    assert Seeded().digest(dict(reversed(GOLDEN_SHAPES.items()))) == GOLDEN_DIGEST


@pytest.mark.parametrize(
    ("basis", "shapes"),
    [
        (Seeded(seed=1), GOLDEN_SHAPES),
        (Seeded(stream=1), GOLDEN_SHAPES),
        (Seeded(), GOLDEN_SHAPES | {"a": (3, 3)}),
        (Seeded(), GOLDEN_SHAPES | {"a": (2, 4)}),
        (Seeded(), {name: shape for name, shape in GOLDEN_SHAPES.items() if name != "a"}),
        (Seeded(), {name.replace("a", "z", 1): shape for name, shape in GOLDEN_SHAPES.items()}),
    ],
)
def test_digest_changes_with_the_basis_and_the_shapes(basis: Seeded, shapes: dict[str, tuple[int, int]]) -> None:
    assert basis.digest(shapes) != GOLDEN_DIGEST


@pytest.mark.parametrize(("rank", "num_inputs"), [(1, 1), (1, 7), (3, 5), (7, 1), (8, 48), (5, 129)])
def test_shape_and_dtype(rank: int, num_inputs: int) -> None:
    drawn = Seeded().draw("m", rank, num_inputs)
    assert drawn.shape == (rank, num_inputs)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("count", [2 * PIECE, 2 * PIECE + 1, 2 * PIECE - 1])
def test_an_a_of_several_pieces_is_one_stream(count: int) -> None:
    (whole,) = Seeded().draw("m", 1, count)
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(f"{GENERATOR}|0|0|m".encode()).digest()[:16], "little"))
    halves = words.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count] >> 8
    expected = ((halves.astype(np.float64) + 0.5) * 2.0**-23 - 1.0) / np.sqrt(count)
    assert np.array_equal(whole.numpy(), expected.astype(np.float32))


def test_drawing_takes_little_more_memory_than_a_itself() -> None:
    """Regression: a file of 4 KB can name an A of 2**26 entries a module. Drawing it took 1.9 GB, seven times A's size."""
    tracemalloc.start()
    try:
        Seeded().digest({"m": (16, PIECE)})
        num_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes < 1.5 * 16 * PIECE * 4


@pytest.mark.parametrize("num_inputs", [1, 5, 48, 63])
@pytest.mark.parametrize("rank", [1, 2, 7, 8])
def test_a_smaller_rank_is_the_first_rows_of_a_larger_one(rank: int, num_inputs: int) -> None:
    basis = Seeded(seed=3)
    assert torch.equal(basis.draw("m", rank, num_inputs), basis.draw("m", 11, num_inputs)[:rank])


@pytest.mark.parametrize(
    ("other", "module"),
    [(Seeded(seed=1), "m"), (Seeded(stream=1), "m"), (Seeded(), "n"), (Seeded(seed=2**63 - 1), "m"), (Seeded(seed=11), "m")],
)
def test_another_seed_stream_or_module_is_another_basis(other: Seeded, module: str) -> None:
    assert not (other.draw(module, 4, 16) == Seeded().draw("m", 4, 16)).any()


def test_seed_and_stream_are_not_confused() -> None:
    assert not torch.equal(Seeded(1, 11).draw("m", 2, 8), Seeded(11, 1).draw("m", 2, 8))
    assert not torch.equal(Seeded(1, 11).draw("m", 2, 8), Seeded(11, 11).draw("m", 2, 8))


@pytest.mark.parametrize("num_inputs", [5, 48, 576])
def test_entries_fill_the_bound_uniformly(num_inputs: int) -> None:
    bound = num_inputs**-0.5
    drawn = Seeded(seed=1).draw("m", 20_000 // num_inputs, num_inputs).double()
    assert drawn.abs().max() <= bound * (1 + 2**-23)
    assert drawn.max() > 0.99 * bound
    assert drawn.min() < -0.99 * bound
    # The variance of a uniform in ±b is b²/3; its mean of 20,000 entries is within 4 standard errors of zero.
    assert drawn.var().item() == pytest.approx(bound**2 / 3, rel=0.03)
    assert abs(drawn.mean().item()) < 4 * bound / (3 * drawn.numel()) ** 0.5


def test_two_streams_are_nearly_orthogonal() -> None:
    num_inputs = 1024
    rows = torch.cat([Seeded(seed=4, stream=stream).draw("m", 16, num_inputs) for stream in range(3)]).double()
    rows /= rows.norm(dim=1, keepdim=True)
    between = (rows @ rows.T - torch.eye(len(rows))).abs()
    # A cosine of independent rows has standard deviation 1 / sqrt(N); 1,128 pairs stay within 5 of them.
    assert between.max() < 5 * num_inputs**-0.5


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"seed": -1}, "basis seed is -1"),
        ({"stream": -3}, "basis stream is -3"),
        ({"seed": 2**63}, "basis seed is 9223372036854775808"),
        ({"generator": "torch"}, "basis generator is 'torch', expected 'philox-u24-1'"),
    ],
)
def test_an_unsound_basis_is_refused(fields: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Seeded(**fields)  # type: ignore[arg-type]


def test_equal_bases_have_equal_hashes() -> None:
    assert len({Seeded(1, 2), Seeded(1, 2), Seeded(2, 1)}) == 2


# --- an explicit basis


def explicit() -> Explicit:
    return Explicit.from_tensors({"a": Seeded(7).draw("a", 3, 5), "b": Seeded(7).draw("b", 2, 4)})


def test_an_explicit_basis_is_named_by_its_content() -> None:
    basis = explicit()
    assert basis.content_digest == Seeded(7).digest({"a": (3, 5), "b": (2, 4)}) == basis.digest({"b": (2, 4), "a": (3, 5)})
    assert basis == explicit()
    assert hash(basis) == hash(explicit())
    assert basis != Explicit.from_tensors({"a": Seeded(7).draw("a", 3, 5)})


def test_an_explicit_basis_draws_its_first_rows_and_zeros_for_missing_modules() -> None:
    basis = explicit()
    assert torch.equal(basis.draw("a", 2, 5), Seeded(7).draw("a", 2, 5))
    assert torch.equal(basis.draw("a", 4, 5), torch.cat([Seeded(7).draw("a", 3, 5), torch.zeros(1, 5)]))
    assert torch.equal(basis.draw("none", 2, 6), torch.zeros(2, 6))


def test_a_basis_of_bf16_is_named_by_its_values() -> None:
    half = {"a": torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16)}
    assert Explicit.from_tensors(half) == Explicit.from_tensors({"a": half["a"].float()})
    assert Explicit.from_tensors(half).draw("a", 1, 2).dtype == torch.float32
