"""Which stretches of a pool are free. Plain ints; the pool may be anything that is counted in units."""

from bisect import bisect_left


class Extents:
    """The free stretches of `size` units, ascending; neighbours are one."""

    def __init__(self, size: int = 0) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # start, length
        self.grow(size)

    @property
    def num_free(self) -> int:
        """Units that are free."""
        return sum(length for _, length in self._free)

    def take(self, length: int) -> int | None:
        """Takes the first stretch of `length` units that is free and returns its start, or `None` where there is none."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Makes a stretch that was taken free again."""
        at = bisect_left(self._free, (start, 0))
        stop, first, last = start + length, at, at
        assert 0 <= start < stop <= self.size
        if at > 0 and sum(self._free[at - 1]) >= start:
            assert sum(self._free[at - 1]) == start
            first, start = at - 1, self._free[at - 1][0]
        if at < len(self._free) and self._free[at][0] <= stop:
            assert self._free[at][0] == stop
            last, stop = at + 1, sum(self._free[at])
        self._free[first:last] = [(start, stop - start)]

    def grow(self, length: int) -> None:
        """Adds `length` free units at the end."""
        if length > 0:
            self.size += length
            self.give(self.size - length, length)
