"""How many files and connections this process may have open: as many as the system lets it ask for."""

import logging
import sys

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)


RESERVE = 256
"""Descriptors for files, models and what is refused; where there are fewer than twice as many, half of them."""


def connection_room(num_wanted: int) -> int:
    """Return how many connections there may be: as many as wanted, or fewer where descriptors are too few (logged)."""
    if sys.platform == "win32":
        return num_wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = num_wanted if soft == resource.RLIM_INFINITY else max(soft - RESERVE, soft // 2)
    if room < num_wanted:
        logger.warning("--max-connections is %d, of which %d files open at once leave room for %d", num_wanted, soft, room)
    return min(num_wanted, room)


def raise_descriptor_limit() -> None:
    """Raises the soft limit to the hard one: 1024, which is common, is less than the idle connections of many clients."""
    if sys.platform == "win32":  # it has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS calls the hard limit unlimited, and takes no such value
        logger.warning("at most %d files and connections may be open at once; more could not be had: %s", soft, error)
