"""How many files and connections this process may have open: as many as the system lets it ask for."""

import logging
import sys

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)


def raise_descriptor_limit() -> None:
    """Raises the soft limit to the hard one: 1024, which is common, is less than the idle connections of many clients."""
    if sys.platform == "win32":  # it has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS calls the hard limit unlimited, and takes no such value
        logger.warning("at most %d files and connections may be open at once; more could not be had: %s", soft, error)
