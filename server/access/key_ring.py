"""The keys that count now: operators change the key file while the server runs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

from server.access.caller import Caller
from server.access.keys import KeyFileError, Keys, read_keys

logger = logging.getLogger(__name__)
LOOK_S = 1.0
"""How long a key still counts after it was taken out, about."""
Stamp = tuple[int, int, int] | None


class KeyRing:
    """What the key file said when it was last sound. Raises `KeyFileError` where it is not from the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._find_faults: list[Callable[[Keys], Sequence[str]]] = []
        self._seen = self._stamp()
        self.keys = read_keys(path)

    def require(self, find_faults: Callable[[Keys], Sequence[str]]) -> None:
        """Has the keys, those of now and those to come, looked at by what knows more than the file: for faults, the keys are not
        taken. Raises `KeyFileError` where those of now have any.
        """
        self._find_faults.append(find_faults)
        self._check(self.keys)

    def find(self, key: bytes) -> Caller | None:
        """Returns who sends `key`, or None."""
        return self.keys.find(key)

    def look(self) -> None:
        """Reads the file again where it changed. One that is not sound changes nothing, and the log says so."""
        seen = self._stamp()
        if seen == self._seen:
            return
        self._seen = seen  # as it was before it is read: what is written meanwhile is another change
        try:
            keys = read_keys(self.path)
            self._check(keys)
        except KeyFileError as error:
            logger.error("THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: %s", "\n".join(error.lines))
            return
        self.keys = keys
        logger.info("%s was read again: %s", self.path, keys)

    async def watch(self) -> None:
        """Looks now and then, for ever."""
        while True:
            await anyio.sleep(LOOK_S)
            await run_sync(self.look)

    def _check(self, keys: Keys) -> None:
        faults = [fault for find in self._find_faults for fault in find(keys)]
        if faults:
            raise KeyFileError(str(self.path), faults)

    def _stamp(self) -> Stamp:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
