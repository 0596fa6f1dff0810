"""Memory in huge pages."""

import pytest
import torch

from lori.kernels import pages
from lori.kernels.pages import CACHE_LINE, HUGE_PAGE, Arena, zeros


def test_large_arrays_begin_with_a_huge_page() -> None:
    array = zeros(HUGE_PAGE + 5)
    assert array.shape == (HUGE_PAGE + 5,)
    assert not array.any()
    assert array.data_ptr() % HUGE_PAGE == 0
    assert zeros(0).shape == (0,)


def test_an_arena_s_arrays_follow_one_another() -> None:
    arena, sizes = Arena(2 * HUGE_PAGE), (100, 3 * CACHE_LINE, 0, HUGE_PAGE, 7)
    arrays = [arena.zeros(size) for size in sizes]
    assert [array.shape for array in arrays] == [(size,) for size in sizes]
    assert arrays[0].data_ptr() % HUGE_PAGE == 0
    starts = [array.data_ptr() - arrays[0].data_ptr() for array in (arrays[1], *arrays[3:])]
    assert starts == [2 * CACHE_LINE, 5 * CACHE_LINE, 5 * CACHE_LINE + HUGE_PAGE]
    for value, array in enumerate(arrays):
        array.fill_(value + 1)
    assert all(array.eq(value + 1).all() for value, array in enumerate(arrays)), "none overlaps another"


def test_an_array_that_an_arena_has_no_room_for_is_elsewhere() -> None:
    arena = Arena(HUGE_PAGE)
    small, large, later = arena.zeros(CACHE_LINE), arena.zeros(3 * HUGE_PAGE), arena.zeros(CACHE_LINE)
    small.fill_(1)
    large.fill_(2)
    assert not later.any()
    assert (small.eq(1).all(), large.eq(2).all()) == (True, True)


def test_an_arena_begun_in_inference_mode_goes_on_outside() -> None:
    arena = Arena()
    with torch.inference_mode():
        first = arena.zeros(10)
    second = arena.zeros(10)
    second += 1
    assert not first.any()
    assert not second.is_inference()


def test_an_arena_gives_no_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"GiB of .* that are free"):
        Arena().zeros(1001)
