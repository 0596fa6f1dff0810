"""Whether any replica is there, and for how long none has been: requests wait for one, but not for ever. Knows no Ray."""

import logging

import anyio

from server.cluster.lifecycle import PROBED

logger = logging.getLogger(__name__)
WAIT_S = 30.0
"""Of an absence, how long requests wait for its end. What asks how the server is does not wait: who asks wants to know it."""


class Absence:
    """The time in which no replica is there; before the first one came there is none: that is the start."""

    def __init__(self) -> None:
        self._is_begun = False
        self._since: float | None = None

    def note(self, *, is_there: bool) -> None:
        """Takes whether a replica is there at the moment."""
        if is_there:
            self._is_begun, self._since = True, None
        elif self._is_begun and self._since is None:
            self._since = anyio.current_time()
            logger.warning("no replica is there; requests wait for %g s, others are told to come again", WAIT_S)

    def is_too_long(self, path: str) -> bool:
        """Says whether a request of this path waits no more."""
        return self._since is not None and (path in PROBED or anyio.current_time() - self._since >= WAIT_S)
