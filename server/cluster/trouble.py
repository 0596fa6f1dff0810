"""What goes wrong again and again, once in the log."""

import logging

from ray.exceptions import RayTaskError

logger = logging.getLogger(__name__)


class Trouble:
    """Says what is wrong when it begins, and when it is another thing than before; not at each turn."""

    def __init__(self, meaning: str) -> None:
        self._meaning, self._known = meaning, ""

    def begins(self, error: BaseException) -> None:
        """Takes what has gone wrong at this turn."""
        reason = error.cause if isinstance(error, RayTaskError) else error  # without its trace
        found = str(reason) or type(reason).__name__
        if found != self._known:
            logger.warning("%s: %s", self._meaning, found)
        self._known = found

    def ends(self) -> None:
        """At this turn all went well."""
        self._known = ""
