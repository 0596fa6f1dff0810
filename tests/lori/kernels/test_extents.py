"""The free stretches of a pool."""

from hypothesis import given
from hypothesis import strategies as st

from lori.kernels.operands import Extents


def test_the_first_stretch_that_is_long_enough_is_taken() -> None:
    extents = Extents(10)
    assert [extents.allocate(n) for n in (3, 4, 2)] == [0, 3, 7]
    extents.free(3, 4)
    assert extents.allocate(5) is None
    assert extents.allocate(4) == 3
    assert extents.num_free == 1


def test_adjacent_free_stretches_are_joined() -> None:
    extents = Extents(9)
    for _ in range(3):
        extents.allocate(3)
    for start in (0, 6, 3):
        extents.free(start, 3)
    assert extents.allocate(9) == 0


def test_added_units_join_the_free_end() -> None:
    extents = Extents(4)
    extents.allocate(2)
    extents.grow(3)
    assert extents.size == 7
    assert extents.allocate(5) == 2


@given(st.lists(st.one_of(st.integers(1, 9), st.integers(0, 30).map(lambda i: -1 - i)), max_size=60))
def test_no_unit_is_taken_twice_or_lost(actions: list[int]) -> None:
    extents, taken = Extents(40), []
    for action in actions:
        if action > 0:
            start = extents.allocate(action)
            if start is not None:
                taken.append((start, action))
        elif taken:
            extents.free(*taken.pop(-action % len(taken)))
        units = [unit for start, length in taken for unit in range(start, start + length)]
        assert len(units) == len(set(units))
        assert extents.num_free == 40 - len(units)
        assert all(0 <= unit < 40 for unit in units)
    for stretch in taken:
        extents.free(*stretch)
    assert extents.allocate(40) == 0
