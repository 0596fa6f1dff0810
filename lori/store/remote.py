"""A store of adapters at any fsspec address, with the interface of a local store. `lori.store.mirror` keeps the listing.

    s3://bucket/adapters/math@1765747cce63/   laid out as in `lori.store.store`; a version's config is written last
    s3://bucket/adapters/.aliases/math        written after the version; a removal has the reverse order

There are no locks. Several processes may write at the same time: any step may already have been done by another process, and the
last written alias counts. A reader finds the old or the new target of a name.
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
from lori.format import ADAPTER_FILES, CARD_FILE, EXTRA_FILES, MAX_TEXT_BYTES, WEIGHTS_FILE, Files, read_config, read_file
from lori.names import check_name, split_reference
from lori.prompt_statistics import MAX_STATISTICS_BYTES, STATISTICS_FILE
from lori.store.bases import basis_bytes, basis_file, load_basis
from lori.store.entry import CachedEntry, Entry, Scan
from lori.store.files import LINK, LINKED_FOLDER, discard, read_stored, replace_file, sync_file
from lori.store.mirror import Mirror, WeightCache, alias_path, claim_folder, is_too_large
from lori.store.remote_folder import RemoteFolder
from lori.store.store import NUM_ATTEMPTS, AdapterStore

GONE = "its files are in the store no more: it was deleted there"


class RemoteStore(AdapterStore):
    """The store in `remote`, mirrored in a folder in `cache`. The folder belongs to this process as long as it lives.

    Weights are downloaded when an entry is acquired, in any thread, and the cache of weights is limited to `max_bytes`. Reads
    show the state at the last `pull`, of all names or of one; writes call `pull` first. An unversioned folder can be read, but
    not be made a version or published over, since that needs a rename, which object stores do not have. All methods also raise
    what `RemoteFolder` raises.
    """

    def __init__(self, remote: RemoteFolder, cache: Path, max_bytes: int, grace_s: float = 0) -> None:
        """Claim a cache folder and pull everything. Raises `AdapterError` as `pull`, and if `cache` cannot be written."""
        self.grace_s = grace_s
        self._remote = remote
        self._lock, self._fetch_locks_lock = threading.RLock(), threading.Lock()
        self._fetch_locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # for files that are being fetched
        self._withdrawn: dict[str, set[str]] = {}  # folders, by the adapter's name
        try:
            folder, self._folder_lock = claim_folder(cache)
            super().__init__(folder)
            self._weights = WeightCache(folder, max_bytes)
            self._mirror = Mirror(remote, folder, self._weights)
            self.pull()
        except OSError as error:
            raise AdapterError(f"its cache {cache} cannot be written: {error.strerror}") from error

    def pull(self, *names: str) -> None:
        """Refresh the mirror for these names and the targets of these aliases; without names, for the whole store."""
        with self._lock:
            if not names:
                for _ in range(NUM_ATTEMPTS):
                    self._mirror.refresh_all()
                    if all(map(self._has_folder, self._aliases.readable().values())):
                        return  # else an alias's target may have been published after the versions were listed
                return
            self._mirror.refresh(names)
            owners = {target.partition("@")[0] for name in names if (target := self._aliases.get(name))}
            self._mirror.refresh(sorted(owners.difference(names)))

    def may_write(self) -> bool:
        """Return True: a remote file system reports missing permissions only on a write."""
        return True

    def put(self, adapter: Adapter, files: Files) -> Entry:
        """Publish `adapter`, as `AdapterStore.put`."""
        check_name(adapter.name)
        name, folder = adapter.name, f"{adapter.name}@{adapter.version}"
        with self._lock, self._weights.acquire(folder):
            self.pull(name)
            self._check_versioned(name)
            self._cancel_withdrawal(name, folder)
            target, versions = self._aliases.get(name), [entry.folder.name for entry in self.versions(name)]
            published = self._read_record(folder) if self._has_folder(folder) else {}
            self._prepare_copy(folder, files, published)
            self._mirror.invalidate([alias_path(name), f"{folder}/{CONFIG_FILE}", f"{folder}/{STATISTICS_FILE}"])
            entry = super().put(adapter, files)
            if target is None and len(versions) == 1 and versions != [folder]:
                self._write_alias(name, versions[0])  # keeps the name's meaning until the new version is complete
            self._write_basis(adapter)
            self._write_files(folder, {file: content for file, content in files.items() if published.get(file) != content})
            self._write_alias(name, folder)
            self.pull(name)
            if not self._has_folder(folder):
                raise AdapterError(f"{folder} was deleted by another process while it was published")
        return entry

    def save(self, adapter: Adapter) -> NoReturn:
        """Raise `AdapterError`: a remote store cannot replace an unversioned folder. Use `add`, which publishes a version."""
        raise AdapterError(f"{adapter.name!r} cannot be saved in {self._remote.name} as its maker leaves it: publish it")

    def alias(self, alias: str, reference: str) -> Entry:
        """Set `alias`, as `AdapterStore.alias`."""
        check_name(alias)
        with self._lock:
            self.pull(alias, split_reference(reference)[0])
            owner = self.find(reference).folder.name.partition("@")[0]
            self._check_versioned(owner)
            self.pull(owner)
            old_targets = {name: self._aliases.get(name) for name in (owner, alias)}
            self._mirror.invalidate(map(alias_path, old_targets))
            entry = super().alias(alias, reference)
            for name, old_target in old_targets.items():
                if (target := self._aliases.get(name)) and target != old_target:
                    self._write_alias(name, target)
        return entry

    def removable(self, reference: str) -> Sequence[Entry]:
        """Return the versions that `remove` would remove, as `AdapterStore.removable`."""
        name, version = split_reference(reference)
        with self._lock:
            self.pull(name)
            self._mirror.refresh_aliases()
            return self._removable(name, version)[0]

    def withdraw(self, reference: str, versions: Sequence[str] = ()) -> None:
        """Remove aliases and configs, so that no reader finds the versions any more.

        A process that has the config can still download the other files until `remove`.
        """
        name, version = split_reference(reference)
        with self._lock:
            withdrawn = self._withdrawn.setdefault(name, set()) if versions else self._withdrawn.get(name, set())
            withdrawn |= {*versions}
            folders = [entry.folder.name for entry in self.removable(reference)]
            self._withdrawn[name] = withdrawn | {*folders}
            # The alias's target is removed last: after a crash the name has fewer versions and still works.
            target = None if version else self._alias_target(name)
            self._mirror.invalidate([alias_path(name)])
            self._remote.remove(f"{folder}/{CONFIG_FILE}" for folder in folders if folder != target)
            if not version:
                self._remote.remove([alias_path(name)])
            self._remote.remove(f"{folder}/{CONFIG_FILE}" for folder in folders if folder == target)
            self.pull(name)

    def remove(self, reference: str) -> Sequence[str]:
        """Remove versions, as `AdapterStore.remove`, or after `withdraw` the remaining files. An explicit basis stays."""
        name, version = split_reference(reference)
        with self._lock:
            if name not in self._withdrawn:
                self.withdraw(reference)
            withdrawn = self._withdrawn.pop(name)
            removed = {folder for folder in withdrawn if folder.startswith(f"{name}@{version}") or not version}
            if remaining := withdrawn - removed:
                self._withdrawn[name] = remaining
            for folder in removed:
                self._remove_files(folder)
        return sorted(removed) or [name]

    @contextmanager
    def acquire(self, folder: str) -> Iterator[Path]:
        """Provide the folder of that name with all its files until the block ends.

        If the block raises `AdapterFormatError`, the weights are dropped and downloaded again at the next call. Raises
        `AdapterFormatError` if the files are gone, `UnreachableError` if the download fails.
        """
        with self._weights.acquire(folder):
            with self._fetch_lock(folder):
                if not (self.root / folder / WEIGHTS_FILE).is_file():
                    self._fetch_weights(folder)
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
        """Return the total size of the folder's files, from the listing."""
        files = self._mirror.files
        return sum(file.num_bytes for name in ADAPTER_FILES if (file := files.get(f"{folder}/{name}")))

    def card(self, folder: str) -> bytes:
        """Return the folder's card as it is in the store now; empty if there is none."""
        path = f"{folder}/{CARD_FILE}"
        return self._remote.read([path]).get(path, b"")

    def file_faults(self, folder: str) -> list[str]:
        """Return the faults of the folder's files that show in the listing."""
        names = self._mirror.links.get(folder, ())
        path = f"{folder}/{STATISTICS_FILE}"
        if (file := self._mirror.files.get(path)) and is_too_large(path, file):
            return [f"{STATISTICS_FILE} has {file.num_bytes} bytes, expected {MAX_STATISTICS_BYTES} at most"]
        if names or f"{folder}/{WEIGHTS_FILE}" in self._mirror.files:
            return [f"{name} cannot be read: {LINK}" if name else LINKED_FOLDER for name in names]
        return [f"{WEIGHTS_FILE} is not there"]

    def basis(self, digest: str) -> Explicit:
        """Return an explicit basis. Downloads it if there is no local copy. Raises as `load_basis`."""
        file = basis_file(self.root, digest)
        with self._fetch_lock(file.name):
            if not file.is_file():
                with suppress(FileNotFoundError):  # `load_basis` reports the missing file
                    self._download(_in_store(self.root, file))
        return load_basis(self.root, digest)

    def _scan(self, name: str | None = None) -> Scan:
        folders = self._mirror.folders
        owners = sorted(folders) if name is None else [name]
        entries = [self._entry(owner, folder) for owner in owners for folder in folders.get(owner, ())]
        return Scan(entries, self._mirror.misnamed if name is None else ())

    def _entry(self, name: str, folder: str) -> Entry:
        return CachedEntry(name, self.root / folder, source=self)

    def _has_folder(self, folder: str) -> bool:
        return folder in self._mirror.folders.get(folder.partition("@")[0], ())

    def _is_unversioned(self, name: str) -> bool:
        return self._has_folder(name)

    def _alias_target(self, name: str) -> str | None:
        with suppress(AdapterError):  # an alias that cannot be read can be removed
            return self._aliases.get(name)
        return None

    def _check_versioned(self, name: str) -> None:
        if self._is_unversioned(name):
            raise AdapterError(
                f"{name!r} is a folder of its own in {self._remote.name}, as its maker left it: rename it to {name}@ and the "
                f"version ({self.find(name).version}) first, or take another name"
            )

    def _cancel_withdrawal(self, name: str, folder: str) -> None:
        if remaining := self._withdrawn.pop(name, set()) - {folder}:
            self._withdrawn[name] = remaining

    def _read_record(self, folder: str) -> Files:
        """Return the current config and card of a published version."""
        config, card = self.root / folder / CONFIG_FILE, f"{folder}/{CARD_FILE}"
        contents = self._remote.read([card])
        return {CONFIG_FILE: read_stored(config.parent, CONFIG_FILE, MAX_TEXT_BYTES)} | (
            {CARD_FILE: contents[card]} if card in contents else {}
        )

    def _prepare_copy(self, folder: str, files: Files, published: Files) -> None:
        """Make an existing local copy of a version equal to the published version, or to `files` if it is not published.

        The weights come from `files`, since equal versions have equal weights. A request in flight may be reading the copy.
        """
        if (self.root / folder).is_dir():
            (self.root / folder / CARD_FILE).unlink(missing_ok=True)
            for name, content in ({WEIGHTS_FILE: files[WEIGHTS_FILE], **published} if published else files).items():
                replace_file(self.root / folder / name, content)

    def _write_basis(self, adapter: Adapter) -> None:
        if isinstance(adapter.basis, Explicit):
            path = _in_store(self.root, basis_file(self.root, adapter.basis.content_digest))
            if self._remote.file(path) is None:
                self._remote.write(path, basis_bytes(adapter.basis))

    def _write_files(self, folder: str, files: Files) -> None:
        is_published = self._has_folder(folder)
        for name in (WEIGHTS_FILE, *EXTRA_FILES, CONFIG_FILE):
            if name not in files or read_file(self.root / folder, name, []) != files[name]:
                continue  # the published file stays
            remote_file = self._mirror.files.get(f"{folder}/{name}")
            if name == WEIGHTS_FILE and is_published and remote_file and remote_file.num_bytes == len(files[name]):
                continue
            self._remote.write(f"{folder}/{name}", files[name])
        # Another process that removes an older copy may have removed the weights before it saw the new config.
        if WEIGHTS_FILE in files and self._remote.file(f"{folder}/{WEIGHTS_FILE}") is None:
            self._remote.write(f"{folder}/{WEIGHTS_FILE}", files[WEIGHTS_FILE])
        self._weights.use(folder)

    def _write_alias(self, name: str, target: str) -> None:
        self._remote.write(alias_path(name), f"{target}\n".encode())

    def _remove_files(self, folder: str) -> None:
        listing = self._remote.files_in(folder)
        if f"{folder}/{CONFIG_FILE}" in listing:
            return  # published again since the withdrawal
        self._remote.remove(listing)
        if not self._has_folder(folder):
            self._weights.drop(folder)
            discard(self.root / folder)

    def _fetch_lock(self, name: str) -> threading.Lock:
        with self._fetch_locks_lock:
            return self._fetch_locks.setdefault(name, threading.Lock())

    def _fetch_weights(self, folder: str) -> None:
        if not (self.root / folder / CONFIG_FILE).is_file():
            raise AdapterFormatError(folder, [GONE])
        basis = read_config(self.root / folder).lori.basis
        if isinstance(basis, ExplicitConfig):
            self.basis(basis.digest)
        try:
            self._download(f"{folder}/{WEIGHTS_FILE}")
        except FileNotFoundError as error:
            raise AdapterFormatError(folder, [GONE]) from error

    def _download(self, path: str) -> None:
        """Download a file atomically: to a scratch folder, then into place. Raises `FileNotFoundError` if it is missing."""
        file = self.root / path
        with TemporaryDirectory(dir=self.root, prefix=".fetching-", ignore_cleanup_errors=True) as scratch:
            partial_file = Path(scratch) / file.name
            self._remote.fetch(path, partial_file)
            sync_file(partial_file)
            file.parent.mkdir(exist_ok=True)
            partial_file.replace(file)


def _in_store(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()
