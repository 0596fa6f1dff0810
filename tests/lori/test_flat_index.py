"""The flat index: the points nearest to a query, compiled and with NumPy."""

from collections.abc import Sequence

import numpy as np
import pytest

from lori.flat_index import NUM_DIMENSIONS, FlatIndex
from lori.gaussians import Array, as_float32
from lori.native import MODULE
from tests.needs import need

COUNT = 16


@pytest.fixture(params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find with the compiled module, or without it."""
    if request.param == "compiled":
        need("kernels")
    else:
        monkeypatch.setattr("lori.flat_index.MODULE", None)


def make_points(count: int = 3000, seed: int = 0) -> Array:
    """Return points (G, D) whose dimensions have standard deviations of 0.01 to 10."""
    return np.random.default_rng(seed).standard_normal((count, NUM_DIMENSIONS)) * np.logspace(-2, 1, NUM_DIMENSIONS)


def distances(points: Array, query: Array) -> Array:
    result: Array = np.linalg.norm(points - query, axis=1)
    return result


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("order", [1, -1])
def test_the_nearest_are_found(order: int) -> None:
    """The points are also in the order of their distances, so that each is nearer than all before it, or none is."""
    queries = make_points(20, seed=1)
    for query in queries:
        points = make_points()
        points = points[np.argsort(distances(points, query))[::order]]
        found = FlatIndex(points).nearest(as_float32(query), COUNT)
        assert len({*found.tolist()}) == COUNT
        exact = np.sort(distances(points, query))
        assert distances(points[found], query).max() < 1.01 * exact[COUNT - 1]
        assert np.argmin(distances(points, query)) in found


@pytest.mark.usefixtures("path")
def test_only_allowed_points_are_found() -> None:
    points, [query] = make_points(), make_points(1, seed=1)
    index, allowed = FlatIndex(points), np.zeros(len(points), dtype=bool)
    allowed[5::7] = True
    places = np.flatnonzero(allowed)
    found = index.nearest(as_float32(query), COUNT, allowed)
    assert len({*found.tolist()}) == COUNT
    assert allowed[found].all()
    assert distances(points[found], query).max() < 1.01 * np.sort(distances(points[places], query))[COUNT - 1]
    assert sorted(index.nearest(as_float32(query), len(points), allowed).tolist()) == places.tolist()
    assert not len(index.nearest(as_float32(query), COUNT, np.zeros(len(points), dtype=bool)))


@pytest.mark.usefixtures("path")
def test_of_few_points_all_are_found() -> None:
    index = FlatIndex(make_points(3))
    assert sorted(index.nearest(np.ones(NUM_DIMENSIONS, np.float32), COUNT).tolist()) == [0, 1, 2]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15])
def test_points_and_queries_may_be_small_or_large(scale: float) -> None:
    points = scale * make_points(100)
    index = FlatIndex(points)
    for place in (0, 50, 99):
        found = index.nearest(as_float32(points[place]), COUNT)
        assert len({*found.tolist()}) == COUNT
        assert scale in (0.0, 1e-30) or place in found


@pytest.mark.needs("kernels")
def test_the_compiled_index_finds_what_numpy_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = FlatIndex(make_points()), as_float32(make_points(30, seed=1))

    def found() -> Sequence[set[int]]:
        return [{*index.nearest(query, COUNT).tolist()} for query in queries]

    compiled = found()
    monkeypatch.setattr("lori.flat_index.MODULE", None)
    in_numpy = found()
    num_same = sum(len(one & other) for one, other in zip(compiled, in_numpy, strict=True))
    assert num_same >= 0.99 * COUNT * len(queries)  # the compiled one rounds the query, too


def test_a_point_takes_100_bytes() -> None:
    assert FlatIndex(make_points(1000)).num_bytes == 1000 * (NUM_DIMENSIONS + 4) + 4 * NUM_DIMENSIONS


@pytest.mark.needs("kernels")
def test_the_compiled_function_checks_its_arrays() -> None:
    points, constants = np.zeros((5, NUM_DIMENSIONS), np.int8), np.zeros(5, np.float32)
    scales = query = np.ones(NUM_DIMENSIONS, np.float32)
    assert len(MODULE.nearest(points, scales, constants, query, None, 2)) == 2
    for arrays in (
        (np.zeros((5, 95), np.int8), scales, constants, query),
        (points, scales[1:], constants, query),
        (points, scales, constants, query[1:]),
    ):
        with pytest.raises(ValueError, match="96 dimensions expected"):
            MODULE.nearest(*arrays, None, 2)
    with pytest.raises(ValueError, match="a constant for each point"):
        MODULE.nearest(points, scales, constants[1:], query, None, 2)
    with pytest.raises(ValueError, match="whether it is allowed"):
        MODULE.nearest(points, scales, constants, query, np.ones(4, dtype=bool), 2)
    with pytest.raises(ValueError, match="a count of at least 1"):
        MODULE.nearest(points, scales, constants, query, None, 0)
