"""The Golomb-Rice code of a mask."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lori import native
from lori.rice import MAX_ENTRIES, Code, Indices, decode, encode, parameter


def random_indices(num_entries: int, density: float, seed: int = 0) -> Indices:
    return np.flatnonzero(np.random.default_rng(seed).random(num_entries) < density).astype(np.int32)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.03, 0.1, 0.2, 0.35, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_entries", [1, 7, 8, 9, 64, 1000, 20_000])
def test_decoding_restores_a_mask(num_entries: int, density: float) -> None:
    indices = random_indices(num_entries, density)
    code = encode(indices, num_entries)
    assert code.dtype == np.uint8
    back = decode(code, num_entries, len(indices))
    assert back.dtype == np.int32
    assert (back == indices).all()


@given(st.integers(1, 4000).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_decoding_restores_any_mask(mask: tuple[int, set[int]]) -> None:
    num_entries, entries = mask
    indices = np.array(sorted(entries), np.int32)
    assert (decode(encode(indices, num_entries), num_entries, len(entries)) == indices).all()


@pytest.mark.parametrize("index", [0, 1, MAX_ENTRIES // 2, MAX_ENTRIES - 1])
def test_decoding_restores_one_entry_of_the_largest_mask(index: int) -> None:
    indices = np.array([index], np.int32)
    assert decode(encode(indices, MAX_ENTRIES), MAX_ENTRIES, 1).tolist() == [index]


def test_a_dense_mask_is_a_bitmap() -> None:
    indices = random_indices(801, 0.6)
    bits = np.zeros(801, np.bool_)
    bits[indices] = True
    assert (encode(indices, 801) == np.packbits(bits[: indices[-1] + 1], bitorder="little")).all()


def test_the_code_equals_one_computed_by_hand() -> None:
    # 40 entries, nnz 4: k = 3. Gaps 2, 0, 12, 20: quotients 0, 0, 1, 2; remainders 2, 0, 4, 4.
    indices = np.array([2, 3, 16, 37], np.int32)
    assert parameter(40, 4) == 3
    assert encode(indices, 40).tolist() == [0b1001011, 0b0000, 0b0001, 0b1100]


@pytest.mark.parametrize(("density", "bits"), [(0.05, 0.2864), (0.1, 0.4690), (0.2, 0.7219)])
def test_a_random_mask_takes_little_more_than_its_entropy(density: float, bits: float) -> None:
    num_entries = 400_000
    taken = 8 * len(encode(random_indices(num_entries, density), num_entries)) / num_entries
    assert 0.995 * bits < taken < 1.03 * bits


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_parameter_is_the_best_for_a_random_mask(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    num_entries = 200_000
    indices = random_indices(num_entries, density)
    chosen = parameter(num_entries, len(indices))
    sizes = {}
    for k in range(10):
        monkeypatch.setattr("lori.rice.parameter", lambda *_, k=k: k)
        sizes[k] = len(encode(indices, num_entries))
    assert sizes[chosen] <= 1.005 * min(sizes.values())


def tampered() -> list[tuple[str, Code, int, int]]:
    indices = random_indices(1000, 0.1)
    code, nnz = encode(indices, 1000), len(indices)
    unary = len(code) - 3 * ((nnz + 7) // 8)
    flipped = code.copy()
    flipped[0] ^= 0x80
    padded = code.copy()
    assert nnz % 8
    padded[-1] |= 0x80
    longer = np.insert(code, unary, 0)
    return [
        ("holds", code[:-1], 1000, nnz),
        ("holds", code, 1000, nnz - 8),
        ("holds", flipped, 1000, nnz),
        ("holds", code[:2], 1000, nnz),
        ("past its last", padded, 1000, nnz),
        ("unary part", longer, 1000, nnz),
        ("of 960", code, 960, nnz),
        ("at least 128 entries, expected at most 100", np.array([0b100, 0, 0, 0, 0, 0, 0], np.uint8), 100, 1),
        ("holds 0 entries, expected 1", np.zeros(0, np.uint8), 8, 1),
        ("holds 1 entries, expected 0", np.ones(1, np.uint8), 8, 0),
        ("unary part", np.zeros(1, np.uint8), 8, 0),
    ]


@pytest.mark.parametrize(("message", "code", "num_entries", "nnz"), tampered())
def test_an_invalid_code_is_refused(message: str, code: Code, num_entries: int, nnz: int) -> None:
    with pytest.raises(ValueError, match=message):
        decode(code, num_entries, nnz)


def as_code(content: bytes) -> Code:
    return np.frombuffer(content, np.uint8)


@st.composite
def nearly_codes(draw: st.DrawFn) -> tuple[Code, int, int]:
    """Return the code of a mask, often with one changed byte, and the number of entries and the nnz to decode it with.

    Purely random bytes are hardly ever a valid code.
    """
    num_entries = draw(st.integers(1, 500))
    entries = sorted(draw(st.sets(st.integers(0, num_entries - 1), max_size=40)))
    code = encode(np.array(entries, np.int32), num_entries)
    if len(code) and draw(st.booleans()):
        code[draw(st.integers(0, len(code) - 1))] ^= 1 << draw(st.integers(0, 7))
    return code, num_entries, max(0, len(entries) + draw(st.sampled_from((0, 0, 0, -1, 1))))


@given(nearly_codes() | st.tuples(st.binary(max_size=60).map(as_code), st.integers(1, 5000), st.integers(0, 200)))
def test_any_bytes_are_a_mask_or_refused(mask: tuple[Code, int, int]) -> None:
    code, num_entries, nnz = mask
    try:
        indices = decode(code, num_entries, nnz)
    except ValueError:
        return
    assert len(indices) == nnz
    assert (np.diff(indices, prepend=-1) > 0).all()
    assert not nnz or indices[-1] < num_entries
    assert np.array_equal(encode(indices, num_entries), code)  # the code of a mask is unique


# --- the compiled module


def outcome(read: Callable[[Code, int, int], Indices], *mask: Any) -> list[int] | str:
    """Return the indices, or the message of the refusal."""
    try:
        return read(*mask).tolist()
    except ValueError as error:
        return str(error)


def assert_decoded_alike(code: Code, num_entries: int, nnz: int) -> None:
    """Assert that the module gives numpy's indices, or none if numpy refuses the code, and that the errors are the same."""
    expected = outcome(decode, code, num_entries, nnz)
    assert outcome(native.decode_mask, code, num_entries, nnz) == expected
    if native.MODULE:
        ours = native.MODULE.decode_mask(code, num_entries, nnz)
        assert (None if ours is None else ours.tolist()) == (None if isinstance(expected, str) else expected)
        assert ours is None or ours.dtype == np.int32


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.002, 0.01, 0.1, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("num_entries", [1, 7, 8, 9, 64, 1000, 20_000])
def test_the_compiled_module_decodes_as_numpy_does(num_entries: int, density: float) -> None:
    indices = random_indices(num_entries, density)
    assert_decoded_alike(encode(indices, num_entries), num_entries, len(indices))


