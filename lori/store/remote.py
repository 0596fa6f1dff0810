"""A store of adapters that lies elsewhere, at any address of fsspec's, as a store here: `lori.store.mirror` says what there is.

    s3://bucket/adapters/math@1765747cce63/   laid out as `lori.store.store` says; of a version its config is written last
    s3://bucket/adapters/.aliases/math        written after that; what goes, goes in the reverse order

There are no locks: whatever several processes do to it, each step may have been done by another one already, and the alias
that is written last counts. A reader finds what a name meant, or means.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn
from weakref import WeakValueDictionary

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.config import CONFIG_FILE, ExplicitConfig
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, MAX_TEXT_BYTES, WEIGHTS_FILE, Files, read_config, read_file
from lori.names import check_name, split_reference
from lori.store.bases import basis_bytes, basis_file, load_basis
from lori.store.entry import CachedEntry, Entry, Scan
from lori.store.files import LINK, LINKED_FOLDER, discard, read_stored, replace_file, sync_file
from lori.store.mirror import ADAPTER_FILES, Mirror, WeightCache, alias_path, take_place
from lori.store.remote_folder import RemoteFolder
from lori.store.store import NUM_LOOKS, AdapterStore

GONE = "its files are in the store no more: it was deleted there"


class RemoteStore(AdapterStore):
    """The store in `remote`. What it holds comes to a folder in `cache`, which is this process's own as long as it lives.

    Weights come when an entry is held, in any thread, and stay within `max_bytes`. What this says there is was so when `pull` was
    called last, for all or for a name; what changes anything calls it first. A folder as its maker left it can be read, and
    not be pinned or published over: that takes a rename, which object stores have not. Raises what `RemoteFolder` raises, too.
    """

    def __init__(self, remote: RemoteFolder, cache: Path, max_bytes: int, grace_s: float = 0) -> None:
        """Raise `AdapterError` as `pull`, and where `cache` cannot be written."""
        self.grace_s = grace_s
        self._remote = remote
        self._lock, self._fetching_lock = threading.RLock(), threading.Lock()
        self._fetching: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # of what somebody fetches, or waits for
        self._withdrawn: dict[str, set[str]] = {}
        try:
            place, self._place_lock = take_place(cache)
            super().__init__(place)
            self._weights = WeightCache(place, max_bytes)
            self._mirror = Mirror(remote, place, self._weights)
            self.pull()
        except OSError as error:
            raise AdapterError(f"its cache {cache} cannot be written: {error.strerror}") from error

    def pull(self, *names: str) -> None:
        """Look at what there is of these names now, and of what they mean; or of all where none is given."""
        with self._lock:
            if not names:
                for _ in range(NUM_LOOKS):
                    self._mirror.look_at_all()
                    if all(map(self._has, self._aliases.readable().values())):
                        return  # else a version may have come when the versions were listed already
                return
            self._mirror.look_at(names)
            owners = {meant.partition("@")[0] for name in names if (meant := self._aliases.get(name))}
            self._mirror.look_at(sorted(owners.difference(names)))

    def may_write(self) -> bool:
        """Says yes: a file system tells only when it is written to."""
        return True

    def put(self, adapter: Adapter, files: Files) -> Entry:
        """As `AdapterStore.put`."""
        check_name(adapter.name)
        name, folder = adapter.name, f"{adapter.name}@{adapter.version}"
        with self._lock, self._weights.held(folder):
            self.pull(name)
            self._check_not_plain(name)
            self._take_back(name, folder)
            before, others = self._aliases.get(name), [other.folder.name for other in self.versions(name)]
            known = self._record(folder) if self._has(folder) else {}
            self._prepare(folder, files, known)
            self._mirror.forget([alias_path(name), f"{folder}/{CONFIG_FILE}"])
            entry = super().put(adapter, files)
            if before is None and len(others) == 1 and others != [folder]:
                self._write_alias(name, others[0])  # until the new version is there, the name means what it meant
            self._write_basis(adapter)
            self._write_files(folder, {file: content for file, content in files.items() if known.get(file) != content})
            self._write_alias(name, folder)
            self.pull(name)
            if not self._has(folder):
                raise AdapterError(f"{folder} was deleted by another process while it was published")
        return entry

    def save(self, adapter: Adapter) -> NoReturn:
        """Raise `AdapterError`: what a maker leaves is replaced in place, and `add` is what publishes at an address."""
        raise AdapterError(f"{adapter.name!r} cannot be saved in {self._remote.name} as its maker leaves it: publish it")

    def alias(self, alias: str, reference: str) -> Entry:
        """As `AdapterStore.alias`."""
        check_name(alias)
        with self._lock:
            self.pull(alias, split_reference(reference)[0])
            owner = self.find(reference).folder.name.partition("@")[0]
            self._check_not_plain(owner)
            self.pull(owner)
            before = {name: self._aliases.get(name) for name in (owner, alias)}
            self._mirror.forget(map(alias_path, before))
            entry = super().alias(alias, reference)
            for name, meant in before.items():
                if (means := self._aliases.get(name)) and means != meant:
                    self._write_alias(name, means)
        return entry

    def doomed(self, reference: str) -> Sequence[Entry]:
        """As `AdapterStore.doomed`."""
        name, version = split_reference(reference)
        with self._lock:
            self.pull(name)
            self._mirror.look_at_aliases()
            return self._doomed(name, version)[0]

    def withdraw(self, reference: str, versions: Sequence[str] = ()) -> None:
        """Remove aliases and configs: nobody finds it any more. Who has its config can fetch the rest until it is removed."""
        name, version = split_reference(reference)
        with self._lock:
            withdrawn = self._withdrawn.setdefault(name, set()) if versions else self._withdrawn.get(name, set())
            withdrawn |= {*versions}
            doomed = [entry.folder.name for entry in self.doomed(reference)]
            self._withdrawn[name] = withdrawn | {*doomed}
            # What the name means goes last: a crash leaves the name with fewer versions.
            meant = None if version else self._meant(name)
            self._mirror.forget([alias_path(name)])
            self._remote.remove(f"{folder}/{CONFIG_FILE}" for folder in doomed if folder != meant)
            if not version:
                self._remote.remove([alias_path(name)])
            self._remote.remove(f"{folder}/{CONFIG_FILE}" for folder in doomed if folder == meant)
            self.pull(name)

    def remove(self, reference: str) -> Sequence[str]:
        """As `AdapterStore.remove`; where it was withdrawn before, removes the rest alone. An explicit basis stays."""
        name, version = split_reference(reference)
        with self._lock:
            if name not in self._withdrawn:
                self.withdraw(reference)
            withdrawn = self._withdrawn.pop(name)
            gone = {folder for folder in withdrawn if folder.startswith(f"{name}@{version}") or not version}
            if left := withdrawn - gone:
                self._withdrawn[name] = left
            for folder in gone:
                self._sweep(folder)
        return sorted(gone) or [name]

    @contextmanager
    def held(self, folder: str) -> Iterator[Path]:
        """Give the folder of that name with all its files, until the block ends.

        Where the block finds it damaged, it is fetched again for the next who asks. Raises `AdapterFormatError` where its files
        are gone, `UnreachableError` where they do not come.
        """
        with self._weights.held(folder):
            with self._alone(folder):
                if not (self.root / folder / WEIGHTS_FILE).is_file():
                    self._fetch(folder)
                try:
                    self._weights.use(folder)
                except FileNotFoundError as error:  # another thread has just removed it
                    raise AdapterFormatError(folder, [GONE]) from error
            try:
                yield self.root / folder
            except AdapterFormatError:
                self._weights.drop(folder)
                raise

    def num_bytes(self, folder: str) -> int:
        """Return what the files of the folder of that name hold, as the store says."""
        files = self._mirror.files
        return sum(file.num_bytes for name in ADAPTER_FILES if (file := files.get(f"{folder}/{name}")))

    def card(self, folder: str) -> bytes:
        """Return the card in the folder of that name, as it is in the store now; nothing where there is none."""
        path = f"{folder}/{CARD_FILE}"
        return self._remote.read([path]).get(path, b"")

    def file_faults(self, folder: str) -> list[str]:
        """Return what is wrong with the files in the folder of that name, as far as the store says so."""
        names = self._mirror.links.get(folder, ())
        if names or f"{folder}/{WEIGHTS_FILE}" in self._mirror.files:
            return [f"{name} cannot be read: {LINK}" if name else LINKED_FOLDER for name in names]
        return [f"{WEIGHTS_FILE} is not there"]

    def basis(self, digest: str) -> Explicit:
        """Return an explicit basis, which is fetched where it is not here. Raises as `load_basis`."""
        file = basis_file(self.root, digest)
        with self._alone(file.name):
            if not file.is_file():
                with suppress(FileNotFoundError):  # which is said below
                    self._bring(_in_store(self.root, file))
        return load_basis(self.root, digest)

    def _scan(self, name: str | None = None) -> Scan:
        folders = self._mirror.folders
        names = sorted(folders) if name is None else [name]
        entries = [self._entry(of, folder) for of in names for folder in folders.get(of, ())]
        return Scan(entries, self._mirror.misnamed if name is None else ())

    def _entry(self, name: str, folder: str) -> Entry:
        return CachedEntry(name, self.root / folder, source=self)

    def _has(self, folder: str) -> bool:
        return folder in self._mirror.folders.get(folder.partition("@")[0], ())

    def _is_plain(self, name: str) -> bool:
        return self._has(name)

    def _meant(self, name: str) -> str | None:
        with suppress(AdapterError):  # an alias that cannot be read can be removed
            return self._aliases.get(name)
        return None

    def _check_not_plain(self, name: str) -> None:
        if self._is_plain(name):
            raise AdapterError(
                f"{name!r} is a folder of its own in {self._remote.name}, as its maker left it: rename it to {name}@ and the "
                f"version ({self.find(name).version}) first, or take another name"
            )

    def _take_back(self, name: str, folder: str) -> None:
        if left := self._withdrawn.pop(name, set()) - {folder}:
            self._withdrawn[name] = left

    def _record(self, folder: str) -> Files:
        """Return the config and the card of a version that is there, as they are now."""
        config, card = self.root / folder / CONFIG_FILE, f"{folder}/{CARD_FILE}"
        found = self._remote.read([card])
        return {CONFIG_FILE: read_stored(config.parent, CONFIG_FILE, MAX_TEXT_BYTES)} | (
            {CARD_FILE: found[card]} if card in found else {}
        )

    def _prepare(self, folder: str, files: Files, known: Files) -> None:
        """Make the copy of a version what its original is, the weights too, which `files` have: the version is the same.

        Where it is gone the copy, which a request under way may read, becomes what `files` are.
        """
        if (self.root / folder).is_dir():
            (self.root / folder / CARD_FILE).unlink(missing_ok=True)
            for name, content in ({WEIGHTS_FILE: files[WEIGHTS_FILE], **known} if known else files).items():
                replace_file(self.root / folder / name, content)

    def _write_basis(self, adapter: Adapter) -> None:
        if isinstance(adapter.basis, Explicit):
            path = _in_store(self.root, basis_file(self.root, adapter.basis.content_digest))
            if self._remote.file(path) is None:
                self._remote.write(path, basis_bytes(adapter.basis))

    def _write_files(self, folder: str, files: Files) -> None:
        is_there = self._has(folder)
        for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
            if name not in files or read_file(self.root / folder, name, []) != files[name]:
                continue  # what was there stays
            there = self._mirror.files.get(f"{folder}/{name}")
            if name == WEIGHTS_FILE and is_there and there and there.num_bytes == len(files[name]):
                continue
            self._remote.write(f"{folder}/{name}", files[name])
        # One who removes an older copy may not have seen the config in time.
        if WEIGHTS_FILE in files and self._remote.file(f"{folder}/{WEIGHTS_FILE}") is None:
            self._remote.write(f"{folder}/{WEIGHTS_FILE}", files[WEIGHTS_FILE])
        self._weights.use(folder)

    def _write_alias(self, name: str, meant: str) -> None:
        self._remote.write(alias_path(name), f"{meant}\n".encode())

    def _sweep(self, folder: str) -> None:
        found = self._remote.files_in(folder)
        if f"{folder}/{CONFIG_FILE}" in found:
            return  # it was published again
        self._remote.remove(found)
        if not self._has(folder):
            self._weights.drop(folder)
            discard(self.root / folder)

    def _alone(self, name: str) -> threading.Lock:
        with self._fetching_lock:
            return self._fetching.setdefault(name, threading.Lock())

    def _fetch(self, folder: str) -> None:
        if not (self.root / folder / CONFIG_FILE).is_file():
            raise AdapterFormatError(folder, [GONE])
        basis = read_config(self.root / folder).lori.basis
        if isinstance(basis, ExplicitConfig):
            self.basis(basis.digest)
        try:
            self._bring(f"{folder}/{WEIGHTS_FILE}")
        except FileNotFoundError as error:
            raise AdapterFormatError(folder, [GONE]) from error

    def _bring(self, path: str) -> None:
        """Fetch a file whole, and puts it in place. Raises `FileNotFoundError` where it is not there."""
        file = self.root / path
        with TemporaryDirectory(dir=self.root, prefix=".fetching-", ignore_cleanup_errors=True) as scratch:
            aside = Path(scratch) / file.name
            self._remote.fetch(path, aside)
            sync_file(aside)
            file.parent.mkdir(exist_ok=True)
            aside.replace(file)


def _in_store(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()
