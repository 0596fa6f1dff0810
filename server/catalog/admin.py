"""Changes of adapters while requests run: upload, load, unload, delete, pin, alias. Files are read in threads.

A name's new meaning holds at once for new requests; requests under way end on what they began with. A server that shares its
store with others catches up on changes that it did not hear of.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import anyio
from anyio.to_thread import run_sync

from lori.errors import AdapterFormatError, LoriError, UnknownAdapterError
from lori.format import Files
from lori.names import split_reference
from lori.packed_adapter import PackedAdapter
from server.catalog.departures import Departures, Turns
from server.catalog.files import NO_STORE, AdapterFiles, Details, Ready
from server.catalog.uses import AdapterUses
from server.engine.adapters.cache import NoRoomError
from server.engine.adapters.registry import Faulty, FaultyAdapterError, Registered, Registry, unknown
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.errors import AdapterFailedError, BusyError, ConflictError, StoreError
from server.settings import MAX_RECEIVED

logger = logging.getLogger(__name__)


Found = TypeVar("Found")
PIN_S = 10.0
"""How long a pin waits for running requests to make room."""
LOOK_S = 0.05
MAX_WAITING = 16
"""Requests for the whole of an adapter that wait for another one."""


class LoadedError(ConflictError):
    """The name means something already, and is not to mean another thing."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What can be asked for no more, and how many requests under way still use it."""

    name: str
    versions: Sequence[str]
    num_using: int


