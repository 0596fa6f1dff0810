"""A server that shares its store with others makes good what it did not hear of: what they changed since it read the store."""

import logging
from collections.abc import Awaitable, Callable, Collection

from anyio.to_thread import run_sync

from lori.errors import LoriError
from server.catalog.admin import AdapterAdmin
from server.catalog.files import AdapterFiles
from server.engine.adapters.registry import Registry
from server.errors import BusyError, ConflictError

logger = logging.getLogger(__name__)
REFUSALS = (LoriError, BusyError, ConflictError)


async def catch_up(admin: AdapterAdmin, files: AdapterFiles, registry: Registry, pins: Collection[str]) -> None:
    """Lets names mean what they mean in the store now, and pins those of `pins`. What cannot be so is said in the log.

    Raises `StoreError` where the store fails.
    """
    try:
        changed, gone = await run_sync(files.changes, registry.by_name)
    except REFUSALS as error:
        logger.warning("what was changed meanwhile is not known here: %s", error)
        changed, gone = [], []
    for name in gone:
        await _try(admin.unload, name)
    for name in changed:
        await _try(admin.load, name, is_known=name in registry.faulty)
    for name in sorted(set(pins) - admin.pins.keys()):
        await _try(admin.pin, name)


async def _try(change: Callable[[str], Awaitable[object]], name: str, *, is_known: bool = False) -> None:
    try:
        await change(name)
    except REFUSALS as error:
        if is_known:  # it was damaged at start, and the log says how
            logger.info("%r is damaged still", name)
            return
        logger.warning("%r is not as on the other replicas: %s", name, error)
