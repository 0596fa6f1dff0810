"""Changes of adapters while requests run: upload, load, unload, delete, pin, alias. Files are read in threads.

A change of a name holds at once for new requests. Requests under way end on the version that they began with. A server that
shares its store with others catches up on changes that it missed.
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
from server.catalog.departures import Departures, NameLocks
from server.catalog.files import NO_STORE, AdapterFiles, Details, PreparedAdapter
from server.catalog.uses import AdapterUses
from server.engine.adapters.registry import Faulty, FaultyAdapterError, Registered, Registry, unknown_error
from server.engine.adapters.residents import NoRoomError
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.errors import AdapterFailedError, BusyError, ConflictError, StoreError
from server.settings import MAX_RECEIVED

logger = logging.getLogger(__name__)


Result = TypeVar("Result")
PIN_S = 10.0
"""Seconds that a pin waits for running requests to make room."""
POLL_S = 0.05
MAX_WAITING = 16
"""Requests for the details of an adapter that wait for another one."""


class AlreadyLoadedError(ConflictError):
    """The name already refers to an adapter, and the request may not replace it."""


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Versions that requests can name no more, and the number of requests under way that still use them."""

    name: str
    versions: Sequence[str]
    num_using: int


class AdapterAdmin:
    """Changes of the adapters that are served. Use from the event loop alone. No change waits for a request to end.

    `required` returns the references of adapters that tenants' policies need; these are not withdrawn. The methods raise errors
    of the error table.
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
        self._locks = NameLocks()
        self._departures = Departures(registry, uses, engine, self._locks, files, files.grace_s if files else 0)
        self._read_semaphore = anyio.Semaphore(1)  # an adapter that is read takes a core, and memory
        self._detail_limiter, self._list_limiter = anyio.CapacityLimiter(1), anyio.CapacityLimiter(2)
        self._num_received = self._num_details = 0
        self._pins: dict[str, str] = {}

    @property
    def pins(self) -> Mapping[str, str]:
        """The pinned names, with the digests of their adapters."""
        return self._pins

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the deletions of adapters until the block ends, by when the engine must have ended."""
        async with self._departures.running():
            yield

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Count an adapter that is received in memory until the block ends.

        Raises if none can be stored, or too many are received.
        """
        self._files.check_writable()
        if self._num_received == MAX_RECEIVED:
            raise BusyError(f"{MAX_RECEIVED} adapters are being received, which is the limit; try again")
        self._num_received += 1
        try:
            yield
        finally:
            self._num_received -= 1

    async def details(self, adapter: Registered) -> Details:
        """Read all details of an adapter for a client. One at a time, so that admission finds free threads."""
        files = self._files
        if self._num_details > MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} requests wait for adapters to be read, which is the limit; try again")
        self._num_details += 1
        try:
            return await run_sync(files.details.read, adapter, limiter=self._detail_limiter)
        except AdapterFormatError as error:  # names the adapter as the request does, not by its folder
            raise AdapterFailedError(f"adapter {adapter.summary.name!r} cannot be read: {'; '.join(error.shown)}") from error
        finally:
            self._num_details -= 1

    async def write_list(self, write: Callable[[], bytes]) -> bytes:
        """Run `write` for a list of adapters, which may be long, in a thread. At most two at a time."""
        return await run_sync(write, limiter=self._list_limiter)

    async def publish(self, name: str, content: Files, may_replace: bool = True) -> Registered:
        """Put an adapter in the store as a new version, and make `name` refer to it."""
        files = self._files
        async with self._locks.hold(name):
            self._check_replaceable(name, may_replace)
            ready = await self._read(lambda: files.publish(name, content))
            self._departures.restore(ready.adapter)
            adapter = await self._register(ready)
        await self._reload_mended(adapter)
        return adapter

    async def publish_from_hub(self, name: str, source: str, may_replace: bool = True) -> Registered:
        """Fetch an adapter from the hub and publish it as `publish` does."""
        files = self._files
        async with self.receiving():
            self._check_replaceable(name, may_replace)
            return await self.publish(name, await run_sync(files.fetch, source), may_replace)

    async def load(self, reference: str, name: str | None = None, may_replace: bool = True) -> Registered:
        """Read the adapter of `reference` from the store, and make `name`, or the adapter's own name, refer to it."""
        files = self._files
        owner, _ = split_reference(reference)
        async with self._locks.hold(name or owner, owner):
            self._check_replaceable(name or owner, may_replace)
            try:
                ready = await self._read(lambda: files.read(reference, name))
            except AdapterFormatError as error:
                self._note_faults(name or reference, error)
                raise
            adapter = await self._register(ready)
        await self._reload_mended(adapter)
        return adapter

    async def alias(self, alias: str, reference: str) -> Registered:
        """Make `alias` refer to the present version of `reference`, in the store, too."""
        files = self._files
        owner, version = await run_sync(files.meaning, reference)
        async with self._locks.hold(alias, owner):
            self._departures.check_not_deleted(owner, version)  # before any write
            return await self._register(await self._read(lambda: files.alias(alias, f"{owner}@{version}")))

    async def unload(self, reference: str) -> Withdrawal:
        """Withdraw a name with its versions, or a version that is not the name's current one. The files stay."""
        name, version = split_reference(reference)
        async with self._locks.hold(name):
            withdrawn = await self._withdraw(name, version)
            await self._departures.begin(withdrawn)
            return self._withdrawn(name, [adapter.summary.version for adapter in withdrawn])

    async def delete(self, reference: str) -> Withdrawal:
        """Withdraw a name with its versions, a version or an alias. Deletes the files when no request uses them."""
        name, version = split_reference(reference)
        async with self._locks.hold(name):
            versions = await self._versions_to_delete(reference)
            self._check_unaliased(name, versions)
            if any(adapter.summary.version.startswith(version) for adapter in self._registry.versions(name)):
                await self._departures.begin(await self._withdraw(name, version, may_be_meant=True))
            await self._departures.delete(name, versions, is_whole=not version)
            self._registry.remove_faulty([f"{name}@{removed}" for removed in versions] if version else [name])
            return self._withdrawn(name, versions)

    async def pin(self, name: str) -> Registered:
        """Make a name's adapter resident and keep it so, also when the name changes, until it is unpinned."""
        files = self._files
        async with self._locks.hold(name):
            adapter = await self._registered(name)
            packed = await self._read(lambda: files.pack(adapter))
            end = anyio.current_time() + PIN_S
            # Never cancelled while the engine pins the adapter: the pin would be lost track of.
            while not await self._pin(adapter.summary.digest, packed):
                if anyio.current_time() >= end:
                    message = f"all room is used by running requests for {PIN_S:g} s, none of it for {name!r}; try again"
                    raise BusyError(message)
                await anyio.sleep(POLL_S)
            self._pins[name] = adapter.summary.digest
            return adapter

    async def unpin(self, name: str) -> Registered:
        """Unpin a name's adapter, so that it can be evicted again."""
        async with self._locks.hold(name):
            adapter = await self._registered(name)
            await self._unpin(name)
            return adapter

    @property
    def _files(self) -> AdapterFiles:
        if self._maybe_files is None:
            raise ConflictError(NO_STORE)
        return self._maybe_files

    async def _read(self, read: Callable[[], Result]) -> Result:
        async with self._read_semaphore:
            return await run_sync(read)

    async def _registered(self, name: str) -> Registered:
        adapter = self._registry.by_name.get(name)
        if adapter is None:
            raise await self._unknown(name)
        return adapter

    def _note_faults(self, name: str, error: AdapterFormatError) -> None:
        # Updates the faults of an adapter that was damaged at start; they may have changed.
        if faulty := self._registry.faulty.get(name):
            self._registry.add_faulty([Faulty.from_faults(name, faulty.folder, error.faults)])

    async def _reload_mended(self, adapter: Registered) -> None:
        """Load the aliases that were faulty because of the files of `adapter`, which are sound now."""
        folder = adapter.entry.folder.name
        for faulty in [*self._registry.faulty.values()]:
            if "@" in folder and faulty.folder == folder and "@" not in faulty.reference:
                try:
                    await self.load(faulty.name)
                except (LoriError, ConflictError, StoreError) as error:
                    logger.warning("%r is damaged still: %s", faulty.name, error)

    async def _unknown(self, reference: str) -> UnknownAdapterError | FaultyAdapterError:
        return await run_sync(unknown_error, self._registry, reference, lambda _: True)  # searches all names for near ones

    async def _register(self, ready: PreparedAdapter) -> Registered:
        adapter, departures = ready.adapter, self._departures
        name, digest = adapter.summary.name, adapter.summary.digest
        departures.check_not_deleted(adapter.owner, adapter.summary.version)
        await self._engine.call(lambda engine: _cache_packed(engine, digest, ready.packed))
        stale = self._registry.put(adapter, [other for other in ready.others if not departures.is_being_deleted(other)])
        for other in self._registry.versions(name):
            departures.restore(other)
        await self._move_pin(adapter, ready.packed)
        await departures.begin(stale)
        logger.info("%s means %s@%s", name, adapter.owner, adapter.summary.version)
        return adapter

    async def _withdraw(self, name: str, version: str, may_be_meant: bool = False) -> Sequence[Registered]:
        adapters = [adapter for adapter in self._registry.versions(name) if adapter.summary.version.startswith(version)]
        if not adapters:
            raise await self._unknown(f"{name}@{version}" if version else name)
        if not version or adapters == [self._registry.by_name.get(name)]:
            if version and not may_be_meant:
                raise ConflictError(f"{name}@{version} is what {name!r} means: unload {name!r}, or let it mean another version")
            self._check_withdrawable(name, "")
            return self._registry.withdraw(name)
        if len(adapters) > 1:
            choices = " or ".join(f"{name}@{adapter.summary.version}" for adapter in adapters)
            raise ConflictError(f"{name}@{version} could be {choices}")
        self._check_withdrawable(name, adapters[0].summary.version)
        self._registry.withdraw_version(adapters[0])
        return adapters

    def _withdrawn(self, name: str, versions: Sequence[str]) -> Withdrawal:
        return Withdrawal(name, versions, self._departures.num_using(name))

    async def _versions_to_delete(self, reference: str) -> Sequence[str]:
        name, version = split_reference(reference)
        try:
            return await run_sync(self._files.versions_to_remove, reference)
        except UnknownAdapterError:
            # Another process that serves this store got the request first and has deleted the files. The versions are still
            # registered here.
            adapters = [adapter for adapter in self._registry.versions(name) if adapter.summary.version.startswith(version)]
            if not adapters:
                raise
            if version and (aliased := next((adapter for adapter in adapters if adapter.owner != name), None)):
                target = f"{aliased.owner}@{aliased.summary.version}"
                raise ConflictError(f"{name!r} is an alias of {target}: delete {name!r}, or {target}") from None
            return [adapter.summary.version for adapter in adapters if adapter.owner == name]

    def _check_replaceable(self, name: str, may_replace: bool) -> None:
        if not may_replace and name in self._registry.by_name:
            raise AlreadyLoadedError(f"{name!r} is there already")

    def _check_withdrawable(self, name: str, version: str) -> None:
        """Raise `ConflictError` if a name, or one version of it, may not be withdrawn: it is pinned, or a policy needs it."""
        for reference in self._required():
            required_name, _, required_version = reference.partition("@")
            if required_name == name and (not version or (required_version and version.startswith(required_version))):
                raise ConflictError(
                    f"{reference!r} is added to all requests of a tenant: take it out of the tenant's policy first"
                )
        if name in self._pins and not version:
            raise ConflictError(f"{name!r} is pinned: unpin it first")

    def _check_unaliased(self, name: str, versions: Collection[str]) -> None:
        """Raise `ConflictError` if another name refers to one of these versions, in the store or only in this process."""
        others = [
            adapter for adapter in self._registry.by_name.values() if adapter.owner == name and adapter.summary.name != name
        ]
        if aliases := [adapter for adapter in others if adapter.summary.version in versions]:
            meanings = ", ".join(f"{adapter.summary.name!r} means {name}@{adapter.summary.version}" for adapter in aliases)
            raise ConflictError(f"{meanings}: let it mean something else, or delete or unload it first")

    async def _pin(self, digest: str, packed: PackedAdapter) -> bool:
        try:
            return await self._engine.call(lambda engine: _pin(engine, digest, packed))
        except NoRoomError as error:
            raise ConflictError(str(error)) from error

    async def _unpin(self, name: str) -> None:
        digest = self._pins.pop(name, None)
        if digest and digest not in self._pins.values():
            await self._engine.call(lambda engine: engine.adapter_cache.residents.unpin(digest))

    async def _move_pin(self, adapter: Registered, packed: PackedAdapter) -> None:
        name, digest = adapter.summary.name, adapter.summary.digest
        if self._pins.get(name, digest) == digest:
            return
        await self._unpin(name)
        try:
            is_pinned = await self._pin(digest, packed)
        except ConflictError:
            is_pinned = False
        if is_pinned:
            self._pins[name] = digest
        else:
            logger.warning("%r is pinned no more: there is no room for what it means now, %s", name, adapter.summary.version)