class AdapterAdmin:
    """Changes which adapters there are, for the event loop alone. No change waits for a request to end.

    `required` gives the references of adapters that tenants cannot do without: these are not withdrawn. Raises what the table of
    errors knows.
    """

    def __init__(
        self,
        registry: Registry,
        uses: AdapterUses,
        engine: EngineThread,
        files: AdapterFiles | None,
        required: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._registry, self._uses, self._engine, self._maybe_files, self._required = registry, uses, engine, files, required
        self._turns = Turns()
        self._departures = Departures(registry, uses, engine, self._turns, files, files.grace_s if files else 0)
        self._reading = anyio.Semaphore(1)  # one adapter at a time takes a core, and memory
        self._detailing, self._listing = anyio.CapacityLimiter(1), anyio.CapacityLimiter(2)
        self._num_received = self._num_detailed = 0
        self._pins: dict[str, str] = {}

    @property
    def pins(self) -> Mapping[str, str]:
        """The pinned names, with the digest of what each means."""
        return self._pins

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run until the block ends, when the engine must have ended."""
        async with self._departures.running():
            yield

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Let an adapter be received, in memory, until the block ends. Raises where none can be kept, or many are received."""
        self._files.check_keeps()
        if self._num_received == MAX_RECEIVED:
            raise BusyError(f"{MAX_RECEIVED} adapters are being received, which is the limit; try again")
        self._num_received += 1
        try:
            yield
        finally:
            self._num_received -= 1

    async def details(self, of: Registered) -> Details:
        """Read the whole of an adapter, for a person; one at a time, so that admission finds threads."""
        files = self._files
        if self._num_detailed > MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} requests wait for adapters to be read, which is the limit; try again")
        self._num_detailed += 1
        try:
            return await run_sync(files.details.read, of, limiter=self._detailing)
        except AdapterFormatError as error:  # by the name that was asked for, not by its folder's
            raise AdapterFailedError(f"adapter {of.summary.name!r} cannot be read: {'; '.join(error.shown)}") from error
        finally:
            self._num_detailed -= 1

    async def listed(self, write: Callable[[], bytes]) -> bytes:
        """Write a list of adapters, which may be long, likewise."""
        return await run_sync(write, limiter=self._listing)

    async def publish(self, name: str, content: Files, may_replace: bool = True) -> Registered:
        """Put an adapter in the store, as a new version, and makes `name` mean it."""
        files = self._files
        async with self._turns.of(name):
            self._check_new(name, may_replace)
            ready = await self._read(lambda: files.publish(name, content))
            self._departures.take_back(ready.adapter)
            adapter = await self._register(ready)
        await self._load_mended(adapter)
        return adapter

    async def publish_from_hub(self, name: str, source: str, may_replace: bool = True) -> Registered:
        """The same with an adapter on the hub, which is fetched."""
        files = self._files
        async with self.receiving():
            self._check_new(name, may_replace)
            return await self.publish(name, await run_sync(files.fetch, source), may_replace)

    async def load(self, reference: str, name: str | None = None, may_replace: bool = True) -> Registered:
        """Read what `reference` means in the store now, and makes `name`, or its own name, mean it."""
        files = self._files
        owner, _ = split_reference(reference)
        async with self._turns.of(name or owner, owner):
            self._check_new(name or owner, may_replace)
            try:
                ready = await self._read(lambda: files.read(reference, name))
            except AdapterFormatError as error:
                self._note_faults(name or reference, error)
                raise
            adapter = await self._register(ready)
        await self._load_mended(adapter)
        return adapter

    async def alias(self, alias: str, reference: str) -> Registered:
        """Make `alias` mean what `reference` means now, in the store too."""
        files = self._files
        owner, version = await run_sync(files.meaning, reference)
        async with self._turns.of(alias, owner):
            self._departures.check_stays(owner, version)  # before anything is written
            return await self._register(await self._read(lambda: files.alias(alias, f"{owner}@{version}")))

    async def unload(self, reference: str) -> Withdrawn:
        """Withdraw a name with its versions, or a version that its name does not mean. Its files stay."""
        name, version = split_reference(reference)
        async with self._turns.of(name):
            gone = await self._withdraw(name, version)
            await self._departures.begin(gone)
            return self._withdrawn(name, [of.summary.version for of in gone])

    async def delete(self, reference: str) -> Withdrawn:
        """Withdraw a name with its versions, a version or an alias, and deletes its files when no request uses them."""
        name, version = split_reference(reference)
        async with self._turns.of(name):
            doomed = await self._doomed(reference)
            self._check_unaliased(name, doomed)
            if any(of.summary.version.startswith(version) for of in self._registry.versions(name)):
                await self._departures.begin(await self._withdraw(name, version, may_be_meant=True))
            await self._departures.delete(name, doomed, is_whole=not version)
            self._registry.clear_faults([f"{name}@{one}" for one in doomed] if version else [name])
            return self._withdrawn(name, doomed)

    async def pin(self, name: str) -> Registered:
        """Make what a name means resident, and keeps it so whatever it means later, until it is unpinned."""
        files = self._files
        async with self._turns.of(name):
            of = await self._registered(name)
            packed = await self._read(lambda: files.pack(of))
            end = anyio.current_time() + PIN_S
            # Never left while the engine acts: it would keep what nobody knows of.
            while not await self._keep(of.summary.digest, packed):
                if anyio.current_time() >= end:
                    said = f"all room is used by running requests for {PIN_S:g} s, none of it for {name!r}; try again"
                    raise BusyError(said)
                await anyio.sleep(LOOK_S)
            self._pins[name] = of.summary.digest
            return of

    async def unpin(self, name: str) -> Registered:
        """Let what a name means make room for others again."""
        async with self._turns.of(name):
            of = await self._registered(name)
            await self._release(name)
            return of

    @property
    def _files(self) -> AdapterFiles:
        if self._maybe_files is None:
            raise ConflictError(NO_STORE)
        return self._maybe_files

    async def _read(self, read: Callable[[], Found]) -> Found:
        async with self._reading:
            return await run_sync(read)

    async def _registered(self, name: str) -> Registered:
        of = self._registry.by_name.get(name)
        if of is None:
            raise await self._unknown(name)
        return of

    def _note_faults(self, name: str, error: AdapterFormatError) -> None:
        # Of what is damaged as it was at start, perhaps in another way.
        if known := self._registry.faulty.get(name):
            self._registry.note_faulty([Faulty.of(name, known.folder, error.faults)])

    async def _load_mended(self, adapter: Registered) -> None:
        """Load the aliases that were faulty because of the files of `adapter`, which are sound now."""
        folder = adapter.entry.folder.name
        for faulty in [*self._registry.faulty.values()]:
            if "@" in folder and faulty.folder == folder and "@" not in faulty.reference:
                try:
                    await self.load(faulty.name)
                except (LoriError, ConflictError, StoreError) as error:
                    logger.warning("%r is damaged still: %s", faulty.name, error)

    async def _unknown(self, reference: str) -> UnknownAdapterError | FaultyAdapterError:
        return await run_sync(unknown, self._registry, reference, lambda _: True)  # it looks for near names among all

    async def _register(self, ready: Ready) -> Registered:
        adapter, departures = ready.adapter, self._departures
        name, digest = adapter.summary.name, adapter.summary.digest
        departures.check_stays(adapter.owner, adapter.summary.version)
        await self._engine.call(lambda engine: _take_in(engine, digest, ready.packed))
        stale = self._registry.put(adapter, [of for of in ready.others if not departures.is_doomed(of)])
        for of in self._registry.versions(name):
            departures.take_back(of)
        await self._move_pin(adapter, ready.packed)
        await departures.begin(stale)
        logger.info("%s means %s@%s", name, adapter.owner, adapter.summary.version)
        return adapter

    async def _withdraw(self, name: str, version: str, may_be_meant: bool = False) -> Sequence[Registered]:
        found = [of for of in self._registry.versions(name) if of.summary.version.startswith(version)]
        if not found:
            raise await self._unknown(f"{name}@{version}" if version else name)
        if not version or found == [self._registry.by_name.get(name)]:
            if version and not may_be_meant:
                raise ConflictError(f"{name}@{version} is what {name!r} means: unload {name!r}, or let it mean another version")
            self._check_free(name, "")
            return self._registry.withdraw(name)
        if len(found) > 1:
            said = " or ".join(f"{name}@{of.summary.version}" for of in found)
            raise ConflictError(f"{name}@{version} could be {said}")
        self._check_free(name, found[0].summary.version)
        self._registry.withdraw_version(found[0])
        return found

    def _withdrawn(self, name: str, versions: Sequence[str]) -> Withdrawn:
        return Withdrawn(name, versions, self._departures.num_using(name))

    async def _doomed(self, reference: str) -> Sequence[str]:
        name, version = split_reference(reference)
        try:
            return await run_sync(self._files.doomed, reference)
        except UnknownAdapterError:
            # Another process that serves this store was asked first, and has deleted the files: what is left is here.
            found = [of for of in self._registry.versions(name) if of.summary.version.startswith(version)]
            if not found:
                raise
            return [of.summary.version for of in found if of.owner == name]

    def _check_new(self, name: str, may_replace: bool) -> None:
        if not may_replace and name in self._registry.by_name:
            raise LoadedError(f"{name!r} is there already")

    def _check_free(self, name: str, version: str) -> None:
        """Raise `ConflictError` where a name, or one version of it, is not to be withdrawn."""
        for reference in self._required():
            of, _, of_version = reference.partition("@")
            if of == name and (not version or (of_version and version.startswith(of_version))):
                raise ConflictError(
                    f"{reference!r} is added to all requests of a tenant: take it out of the tenant's policy first"
                )
        if name in self._pins and not version:
            raise ConflictError(f"{name!r} is pinned: unpin it first")

    def _check_unaliased(self, name: str, versions: Collection[str]) -> None:
        """Raise `ConflictError` where another name means one of these versions, be it in the store or only here."""
        others = [of for of in self._registry.by_name.values() if of.owner == name and of.summary.name != name]
        if held := [of for of in others if of.summary.version in versions]:
            said = ", ".join(f"{of.summary.name!r} means {name}@{of.summary.version}" for of in held)
            raise ConflictError(f"{said}: let it mean something else, or delete or unload it first")

    async def _keep(self, digest: str, packed: PackedAdapter) -> bool:
        try:
            return await self._engine.call(lambda engine: _keep(engine, digest, packed))
        except NoRoomError as error:
            raise ConflictError(str(error)) from error

    async def _release(self, name: str) -> None:
        digest = self._pins.pop(name, None)
        if digest and digest not in self._pins.values():
            await self._engine.call(lambda engine: engine.tiers.residents.release(digest))

    async def _move_pin(self, adapter: Registered, packed: PackedAdapter) -> None:
        name, digest = adapter.summary.name, adapter.summary.digest
        if self._pins.get(name, digest) == digest:
            return
        await self._release(name)
        try:
            is_kept = await self._keep(digest, packed)
        except ConflictError:
            is_kept = False
        if is_kept:
            self._pins[name] = digest
        else:
            logger.warning("%r is pinned no more: there is no room for what it means now, %s", name, adapter.summary.version)


def _take_in(engine: Engine, digest: str, packed: PackedAdapter) -> None:
    engine.tiers.take_in(digest, packed)
    engine.wake()


def _keep(engine: Engine, digest: str, packed: PackedAdapter) -> bool:
    engine.wake()
    return engine.tiers.keep(digest, packed)


REFUSALS = (LoriError, BusyError, ConflictError)


async def catch_up(admin: AdapterAdmin, files: AdapterFiles, registry: Registry, pins: Collection[str]) -> None:
    """Let names mean what they mean in the store now, and pins those of `pins`. What cannot be so is said in the log.

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
