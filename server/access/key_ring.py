"""The keys that are valid now. Operators change the key file while the server runs."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

from lori.store.files import FileStamp, file_stamp
from server.access.caller import Caller
from server.access.keys import KeyFileError, Keys, parse_complete_keys, read_key_file, read_keys

logger = logging.getLogger(__name__)
POLL_S = 1.0
"""Seconds between two polls of the key file. A removed key stays valid for two to three polls."""
MAX_UNSETTLED = 10
"""Number of polls in a row that find the file changed again before the log says so."""


class KeyRing:
    """Keys of the last sound version of the key file. Raises `KeyFileError` if the file is not sound at the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checks: list[Callable[[Keys], Sequence[str]]] = []
        self._seen = file_stamp(path)
        self._last_poll: tuple[FileStamp | None, str] | None = None
        """Stamp and digest of a changed file at the last poll; None unless a change has yet to settle."""
        self._num_unsettled = 0
        self.keys = read_keys(path)

    def add_check(self, check: Callable[[Keys], Sequence[str]]) -> None:
        """Add a check of the keys, which returns faults that the file alone does not show. Runs on the present keys and on later
        ones.

        Keys with faults are not accepted. Raises `KeyFileError` if the present keys have faults.
        """
        self._checks.append(check)
        self._check(self.keys)

    def find(self, key: bytes) -> Caller | None:
        """Return the caller of `key`, or None."""
        return self.keys.find(key)

    def poll(self) -> None:
        """Read the file again if it changed. Accept its keys once two polls found the same content.

        A file that an editor or a copy is still writing may be sound and lack keys. A file that is not sound changes nothing, and
        the log says so.
        """
        stamp = file_stamp(self.path)  # before the read: a later write counts as another change
        if stamp == self._seen:
            self._last_poll, self._num_unsettled = None, 0
            return
        content = self._read()
        seen = stamp, hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(content)
        if seen != self._last_poll:
            self._last_poll = seen
            self._note_unsettled()
            return
        self._seen, self._last_poll, self._num_unsettled = stamp, None, 0
        self._accept(content)

    async def watch(self) -> None:
        """Poll the file for ever."""
        while True:
            await anyio.sleep(POLL_S)
            await run_sync(self.poll)

    def _read(self) -> bytes | KeyFileError:
        try:
            return read_key_file(self.path)
        except KeyFileError as error:
            return error

    def _note_unsettled(self) -> None:
        self._num_unsettled += 1
        if self._num_unsettled == MAX_UNSETTLED:
            logger.error("THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: %s changes all the time", self.path)

    def _accept(self, content: bytes | KeyFileError) -> None:
        try:
            if isinstance(content, KeyFileError):
                raise content
            keys = parse_complete_keys(content, str(self.path))
            self._check(keys)
        except KeyFileError as error:
            logger.error("THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: %s", "\n".join(error.lines))
            return
        self.keys = keys
        logger.info("%s was read again: %s", self.path, keys)

    def _check(self, keys: Keys) -> None:
        faults = [fault for check in self._checks for fault in check(keys)]
        if faults:
            raise KeyFileError(str(self.path), faults)
