"""Adapters that are being withdrawn. Each is freed, and deleted if that was requested, when the last request that uses it ends.

Within this process a name is changed by one caller at a time. Stores have locks of their own against other processes.
"""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import anyio
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync

from lori.errors import LoriError
from server.catalog.uses import AdapterUses
from server.engine.adapters.registry import Registered, Registry
from server.engine.engine import Engine
from server.engine.thread import EngineDeadError, EngineThread
from server.errors import ConflictError, StoreError

logger = logging.getLogger(__name__)


class NameLocks:
    """Locks of the names that are being changed."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()  # of names that are being changed or waited for

    @asynccontextmanager
    async def hold(self, *names: str) -> AsyncIterator[None]:
        """Hold the locks of these names until the block ends."""
        async with AsyncExitStack() as stack:
            for name in sorted(set(names)):  # always in the same order, against deadlocks
                await stack.enter_async_context(self._locks.setdefault(name, anyio.Lock()))
            yield


Argument = TypeVar("Argument")


class Remover(Protocol):
    """The interface that removes an adapter's files."""

    def withdraw(self, references: Sequence[str], versions: Sequence[str]) -> None:
        """Do the part of `remove` that need not wait for requests to end.

        `versions` has all versions concerned, as `name@version`.
        """

    def remove(self, references: Sequence[str]) -> None:
        """Remove versions, names with all their versions, or aliases. A missing one is no fault."""


@dataclass(slots=True)
class _Deletion:
    """The pending deletion of a name's versions. With `is_whole`, the name itself is deleted, too."""

    versions: set[str]
    is_whole: bool
    since: float
    """Time of the last withdrawal, by anyio's clock."""


class Departures:
    """Versions that requests can name no more. Use from the event loop alone, while the block of `running` lasts."""

    def __init__(
        self,
        registry: Registry,
        uses: AdapterUses,
        engine: EngineThread,
        locks: NameLocks,
        remover: Remover | None,
        grace_s: float = 0,
    ) -> None:
        """`grace_s` is the least time that files stay, in seconds.

        Requests of other processes that have not read them yet need it.
        """
        self._grace_s = grace_s
        self._registry, self._uses, self._engine, self._locks, self._remover = registry, uses, engine, locks, remover
        self._withdrawn: dict[tuple[str, str], Registered] = {}
        self._deletions: dict[str, _Deletion] = {}
        self._group: TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Free and delete adapters until the block ends, by when the engine must have ended. Then run the pending deletions."""
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                yield
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                for name in [*self._deletions]:
                    await self._try_to_remove(name)

    def num_using(self, name: str) -> int:
        """Return the number of requests that use a withdrawn version of `name`."""
        return sum(self._uses.get(name, digest).num_using for withdrawn_name, digest in self._withdrawn if withdrawn_name == name)

    def is_being_deleted(self, adapter: Registered) -> bool:
        """Return whether the files of an adapter are about to be deleted."""
        return self._is_being_deleted(adapter.owner, adapter.summary.version)

    def check_not_deleted(self, name: str, version: str) -> None:
        """Raise `ConflictError` if the files of a version of `name` are about to be deleted."""
        if self._is_being_deleted(name, version):
            raise ConflictError(f"{name}@{version} is being deleted, when its last requests have ended")

    async def begin(self, adapters: Iterable[Registered]) -> None:
        """Free withdrawn adapters, now or as soon as no request uses them."""
        for adapter in adapters:
            self._withdrawn[adapter.summary.name, adapter.summary.digest] = adapter
            if self._uses.get(adapter.summary.name, adapter.summary.digest).num_using:
                self._start(self._free_when_unused, adapter)
            else:
                await self._free(adapter)

    def restore(self, adapter: Registered) -> None:
        """Cancel the withdrawal of an adapter that is registered again."""
        self._withdrawn.pop((adapter.summary.name, adapter.summary.digest), None)
        if deletion := self._deletions.get(adapter.summary.name):
            deletion.is_whole = False
            deletion.versions.discard(adapter.summary.version)

    async def delete(self, name: str, versions: Collection[str], is_whole: bool) -> None:
        """Delete the files of withdrawn versions, now or as soon as no request uses them. The caller holds the lock of `name`.

        Raises as `AdapterFiles.withdraw`, and, if it deletes now, as `AdapterFiles.remove`.
        """
        assert self._remover
        references = [f"{name}@{version}" for version in sorted(versions)]
        await run_sync(self._remover.withdraw, [name] if is_whole else references, references)
        previous = self._deletions.get(name, _Deletion(set(), False, 0))
        is_new = name not in self._deletions
        self._deletions[name] = _Deletion(previous.versions | set(versions), previous.is_whole or is_whole, anyio.current_time())
        if not self._used(name) and not self._grace_s:
            await self._remove(name)
        elif is_new:
            self._start(self._delete_when_unused, name)

    def _is_being_deleted(self, name: str, version: str) -> bool:
        deletion = self._deletions.get(name)
        return deletion is not None and version in deletion.versions

    def _start(self, task: Callable[[Argument], Coroutine[None, None, None]], argument: Argument) -> None:
        assert self._group, "the application runs"
        self._group.start_soon(task, argument)

    def _used(self, name: str) -> list[Registered]:
        # By any name: a request for an alias reads the files of the aliased adapter.
        return [adapter for adapter in self._withdrawn.values() if adapter.owner == name and self.is_being_deleted(adapter)]

    async def _free_when_unused(self, adapter: Registered) -> None:
        await self._uses.unused(adapter.summary.name, adapter.summary.digest)
        await self._free(adapter)

    async def _free(self, adapter: Registered) -> None:
        name, digest = adapter.summary.name, adapter.summary.digest
        if self._withdrawn.get((name, digest)) is not adapter:
            return  # it was restored, or is free already
        del self._withdrawn[name, digest]
        self._registry.forget(adapter)
        self._uses.forget(name, digest)
        if self._registry.find(digest, ()):
            return  # another name has the same content
        with suppress(EngineDeadError):
            await self._engine.call(lambda engine: _drop(engine, digest))
        logger.info("%s@%s is freed", name, adapter.summary.version)

    async def _delete_when_unused(self, name: str) -> None:
        while name in self._deletions:
            for adapter in self._used(name):
                await self._free_when_unused(adapter)
            while (deletion := self._deletions.get(name)) and (
                remaining_s := deletion.since + self._grace_s - anyio.current_time()
            ) > 0:
                await anyio.sleep(remaining_s)
            async with self._locks.hold(name):
                if name in self._deletions and not self._used(name):
                    await self._try_to_remove(name)

    async def _try_to_remove(self, name: str) -> None:
        try:
            await self._remove(name)
        except (LoriError, ConflictError, StoreError) as error:
            logger.warning("%r was withdrawn, and could not be deleted: %s", name, error)

    async def _remove(self, name: str) -> None:
        deletion = self._deletions.pop(name)
        assert self._remover
        await run_sync(self._remover.remove, [name] if deletion.is_whole else [f"{name}@{v}" for v in sorted(deletion.versions)])
        logger.info("%s is deleted", name if deletion.is_whole else ", ".join(f"{name}@{v}" for v in sorted(deletion.versions)))


def _drop(engine: Engine, digest: str) -> None:
    engine.adapter_cache.drop(digest)
    engine.wake()
