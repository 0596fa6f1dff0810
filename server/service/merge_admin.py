"""Changes of named merges while requests run: publish, delete. Files are written in threads."""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from anyio import Lock
from anyio.to_thread import run_sync

from lori.errors import AdapterError
from lori.named_merge import SUFFIX, NamedMerge
from lori.store.files import replace_file, sync_folder
from server.catalog.files import folder_error
from server.engine.generate_request import RefusedError
from server.errors import ConflictError, UnknownMergeError
from server.service.named_merges import NamedMerges, read_merges

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
NO_FOLDER = "there is no folder for named merges: start the server with --merges FOLDER"
FOLDER = "folder of named merges"
MOUNT_HINT = "mount it writable, such as by LORI_MERGES_MODE=rw for docker/compose.yaml; it must belong to user 10001 there"


class MergeAdmin:
    """Changes of the named merges of a server. Use from the event loop alone.

    A change holds at once for new requests. Requests under way end with the adapters and weights that they began with.
    """

    def __init__(
        self,
        merges: NamedMerges,
        folder: Path | None = None,
        base_digest: str = "",
        base_names: Collection[str] = (),
    ) -> None:
        """Without `folder` nothing changes."""
        self.merges = merges
        self._folder, self._base_digest, self._base_names = folder, base_digest, base_names
        self._lock = Lock()

    async def publish(self, name: str, merge: NamedMerge) -> None:
        """Write a merge to the folder, and make `name` mean it.

        Raises `RefusedError` if it is of another base or an adapter is missing; `ConflictError` if there is no folder, if it may
        not be written, or if an adapter or the base has the name; `StoreError` if the folder fails.
        """
        folder = self._checked_folder()
        if name in self._base_names or self.merges.is_adapter(name):
            raise ConflictError(f"{name!r} is also the name of an adapter or the base: choose another")
        if merge.base_digest != self._base_digest:
            raise RefusedError("base_digest", f"is {merge.base_digest}, expected {self._base_digest}: it is of another base")
        for number, adapter in enumerate(merge.adapters):
            if not self.merges.is_registered(adapter.reference):
                raise RefusedError(f"adapters.{number}.reference", f"there is no {adapter.reference}")
        async with self._lock:
            await self._run(lambda: replace_file(folder / f"{name}{SUFFIX}", merge.to_bytes()))
            self.merges.by_name = {**self.merges.by_name, name: merge}
        logger.info("the merge %r means %s", name, ", ".join(adapter.reference for adapter in merge.adapters))

    async def delete(self, name: str) -> NamedMerge:
        """Delete a merge with its file. Return what it was.

        Raises `UnknownMergeError`; `ConflictError` and `StoreError` as `publish`.
        """
        folder = self._checked_folder()
        async with self._lock:
            if name not in self.merges.by_name:
                raise UnknownMergeError(f"there is no merge {name!r}")
            await self._run(lambda: _remove(folder / f"{name}{SUFFIX}"))
            deleted = self.merges.by_name[name]
            self.merges.by_name = {key: merge for key, merge in self.merges.by_name.items() if key != name}
        logger.info("the merge %r was deleted", name)
        return deleted

    async def catch_up(self) -> None:
        """Read the folder again. If a file is unsound, or has a name of the base, nothing changes, and the log says why.

        Raises `ConflictError` or `StoreError` if the folder cannot be read.
        """
        if not (folder := self._folder):
            return
        async with self._lock:
            try:
                self.merges.by_name = await self._run(lambda: read_merges(folder, self._base_digest, self._base_names))
            except AdapterError as error:
                logger.warning("named merges that were changed meanwhile are not known here: %s", error)

    def _checked_folder(self) -> Path:
        if not self._folder:
            raise ConflictError(NO_FOLDER)
        return self._folder

    async def _run(self, work: Callable[[], Result]) -> Result:
        try:
            return await run_sync(work)
        except OSError as error:
            raise folder_error(error, FOLDER, MOUNT_HINT) from error


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)  # another process that serves this folder may have deleted it
    sync_folder(file.parent)