def _cache_packed(engine: Engine, digest: str, packed: PackedAdapter) -> None:
    engine.adapter_cache.insert(digest, packed)
    engine.wake()


def _pin(engine: Engine, digest: str, packed: PackedAdapter) -> bool:
    engine.wake()
    return engine.adapter_cache.pin(digest, packed)


REFUSALS = (LoriError, BusyError, ConflictError)


async def catch_up(admin: AdapterAdmin, files: AdapterFiles, registry: Registry, pins: Collection[str]) -> None:
    """Make all names refer to their present versions in the store, and pin those of `pins`. Logs each change that fails.

    Raises `StoreError` if the store fails.
    """
    try:
        changed, gone = await run_sync(files.changes, registry.by_name)
    except REFUSALS as error:
        logger.warning("what was changed meanwhile is not known here: %s", error)
        changed, gone = [], []
    for name in gone:
        await _attempt(admin.unload, name)
    for name in changed:
        await _attempt(admin.load, name, is_known=name in registry.faulty)
    for name in sorted(set(pins) - admin.pins.keys()):
        await _attempt(admin.pin, name)


async def _attempt(change: Callable[[str], Awaitable[object]], name: str, *, is_known: bool = False) -> None:
    try:
        await change(name)
    except REFUSALS as error:
        if is_known:  # it was damaged at start, and the log has the faults
            logger.info("%r is damaged still", name)
            return
        logger.warning("%r is not as on the other replicas: %s", name, error)
