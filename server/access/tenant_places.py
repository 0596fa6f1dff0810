"""Places in a line, counted for each tenant: one that fills its own has nobody else's requests refused."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class TenantPlaces:
    """The places that tenants hold; use from the event loop alone. Clients without a key are one tenant, called ""."""

    def __init__(self) -> None:
        self._num_held: Counter[str] = Counter()

    def num_held(self, tenant: str) -> int:
        """Return how many places a tenant holds."""
        return self._num_held[tenant]

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Hold one more place of a tenant until the block ends."""
        self._num_held[tenant] += 1
        try:
            yield
        finally:
            self._num_held[tenant] -= 1
            self._num_held += Counter()  # forgets the tenants that hold none