@pytest.mark.parametrize("index", [0, 1, MAX_ENTRIES // 2, MAX_ENTRIES - 1])
def test_the_compiled_module_decodes_one_entry_of_the_largest_mask(index: int) -> None:
    assert_decoded_alike(encode(np.array([index], np.int32), MAX_ENTRIES), MAX_ENTRIES, 1)


@pytest.mark.parametrize(("_message", "code", "num_entries", "nnz"), tampered())
def test_the_compiled_module_refuses_the_codes_that_numpy_refuses(_message: str, code: Code, num_entries: int, nnz: int) -> None:
    assert_decoded_alike(code, num_entries, nnz)


@given(st.binary(max_size=60), st.integers(1, 5000), st.integers(0, 200))
def test_any_bytes_are_a_mask_for_both_decoders_or_for_neither(content: bytes, num_entries: int, nnz: int) -> None:
    assert_decoded_alike(np.frombuffer(content, np.uint8), num_entries, nnz)


@given(st.integers(0, 999), st.sampled_from([0.005, 0.1, 0.5]), st.integers(0, 4000), st.integers(-2, 2), st.integers(-9, 9))
def test_a_code_with_a_changed_bit_is_a_mask_for_both_decoders_or_for_neither(
    seed: int, density: float, bit: int, more_kept: int, more_entries: int
) -> None:
    indices = random_indices(1000, density, seed)
    code = encode(indices, 1000)
    if len(code):
        code[bit // 8 % len(code)] ^= 1 << bit % 8
    assert_decoded_alike(code, 1000 + more_entries, max(0, len(indices) + more_kept))
