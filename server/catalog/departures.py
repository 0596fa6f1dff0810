"""Adapters that are being withdrawn: freed, and deleted if that was asked for, when the last request that uses them has ended.

A name is changed by one caller at a time within this process; stores have locks of their own for other processes.
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


class Turns:
    """Names that are being changed."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()  # of names that somebody changes or waits for

    @asynccontextmanager
    async def of(self, *names: str) -> AsyncIterator[None]:
        """Wait until nobody else changes one of these names, and lets nobody else before the block ends."""
        async with AsyncExitStack() as held:
            for name in sorted(set(names)):  # in one order everywhere, or two could wait for each other
                await held.enter_async_context(self._locks.setdefault(name, anyio.Lock()))
            yield


Of = TypeVar("Of")


class Remover(Protocol):
    """Removes files."""

    def withdraw(self, references: Sequence[str], versions: Sequence[str]) -> None:
        """Do at once what has not to wait for requests to end. `versions` are all that are meant, as `name@version`."""

    def remove(self, references: Sequence[str]) -> None:
        """Remove versions, names with all their versions, or aliases; what is gone already is no fault."""


@dataclass(slots=True)
class _Doomed:
    """Of one name, the versions whose files go; with `is_whole` the name goes, too."""

    versions: set[str]
    is_whole: bool
    since: float
    """When the last of it was withdrawn, by anyio's clock."""


class Departures:
    """Versions that can be asked for no more. For the event loop alone, while the block of `running` lasts."""

    def __init__(
        self,
        registry: Registry,
        uses: AdapterUses,
        engine: EngineThread,
        turns: Turns,
        remover: Remover | None,
        grace_s: float = 0,
    ) -> None:
        """`grace_s`: how long files stay at least, in seconds, for requests of other processes that have not read them."""
        self._grace_s = grace_s
        self._registry, self._uses, self._engine, self._turns, self._remover = registry, uses, engine, turns, remover
        self._leaving: dict[tuple[str, str], Registered] = {}
        self._doomed: dict[str, _Doomed] = {}
        self._group: TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Let go of things until the block ends, when the engine must have ended; then deletes what was to be deleted."""
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                yield
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                for name in [*self._doomed]:
                    await self._try_to_remove(name)

    def num_using(self, name: str) -> int:
        """Return how many requests use what of `name` is leaving."""
        return sum(self._uses.of(name, digest).num_using for of_name, digest in self._leaving if of_name == name)

    def is_doomed(self, of: Registered) -> bool:
        """Whether the files of an adapter are about to go."""
        return self._is_doomed(of.owner, of.summary.version)

    def check_stays(self, name: str, version: str) -> None:
        """Raise `ConflictError` where the files of a version of `name` are about to go."""
        if self._is_doomed(name, version):
            raise ConflictError(f"{name}@{version} is being deleted, when its last requests have ended")

    async def begin(self, gone: Iterable[Registered]) -> None:
        """Free what was withdrawn, now or as soon as no request uses it."""
        for of in gone:
            self._leaving[of.summary.name, of.summary.digest] = of
            if self._uses.of(of.summary.name, of.summary.digest).num_using:
                self._start(self._free_when_unused, of)
            else:
                await self._free(of)

    def take_back(self, of: Registered) -> None:
        """Let an adapter stay, which is registered again."""
        self._leaving.pop((of.summary.name, of.summary.digest), None)
        if doomed := self._doomed.get(of.summary.name):
            doomed.is_whole = False
            doomed.versions.discard(of.summary.version)

    async def delete(self, name: str, versions: Collection[str], is_whole: bool) -> None:
        """Delete the files of versions that were withdrawn, now or as soon as no request uses them. In the turn of `name`.

        Raises as `AdapterFiles.withdraw`, and as `AdapterFiles.remove` where it is now.
        """
        assert self._remover
        known = [f"{name}@{version}" for version in sorted(versions)]
        await run_sync(self._remover.withdraw, [name] if is_whole else known, known)
        before = self._doomed.get(name, _Doomed(set(), False, 0))
        is_new = name not in self._doomed
        self._doomed[name] = _Doomed(before.versions | set(versions), before.is_whole or is_whole, anyio.current_time())
        if not self._used(name) and not self._grace_s:
            await self._remove(name)
        elif is_new:
            self._start(self._delete_when_unused, name)

    def _is_doomed(self, name: str, version: str) -> bool:
        doomed = self._doomed.get(name)
        return doomed is not None and version in doomed.versions

    def _start(self, task: Callable[[Of], Coroutine[None, None, None]], of: Of) -> None:
        assert self._group, "the application runs"
        self._group.start_soon(task, of)

    def _used(self, name: str) -> list[Registered]:
        # By whatever name: who asked for an alias reads the files of what it means.
        return [of for of in self._leaving.values() if of.owner == name and self.is_doomed(of)]

    async def _free_when_unused(self, of: Registered) -> None:
        await self._uses.unused(of.summary.name, of.summary.digest)
        await self._free(of)

    async def _free(self, of: Registered) -> None:
        name, digest = of.summary.name, of.summary.digest
        if self._leaving.get((name, digest)) is not of:
            return  # it came back, or is free
        del self._leaving[name, digest]
        self._registry.forget(of)
        self._uses.forget(name, digest)
        if self._registry.find(digest, ()):
            return  # the same content has another name
        with suppress(EngineDeadError):
            await self._engine.call(lambda engine: _drop(engine, digest))
        logger.info("%s@%s is freed", name, of.summary.version)

    async def _delete_when_unused(self, name: str) -> None:
        while name in self._doomed:
            for of in self._used(name):
                await self._free_when_unused(of)
            while (doomed := self._doomed.get(name)) and (left := doomed.since + self._grace_s - anyio.current_time()) > 0:
                await anyio.sleep(left)
            async with self._turns.of(name):
                if name in self._doomed and not self._used(name):
                    await self._try_to_remove(name)

    async def _try_to_remove(self, name: str) -> None:
        try:
            await self._remove(name)
        except (LoriError, ConflictError, StoreError) as error:
            logger.warning("%r was withdrawn, and could not be deleted: %s", name, error)

    async def _remove(self, name: str) -> None:
        doomed = self._doomed.pop(name)
        assert self._remover
        await run_sync(self._remover.remove, [name] if doomed.is_whole else [f"{name}@{v}" for v in sorted(doomed.versions)])
        logger.info("%s is deleted", name if doomed.is_whole else ", ".join(f"{name}@{v}" for v in sorted(doomed.versions)))


def _drop(engine: Engine, digest: str) -> None:
    engine.tiers.drop(digest)
    engine.wake()
