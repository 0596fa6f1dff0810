"""Adapters in the server's stores: read, described, written and deleted. Runs in any thread.

Errors of stores and file systems are raised without a path of this machine.
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
from server.engine.admission import RefusedError
from server.errors import ConflictError, StoreError

logger = logging.getLogger(__name__)


MOUNT = (
    "mount it to be written, such as by LORI_ADAPTERS_MODE=rw for docker/compose.yaml, and let it belong to the server's user, "
    "10001 there"
)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def told(*stores: AdapterStore | None) -> Iterator[None]:
    """Raise `ConflictError` or `StoreError` for what the block raises of stores; what a caller can mend stays as it is."""
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
        said = error.strerror or type(error).__name__
        if error.errno in FORBIDDEN:
            hint = f": {MOUNT}" if error.errno == errno.EROFS else ""
            raise ConflictError(f"the server may not write or read its adapters' folder: {said}{hint}") from error
        raise StoreError(f"the adapters' folder failed: {said}") from error


def without_paths(message: str, *stores: AdapterStore | None) -> str:
    """Return `message` without the folders of `stores` in it."""
    for root in (str(store.root) for store in stores if store):
        message = message.replace(f"{root}/", "").replace(root, "the store")
    return message


MAX_REMEMBERED = 64
"""Adapters whose statistics are remembered."""


@dataclass(frozen=True, slots=True)
class Details:
    """What is read of an adapter for a person."""

    card: str
    """Markdown; empty where there is none."""
    modules: Sequence[ModuleStatistics]


class AdapterDetails:
    """Reads adapters of `base` and remembers what it computed of them; for one thread at a time.

    Between two modules it rests as long as the last one took: requests that are being answered come first.
    """

    def __init__(self, base: BaseIdentity, rest: Callable[[float], None] = time.sleep) -> None:
        self._base, self._rest = base, rest
        self._known: OrderedDict[str, Sequence[ModuleStatistics]] = OrderedDict()  # those asked for last are last

    def read(self, of: Registered) -> Details:
        """Return the details. Raises `AdapterFormatError`, `ConflictError` or `StoreError` where it cannot be read any more."""
        *_, entry = of.entries()
        with told():
            _check_same(read_config(entry.folder).lori.content_digest, entry, of.summary.digest)
            return Details(entry.card().decode(errors="replace"), self._statistics(entry, of.summary.digest))

    def _statistics(self, entry: Entry, digest: str) -> Sequence[ModuleStatistics]:
        if digest not in self._known:
            self._known[digest] = self._compute(entry, digest)
        self._known.move_to_end(digest)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return self._known[digest]

    def _compute(self, entry: Entry, digest: str) -> Sequence[ModuleStatistics]:
        adapter = entry.load(self._base)
        _check_same(adapter.config.lori.content_digest, entry, digest)
        since = time.perf_counter()

        def rest() -> None:
            nonlocal since
            self._rest(time.perf_counter() - since)
            since = time.perf_counter()

        return statistics(adapter, rest)


def _check_same(found: str, entry: Entry, expected: str) -> None:
    if found != expected:
        raise AdapterFormatError(entry.name, [f"it was changed on disk since the server read of it: {REMEDY}"])


NO_STORE = "this server keeps no adapters: start it with --adapters FOLDER"

PUT_THERE = f"{MOUNT}; or put the adapter's folder there yourself and POST /adapters/NAME/load"


@dataclass(frozen=True, slots=True)
class Ready:
    """An adapter that was read and checked, and is not registered yet."""

    adapter: Registered
    packed: PackedAdapter
    others: Sequence[Registered] = ()
    """Other versions of its name."""


class AdapterFiles:
    """The server's own store, which may be written, and the demo adapters, which may not.

    Raises `AdapterFormatError`, `UnknownAdapterError`, `RefusedError`, `ConflictError` or `StoreError`.
    """

    def __init__(
        self,
        own: AdapterStore | None,
        demo: AdapterStore | None,
        reader: PackedReader,
        fit: Fit,
        max_bytes: int,
        fetch: Callable[[str], Path] = resolve,
    ) -> None:
        """`max_bytes` are those that an adapter from the hub may have."""
        self._own, self._demo, self._reader, self._fit = own, demo, reader, fit
        self._max_bytes, self._fetch = max_bytes, fetch
        self._summaries = SummaryReader(reader.base)
        self.details = AdapterDetails(reader.base)

    @property
    def grace_s(self) -> float:
        """How long after `withdraw` the files should stay, in seconds."""
        return self._own.grace_s if self._own else 0

    def read(self, reference: str, name: str | None = None) -> Ready:
        """Read and checks what `reference` means in the store now, to be asked for as `name`, or as it is called there."""
        with told(self._own, self._demo):
            if self._own:
                self._own.pull(*{split_reference(reference)[0], name or split_reference(reference)[0]})
            entry = self._find(reference)
            if name and name != entry.name:
                if self._own and self._own.versions(name):
                    raise ConflictError(f"{name!r} is another adapter: it can only mean one of its own versions")
                entry = replace(entry, name=name)
            return self._ready(entry)

    def publish(self, name: str, files: Files) -> Ready:
        """Check the adapter that `files` are, puts it in the store as a version of `name`, and makes the name mean it."""
        store = self._writable()
        with told(store):
            # First what it is said to be: A is drawn to check the rest, which takes long at a rank that nobody can serve.
            config = parse_config(files.get(CONFIG_FILE, b""), [])
            if config and config.lori.base_digest == self._reader.base.digest:
                self._fit.check(name, config)
            found = parse_incoming(name, files, partial(load_basis, store.root), self._reader.base)
            self._fit.check(name, found.adapter.config)
            return self._ready(store.put(found.adapter, found.files))

    def fetch(self, source: str) -> Files:
        """Return the files of an adapter on the hub, `hf://owner/name` with maybe `@revision`."""
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

    def alias(self, alias: str, reference: str) -> Ready:
        """Make `alias` mean what `reference` means now, in the store too; a name can go back to one of its versions so."""
        store = self._writable()
        with told(store):
            self._check_own(reference)
            return self._ready(replace(store.alias(alias, reference), name=alias))

    def meaning(self, reference: str) -> tuple[str, str]:
        """Return the adapter and the version that `reference` means in the store now, for an alias to mean it."""
        store = self._writable()
        with told(store):
            store.pull(split_reference(reference)[0])
            self._check_own(reference)
            entry = store.find(reference)
            return entry.folder.name.partition("@")[0], entry.version

    def check_keeps(self) -> None:
        """Raise `ConflictError` where no adapter can be put anywhere."""
        if not self._writable().may_write():
            raise ConflictError(f"the server may not write its adapters' folder: {PUT_THERE}")

    def doomed(self, reference: str) -> list[str]:
        """Return the versions that `remove` would remove; none for an alias. Raises what that would raise now."""
        if self._is_demo(reference):
            raise ConflictError(f"{reference!r} is a demo adapter, which is never deleted: it can be unloaded")
        self.check_keeps()
        with told(self._own):
            return [known for entry in self._writable().doomed(reference) if (known := _version(entry))]

    def pack(self, of: Registered) -> PackedAdapter:
        """Read and checks what is registered already."""
        with told(self._own, self._demo):
            *_, entry = of.entries()
            return self._packed(entry, of.summary.digest)

    def remove(self, references: Sequence[str]) -> None:
        """Remove versions, names with all their versions, or aliases; what is gone already is no fault."""
        with told(self._own):
            for reference in references:
                with suppress(UnknownAdapterError):
                    self._writable().remove(reference)

    def withdraw(self, references: Sequence[str], versions: Sequence[str]) -> None:
        """Do what has to be done at once of what `remove` will do; what is gone already is no fault."""
        with told(self._own):
            for reference in references:
                with suppress(UnknownAdapterError):
                    self._writable().withdraw(reference, versions)

    def others(self, current: Collection[Registered], faulty: Collection[Faulty] = ()) -> tuple[list[Registered], list[Faulty]]:
        """Return the versions in the store that `current` has not, as far as they can be served, and those that are damaged.

        But for those that are known as `faulty`.
        """
        known, faulty_folders = {(of.summary.name, of.summary.digest) for of in current}, {one.folder for one in faulty}
        entries = [entry for entry in (self._own.list() if self._own else ()) if "@" in entry.folder.name]
        damaged: list[Faulty] = []
        found = [of for entry in entries if entry.folder.name not in faulty_folders and (of := self._summarised(entry, damaged))]
        return [of for of in found if (of.summary.name, of.summary.digest) not in known], damaged

    def changes(self, by_name: Mapping[str, Registered]) -> tuple[list[str], list[str]]:
        """Return the names that mean something else in the store now than in `by_name`, and those of it that mean nothing there.

        A folder as its maker left it is taken for what it was.
        """
        if self._own is None:
            return [], []
        with told(self._own):
            self._own.pull()
            contents = self._own.contents()
        current = contents.current
        for name, fault in contents.faults.items():
            logger.warning("%r is damaged in the store, and means here what it meant: %s", name, fault)
        changed = [name for name, entry in current.items() if not _is_same(by_name.get(name), entry)]
        root = self._own.root
        gone = by_name.keys() - current.keys() - contents.faults.keys()
        return changed, [name for name in by_name if name in gone and by_name[name].entry.folder.parent == root]

    def _find(self, reference: str) -> Entry:
        stores = [store for store in (self._own, self._demo) if store]
        if not stores:
            raise ConflictError(NO_STORE)
        for store in stores[:-1]:
            with suppress(UnknownAdapterError):
                return store.find(reference)
        return stores[-1].find(reference)

    def _writable(self) -> AdapterStore:
        if self._own is None:
            raise ConflictError(NO_STORE)
        return self._own

    def _check_own(self, reference: str) -> None:
        if self._is_demo(reference):
            raise ConflictError(f"{reference!r} is a demo adapter, and an alias means one of the server's own")

    def _is_demo(self, reference: str) -> bool:
        name, _ = split_reference(reference)
        is_own = self._own and (self._own.versions(name) or name in self._own.alias_names())
        return bool(self._demo and self._demo.versions(name)) and not is_own

    def _ready(self, entry: Entry) -> Ready:
        try:
            summary = self._summaries.read(entry)
        except AdapterFormatError:
            entry.load(self._reader.base)  # says what is wrong with the rest of it, too
            raise
        self._fit.check(entry.name, summary)
        packed = self._packed(entry, summary.digest)
        versions = self._own.versions(entry.name) if self._own else ()
        others = [of for other in versions if other.folder != entry.folder and (of := self._summarised(other))]
        return Ready(Registered(entry, summary), packed, others)

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
                damaged.append(Faulty.of(entry.folder.name, entry.folder.name, error.faults))
            logger.warning("%s cannot be asked for: %s", entry.folder.name, error)
            return None
        return Registered(entry, summary)


def _is_same(of: Registered | None, entry: Entry) -> bool:
    return of is not None and (of.entry.folder == entry.folder or of.summary.version == _version(entry))


def _version(entry: Entry) -> str:
    with suppress(AdapterFormatError):
        return entry.version
    return ""
