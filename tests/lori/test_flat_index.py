"""The flat index: the points nearest to a query, compiled and with NumPy."""

import numpy as np
import pytest

from lori.flat_index import NUM_DIMENSIONS, FlatIndex
from lori.gaussians import Array, as_float32
from lori.native import MODULE

COUNT = 16


def make_points(count: int = 3000, seed: int = 0) -> Array:
    """Return points (G, D) whose dimensions have standard deviations of 0.1 to 10."""
    return np.random.default_rng(seed).standard_normal((count, NUM_DIMENSIONS)) * np.logspace(-1, 1, NUM_DIMENSIONS)


def distances(points: Array, query: Array) -> Array:
    result: Array = np.linalg.norm(points - query, axis=1)
    return result


def nearest(
    points: Array,
    query: Array,
    allowed: Array | None = None,
    count: int = COUNT,
    origin: Array | float = 0.0,
    group_size: int = 1,
    max_per_group: int = 1,
) -> list[int]:
    is_allowed = np.ones(len(points), dtype=bool) if allowed is None else allowed.astype(bool)
    groups = np.arange(len(points), dtype=np.int32) // group_size
    index = FlatIndex(points, np.broadcast_to(origin, NUM_DIMENSIONS), groups)
    return index.nearest(as_float32(query), count, is_allowed, max_per_group=max_per_group).tolist()


@pytest.mark.usefixtures("compiled_and_numpy")
@pytest.mark.parametrize("order", [1, -1])
def test_the_nearest_are_returned(order: int) -> None:
    """The points are in the order of their distances, so that each is nearer than all before it, or none is."""
    for query in make_points(20, seed=1):
        points = make_points()
        points = points[np.argsort(distances(points, query))[::order]]
        indices = nearest(points, query)
        assert len({*indices}) == COUNT
        exact = np.sort(distances(points, query))
        assert distances(points[indices], query).max() < 1.01 * exact[COUNT - 1]
        assert np.argmin(distances(points, query)) in indices


@pytest.mark.usefixtures("compiled_and_numpy")
@pytest.mark.parametrize("magnitude", [1e3, 1e9])
def test_far_points_do_not_blur_the_others(magnitude: float) -> None:
    points, far = make_points(), magnitude * np.random.default_rng(2).standard_normal((5, NUM_DIMENSIONS))
    for query in make_points(10, seed=1):
        assert {*nearest(np.concatenate([points, far]), query)} == {*nearest(points, query)}
    assert 3002 in nearest(np.concatenate([points, far]), far[2])


@pytest.mark.usefixtures("compiled_and_numpy")
def test_points_around_the_origin_are_not_blurred() -> None:
    points, queries = make_points(), make_points(10, seed=1)
    moved = [nearest(points + 1000, query + 1000, origin=np.full(NUM_DIMENSIONS, 1000.0)) for query in queries]
    num_same = sum(len({*indices} & {*nearest(points, query)}) for indices, query in zip(moved, queries, strict=True))
    assert num_same >= 0.99 * COUNT * len(queries)


@pytest.mark.usefixtures("compiled_and_numpy")
def test_only_allowed_points_are_returned() -> None:
    points, [query] = make_points(), make_points(1, seed=1)
    allowed = np.zeros(len(points))
    allowed[5::7] = 1
    indices = nearest(points, query, allowed)
    assert len({*indices}) == COUNT
    assert allowed[indices].all()
    assert distances(points[indices], query).max() < 1.01 * np.sort(distances(points[5::7], query))[COUNT - 1]
    assert sorted(nearest(points, query, allowed, len(points))) == [*range(5, len(points), 7)]
    assert nearest(points, query, 0 * allowed) == []


@pytest.mark.usefixtures("compiled_and_numpy")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("count", [1, COUNT, 300])
def test_of_each_group_only_the_nearest_are_returned(count: int, order: int) -> None:
    group_size, max_per_group = 7, 3
    for query in make_points(5, seed=1):
        points = make_points(707)
        points = points[np.argsort(distances(points, query))[::order]]  # so that the nearest are all of a few groups
        points = np.round(4 * points)  # which quantization changes little
        indices = nearest(points, query, count=count, group_size=group_size, max_per_group=max_per_group)
        by_group = np.array(indices) // group_size
        assert np.bincount(by_group).max() <= max_per_group
        ranked = np.argsort(distances(points, query), kind="stable")
        expected: list[int] = []
        for point in ranked.tolist():
            if sum(other // group_size == point // group_size for other in expected) < max_per_group:
                expected.append(point)
        exact = np.sort(distances(points[expected[:count]], query))
        np.testing.assert_allclose(np.sort(distances(points[indices], query)), exact, rtol=0.01)


@pytest.mark.usefixtures("compiled_and_numpy")
def test_of_few_points_all_are_returned() -> None:
    assert sorted(nearest(make_points(3), np.ones(NUM_DIMENSIONS))) == [0, 1, 2]


@pytest.mark.usefixtures("compiled_and_numpy")
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_points_and_queries_may_be_small_or_large(scale: float) -> None:
    points = scale * make_points(100)
    assert all(place in nearest(points, points[place]) for place in range(100))


@pytest.mark.usefixtures("compiled_and_numpy")
def test_points_and_queries_may_be_zero() -> None:
    zero = np.zeros((100, NUM_DIMENSIONS))
    assert len({*nearest(zero, zero[0])}) == COUNT


@pytest.mark.needs("kernels")
def test_the_compiled_index_returns_what_numpy_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    points, queries = make_points(), make_points(30, seed=1)
    compiled = [nearest(points, query) for query in queries]
    monkeypatch.setattr("lori.flat_index.MODULE", None)
    num_same = sum(len({*indices} & {*nearest(points, query)}) for indices, query in zip(compiled, queries, strict=True))
    assert num_same >= 0.99 * COUNT * len(queries)  # the compiled one rounds the query, too


def test_a_point_takes_108_bytes() -> None:
    index = FlatIndex(make_points(1000), np.zeros(NUM_DIMENSIONS), np.zeros(1000, np.int32))
    assert index.num_bytes == 1000 * (NUM_DIMENSIONS + 12) + 4 * NUM_DIMENSIONS


@pytest.mark.needs("kernels")
def test_the_compiled_function_checks_its_arrays() -> None:
    points, query, allowed = np.zeros((5, NUM_DIMENSIONS), np.int8), np.ones(NUM_DIMENSIONS, np.float32), np.ones(5, dtype=bool)
    scales = constants = np.ones(5, np.float32)
    groups = np.zeros(5, np.int32)
    assert len(MODULE.nearest(points, scales, constants, groups, allowed, query, 2, 2)) == 2
    for wrong, other in ((np.zeros((5, 95), np.int8), query), (points, query[1:])):
        with pytest.raises(ValueError, match="96 dimensions expected"):
            MODULE.nearest(wrong, scales, constants, groups, allowed, other, 2, 2)
    arrays = (scales, constants, groups, allowed)
    for place in range(len(arrays)):
        with pytest.raises(ValueError, match="for each point expected"):
            MODULE.nearest(points, *arrays[:place], arrays[place][1:], *arrays[place + 1 :], query, 2, 2)
    for counts in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="counts of at least 1"):
            MODULE.nearest(points, *arrays, query, *counts)
