"""Adapters in the server's stores: read, described, written and deleted. Callable from any thread.

Errors of stores and file systems are raised without paths of this machine.
"""

import errno
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lori.compare.statistics import ModuleStatistics, statistics
from lori.config import CONFIG_FILE, parse_config
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError, UnreachableError
from lori.format import Files, read_config, read_file, read_files
from lori.identity import BaseIdentity
from lori.names import split_reference
from lori.packed_adapter import PackedAdapter, PackedReader
from lori.peft.config import TEMPLATES_FILE
from lori.peft.importer import is_peft, parse_incoming
from lori.store.bases import load_basis
from lori.store.entry import Entry
from lori.store.files import read_source
from lori.store.hub import SCHEME, resolve
from lori.store.store import AdapterStore
from lori.summary import SummaryReader
from server.catalog.fit import Fit
from server.engine.adapters.loader import REMEDY
from server.engine.adapters.registry import Faulty, Registered
from server.engine.generate_request import RefusedError
from server.errors import ConflictError, StoreError

logger = logging.getLogger(__name__)


MOUNT_HINT = (
    "mount it to be written, such as by LORI_ADAPTERS_MODE=rw for docker/compose.yaml, and let it belong to the server's user, "
    "10001 there"
)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def translated_errors(*stores: AdapterStore | None) -> Iterator[None]:
    """Translate errors of stores in the block to `ConflictError` or `StoreError`.

    Errors that a caller can fix stay as they are.
    """
    try:
        yield
    except UnknownAdapterError:
        raise
    except AdapterFormatError as error:
        raise AdapterFormatError(Path(error.source).name, error.faults) from error
    except UnreachableError as error:
        raise StoreError(str(error)) from error
    except AdapterError as error:
        raise ConflictError(without_paths(str(error), *stores)) from error
    except OSError as error:
        raise folder_error(error, "adapters' folder", MOUNT_HINT) from error


def folder_error(error: OSError, folder: str, hint: str) -> ConflictError | StoreError:
    """Return the error to raise for `error` of a folder, which `folder` names; `hint` says how to mount it writable."""
    reason = error.strerror or type(error).__name__
    if error.errno not in FORBIDDEN:
        return StoreError(f"the {folder} failed: {reason}")
    advice = f": {hint}" if error.errno == errno.EROFS else ""
    return ConflictError(f"the server may not write or read its {folder}: {reason}{advice}")


def without_paths(message: str, *stores: AdapterStore | None) -> str:
    """Return `message` without the folders of `stores`."""
    for root in (str(store.root) for store in stores if store):
        message = message.replace(f"{root}/", "").replace(root, "the store")
    return message


MAX_CACHED = 64
"""Adapters whose statistics are cached."""


@dataclass(frozen=True, slots=True)
class Details:
    """Details of an adapter, as clients see them."""

    card: str
    """Markdown; empty if there is no card."""
    modules: Sequence[ModuleStatistics]


class AdapterDetails:
    """Reader of adapters of `base`, with a cache of their statistics. Use from one thread at a time.

    Between two modules it sleeps as long as the last one took: requests that are being answered come first.
    """

    def __init__(self, base: BaseIdentity, rest: Callable[[float], None] = time.sleep) -> None:
        self._base, self._rest = base, rest
        self._cache: OrderedDict[str, Sequence[ModuleStatistics]] = OrderedDict()  # the most recently used are last

    def read(self, adapter: Registered) -> Details:
        """Return an adapter's details.

        Raises `AdapterFormatError`, `ConflictError` or `StoreError` if it can no longer be read.
        """
        *_, entry = adapter.entries()
        with translated_errors():
            _check_unchanged(read_config(entry.folder).lori.content_digest, entry, adapter.summary.digest)
            return Details(entry.card().decode(errors="replace"), self._statistics(entry, adapter.summary.digest))

    def _statistics(self, entry: Entry, digest: str) -> Sequence[ModuleStatistics]:
        if digest not in self._cache:
            self._cache[digest] = self._compute(entry, digest)
        self._cache.move_to_end(digest)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return self._cache[digest]

    def _compute(self, entry: Entry, digest: str) -> Sequence[ModuleStatistics]:
        adapter = entry.load(self._base)
        _check_unchanged(adapter.config.lori.content_digest, entry, digest)
        since = time.perf_counter()

        def rest() -> None:
            nonlocal since
            self._rest(time.perf_counter() - since)
            since = time.perf_counter()

        return statistics(adapter, rest)


def _check_unchanged(digest: str, entry: Entry, expected: str) -> None:
    if digest != expected:
        raise AdapterFormatError(entry.name, [f"it was changed on disk since the server read of it: {REMEDY}"])


NO_STORE = "this server keeps no adapters: start it with --adapters FOLDER"

