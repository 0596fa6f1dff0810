"""The keys that count now: operators change the key file while the server runs."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

from lori.store.files import FileStamp, file_stamp
from server.access.caller import Caller
from server.access.keys import KeyFileError, Keys, read_key_file, read_keys, whole_keys

logger = logging.getLogger(__name__)
LOOK_S = 1.0
"""Between two looks, in seconds. After a key was taken out it counts for two to three of them."""
MAX_UNSETTLED = 10
"""Looks at a file that is another each time before the log says so."""


class KeyRing:
    """What the key file said when it was last sound. Raises `KeyFileError` where it is not from the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._find_faults: list[Callable[[Keys], Sequence[str]]] = []
        self._seen = file_stamp(path)
        self._last_look: tuple[FileStamp | None, str] | None = None
        """The stamp and the digest that the last look found, of a file that changed and has not settled."""
        self._num_unsettled = 0
        self.keys = read_keys(path)

    def require(self, find_faults: Callable[[Keys], Sequence[str]]) -> None:
        """Have the keys, those of now and those to come, looked at by what knows more than the file: for faults, the keys are not
        taken. Raises `KeyFileError` where those of now have any.
        """
        self._find_faults.append(find_faults)
        self._check(self.keys)

    def find(self, key: bytes) -> Caller | None:
        """Return who sends `key`, or None."""
        return self.keys.find(key)

    def look(self) -> None:
        """Read the file again where it changed, and take its keys over once two looks have found the same.

        One that is being written, by an editor or a copy, may be sound and lack keys. One that is not sound changes nothing, and
        the log says so.
        """
        stamp = file_stamp(self.path)  # before it is read: what is written meanwhile is another change
        if stamp == self._seen:
            self._last_look, self._num_unsettled = None, 0
            return
        content = self._read()
        found = stamp, hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(content)
        if found != self._last_look:
            self._last_look = found
            self._note_unsettled()
            return
        self._seen, self._last_look, self._num_unsettled = stamp, None, 0
        self._take_over(content)

    async def watch(self) -> None:
        """Look now and then, for ever."""
        while True:
            await anyio.sleep(LOOK_S)
            await run_sync(self.look)

    def _read(self) -> bytes | KeyFileError:
        try:
            return read_key_file(self.path)
        except KeyFileError as error:
            return error

    def _note_unsettled(self) -> None:
        self._num_unsettled += 1
        if self._num_unsettled == MAX_UNSETTLED:
            logger.error("THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: %s changes all the time", self.path)

    def _take_over(self, content: bytes | KeyFileError) -> None:
        try:
            if isinstance(content, KeyFileError):
                raise content
            keys = whole_keys(content, str(self.path))
            self._check(keys)
        except KeyFileError as error:
            logger.error("THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: %s", "\n".join(error.lines))
            return
        self.keys = keys
        logger.info("%s was read again: %s", self.path, keys)

    def _check(self, keys: Keys) -> None:
        faults = [fault for find in self._find_faults for fault in find(keys)]
        if faults:
            raise KeyFileError(str(self.path), faults)