STORE_HINT = f"{MOUNT_HINT}; or put the adapter's folder there yourself and POST /adapters/NAME/load"


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that was read and checked, and is not registered yet."""

    adapter: Registered
    packed: PackedAdapter
    others: Sequence[Registered] = ()
    """Other versions of its name."""


class AdapterFiles:
    """The server's own store, which may be written, and the demo adapters, which may not.

    The methods raise `AdapterFormatError`, `UnknownAdapterError`, `RefusedError`, `ConflictError` or `StoreError`.
    """

    def __init__(
        self,
        own_store: AdapterStore | None,
        demo_store: AdapterStore | None,
        reader: PackedReader,
        fit: Fit,
        max_bytes: int,
        fetch: Callable[[str], Path] = resolve,
    ) -> None:
        """`max_bytes` is the limit on the size of an adapter from the hub."""
        self._own_store, self._demo_store, self._reader, self._fit = own_store, demo_store, reader, fit
        self._max_bytes, self._fetch = max_bytes, fetch
        self._summaries = SummaryReader(reader.base)
        self.details = AdapterDetails(reader.base)

    @property
    def grace_s(self) -> float:
        """Seconds that the files should stay after `withdraw`."""
        return self._own_store.grace_s if self._own_store else 0

    def read(self, reference: str, name: str | None = None) -> PreparedAdapter:
        """Read and check the adapter of `reference` in the store, to be registered as `name` or as the store calls it."""
        with translated_errors(self._own_store, self._demo_store):
            if self._own_store:
                self._own_store.pull(*{split_reference(reference)[0], name or split_reference(reference)[0]})
            entry = self._find(reference)
            if name and name != entry.name:
                if self._own_store and self._own_store.versions(name):
                    raise ConflictError(f"{name!r} is another adapter: it can only mean one of its own versions")
                entry = replace(entry, name=name)
            return self._prepare(entry)

    def publish(self, name: str, files: Files) -> PreparedAdapter:
        """Check the adapter that `files` hold, put it in the store as a version of `name`, and make the name refer to it."""
        store = self._writable()
        with translated_errors(store):
            # The config first: the other checks draw A, which takes long for a rank that is too high to serve.
            config = parse_config(files.get(CONFIG_FILE, b""), [])
            if config and config.lori.base_digest == self._reader.base.digest:
                self._fit.check(name, config)
            incoming = parse_incoming(name, files, partial(load_basis, store.root), self._reader.base)
            self._fit.check(name, incoming.adapter.config)
            return self._prepare(store.put(incoming.adapter, incoming.files))

    def fetch(self, source: str) -> Files:
        """Return the files of an adapter on the hub, `hf://owner/name` with an optional `@revision`."""
        if not source.startswith(SCHEME):
            raise RefusedError("hub_id", f"is {source!r}, expected {SCHEME}owner/name[@revision]")
        try:
            folder = self._fetch(source)
        except UnreachableError as error:
            raise StoreError(str(error)) from error
        except AdapterError as error:
            raise RefusedError("hub_id", str(error)) from error
        faults: list[str] = []
        files = dict(read_files(folder, faults, read_source))
        if is_peft(files) and (folder / TEMPLATES_FILE).exists():
            files[TEMPLATES_FILE] = read_file(folder, TEMPLATES_FILE, faults, read_source) or b""
        if faults:
            raise AdapterFormatError(source, faults)
        if (num_bytes := sum(map(len, files.values()))) > self._max_bytes:
            raise RefusedError("hub_id", f"{source} has {num_bytes} bytes, expected {self._max_bytes} at most")
        return files

    def alias(self, alias: str, reference: str) -> PreparedAdapter:
        """Make `alias` refer to the present version of `reference`, in the store, too.

        A name can go back to an older version so.
        """
        store = self._writable()
        with translated_errors(store):
            self._check_own(reference)
            return self._prepare(replace(store.alias(alias, reference), name=alias))

    def meaning(self, reference: str) -> tuple[str, str]:
        """Return the name and the version of `reference` in the store now, as the target of an alias."""
        store = self._writable()
        with translated_errors(store):
            store.pull(split_reference(reference)[0])
            self._check_own(reference)
            entry = store.find(reference)
            return entry.folder.name.partition("@")[0], entry.version

    def check_writable(self) -> None:
        """Raise `ConflictError` if adapters cannot be stored."""
        if not self._writable().may_write():
            raise ConflictError(f"the server may not write its adapters' folder: {STORE_HINT}")

    def versions_to_remove(self, reference: str) -> list[str]:
        """Return the versions that `remove` would remove; none for an alias. Raises the errors that `remove` would raise now."""
        if self._is_demo(reference):
            raise ConflictError(f"{reference!r} is a demo adapter, which is never deleted: it can be unloaded")
        self.check_writable()
        with translated_errors(self._own_store):
            return [removed for entry in self._writable().removable(reference) if (removed := _version(entry))]

    def pack(self, adapter: Registered) -> PackedAdapter:
        """Read and check an adapter that is already registered."""
        with translated_errors(self._own_store, self._demo_store):
            *_, entry = adapter.entries()
            return self._packed(entry, adapter.summary.digest)

    def remove(self, references: Sequence[str]) -> None:
        """Remove versions, names with all their versions, or aliases. A missing one is no fault."""
        with translated_errors(self._own_store):
            for reference in references:
                with suppress(UnknownAdapterError):
                    self._writable().remove(reference)

    def withdraw(self, references: Sequence[str], versions: Sequence[str]) -> None:
        """Do the part of `remove` that need not wait for requests to end. A missing adapter is no fault."""
        with translated_errors(self._own_store):
            for reference in references:
                with suppress(UnknownAdapterError):
                    self._writable().withdraw(reference, versions)

    def others(self, current: Collection[Registered], faulty: Collection[Faulty] = ()) -> tuple[list[Registered], list[Faulty]]:
        """Return the store's versions that are not in `current`, as far as they can be served, and the damaged versions.

        Leaves out the damaged versions that are in `faulty`.
        """
        keys, faulty_folders = (
            {(registered.summary.name, registered.summary.digest) for registered in current},
            {adapter.folder for adapter in faulty},
        )
        entries = [entry for entry in (self._own_store.list() if self._own_store else ()) if "@" in entry.folder.name]
        damaged: list[Faulty] = []
        adapters = [
            registered
            for entry in entries
            if entry.folder.name not in faulty_folders and (registered := self._summarised(entry, damaged))
        ]
        return [adapter for adapter in adapters if (adapter.summary.name, adapter.summary.digest) not in keys], damaged

    def changes(self, by_name: Mapping[str, Registered]) -> tuple[list[str], list[str]]:
        """Return the names that refer to another version in the store than in `by_name`, and those that the store lost.

        A folder without versions, as its author left it, counts as unchanged.
        """
        if self._own_store is None:
            return [], []
        with translated_errors(self._own_store):
            self._own_store.pull()
            contents = self._own_store.contents()
        current = contents.current
        for name, fault in contents.faults.items():
            logger.warning("%r is damaged in the store, and means here what it meant: %s", name, fault)
        changed = [name for name, entry in current.items() if not _is_same(by_name.get(name), entry)]
        root = self._own_store.root
        gone = by_name.keys() - current.keys() - contents.faults.keys()
        return changed, [name for name in by_name if name in gone and by_name[name].entry.folder.parent == root]

    def _find(self, reference: str) -> Entry:
        stores = [store for store in (self._own_store, self._demo_store) if store]
        if not stores:
            raise ConflictError(NO_STORE)
        for store in stores[:-1]:
            with suppress(UnknownAdapterError):
                return store.find(reference)
        return stores[-1].find(reference)

    def _writable(self) -> AdapterStore:
        if self._own_store is None:
            raise ConflictError(NO_STORE)
        return self._own_store

    def _check_own(self, reference: str) -> None:
        if self._is_demo(reference):
            raise ConflictError(f"{reference!r} is a demo adapter, and an alias means one of the server's own")

    def _is_demo(self, reference: str) -> bool:
        name, _ = split_reference(reference)
        is_own = self._own_store and (self._own_store.versions(name) or name in self._own_store.alias_names())
        return bool(self._demo_store and self._demo_store.versions(name)) and not is_own

    def _prepare(self, entry: Entry) -> PreparedAdapter:
        try:
            summary = self._summaries.read(entry)
        except AdapterFormatError:
            entry.load(self._reader.base)  # reports the faults of its other files, too
            raise
        self._fit.check(entry.name, summary)
        packed = self._packed(entry, summary.digest)
        versions = self._own_store.versions(entry.name) if self._own_store else ()
        others = [adapter for other in versions if other.folder != entry.folder and (adapter := self._summarised(other))]
        return PreparedAdapter(Registered(entry, summary), packed, others)

    def _packed(self, entry: Entry, digest: str) -> PackedAdapter:
        packed = self._reader.read_entry(entry)
        if packed.config.lori.content_digest != digest:
            raise ConflictError(f"{entry.name!r} was changed on disk: load it again")
        return packed

    def _summarised(self, entry: Entry, damaged: list[Faulty] | None = None) -> Registered | None:
        try:
            summary = self._summaries.read(entry)
            self._fit.check(entry.name, summary)
        except (AdapterFormatError, ConflictError) as error:
            if damaged is not None and isinstance(error, AdapterFormatError):
                damaged.append(Faulty.from_faults(entry.folder.name, entry.folder.name, error.faults))
            logger.warning("%s cannot be asked for: %s", entry.folder.name, error)
            return None
        return Registered(entry, summary)


def _is_same(adapter: Registered | None, entry: Entry) -> bool:
    return adapter is not None and (adapter.entry.folder == entry.folder or adapter.summary.version == _version(entry))


def _version(entry: Entry) -> str:
    with suppress(AdapterFormatError):
        return entry.version
    return ""
