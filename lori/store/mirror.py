"""A local mirror of a remote store: its last listing, copies of its small files, and a bounded cache of weights.

A copy is downloaded again if the file's entry in the listing has changed since the last download. Small files are configs,
statistics of prompts and aliases; their copies are never evicted to make room.
"""

import hashlib
import json
import os
import re
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.format import ADAPTER_FILES, CARD_FILE, WEIGHTS_FILE
from lori.names import is_name, is_reference
from lori.prompt_statistics import MAX_STATISTICS_BYTES, STATISTICS_FILE
from lori.store.aliases import ALIASES_FOLDER
from lori.store.bases import BASES_FOLDER
from lori.store.files import LINK, discard, replace_file
from lori.store.remote_folder import RemoteFile, RemoteFolder


class WeightCache:
    """LRU cache of the weights and cards in the folders of `root`. Thread-safe.

    Folders in use are never evicted, so the cache can exceed `max_bytes` while they are in use.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._lock = threading.Lock()
        self._num_users: Counter[str] = Counter()  # by folder
        folders = sorted((file.stat().st_mtime, file.parent.name) for file in root.glob(f"[!.]*/{WEIGHTS_FILE}"))
        self._sizes = OrderedDict((folder, self._size(folder)) for _, folder in folders)  # the least recently used first
        self._evict()

    @property
    def num_bytes(self) -> int:
        """Total size of the cached files."""
        return sum([*self._sizes.values()])

    @contextmanager
    def acquire(self, folder: str) -> Iterator[None]:
        """Protect the files of `folder` from eviction until the block ends."""
        with self._lock:
            self._num_users[folder] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users[folder] -= 1
                if not self._num_users[folder]:
                    del self._num_users[folder]
                self._evict()

    def use(self, folder: str) -> None:
        """Mark `folder` as the most recently used, and count its current size."""
        os.utime(self._root / folder / WEIGHTS_FILE)  # keeps the order for the next process
        with self._lock:
            self._sizes[folder] = self._size(folder)
            self._sizes.move_to_end(folder)
            self._evict()

    def drop(self, folder: str) -> None:
        """Remove the weights and the card of `folder`, also if in use. Readers that have the files open are not affected."""
        with self._lock:
            self._drop(folder)

    def _evict(self) -> None:
        num_bytes = self.num_bytes
        for folder in [*self._sizes]:
            if num_bytes <= self._max_bytes:
                return
            if folder not in self._num_users:
                num_bytes -= self._sizes[folder]
                self._drop(folder)

    def _drop(self, folder: str) -> None:
        self._sizes.pop(folder, None)
        for name in (WEIGHTS_FILE, CARD_FILE):
            (self._root / folder / name).unlink(missing_ok=True)

    def _size(self, folder: str) -> int:
        files = (self._root / folder / name for name in (WEIGHTS_FILE, CARD_FILE))
        return sum(file.stat().st_size for file in files if file.exists())


def claim_folder(root: Path) -> tuple[Path, FileLock]:
    """Return the first numbered folder in `root` that no other process uses, and the lock that keeps other processes out.

    The caller must keep the lock alive. Removes unfinished downloads of killed processes from the folder. Raises `OSError` if
    `root` cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    for number in count():
        lock = FileLock(root / f"{number}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        folder = root / str(number)
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".fetching-*"):
            discard(leftover)
        return folder, lock
    raise AssertionError("numbers do not end")


BASIS = re.compile(r"[0-9a-f]{64}\.safetensors")
MARKS_FILE = ".marks.json"
SMALL_FILES = (f"/{CONFIG_FILE}", f"/{STATISTICS_FILE}")
"""Ends of the paths of an adapter's files that are copied with the listing."""
MAX_SYNCED = 16
"""Maximum number of copies that are synced one by one. More are synced together, since thousands of syncs would take minutes."""


def is_too_large(path: str, file: RemoteFile) -> bool:
    """Return whether a file is too large for statistics of prompts, which it is to be. Such a file is not copied."""
    return path.endswith(f"/{STATISTICS_FILE}") and file.num_bytes > MAX_STATISTICS_BYTES


def alias_path(name: str) -> str:
    """Return the path of the alias `name` in a store."""
    return f"{ALIASES_FOLDER}/{name}"


class Mirror:
    """A mirror of the store in `remote`, in the folder `root`. Not thread-safe, except for the attributes that say so."""

    def __init__(self, remote: RemoteFolder, root: Path, weights: WeightCache) -> None:
        self._remote, self._root, self._weights = remote, root, weights
        self._marks = _read_marks(root / MARKS_FILE)
        self.files: Mapping[str, RemoteFile] = {}
        """Last listing: files by path. Any thread may read the mapping, which is replaced and never changed."""
        self.folders: Mapping[str, Sequence[str]] = {}
        """Folders of adapters (with a config, or links) by the adapter's name. Threads as for `files`."""
        self.links: Mapping[str, Sequence[str]] = {}
        """Names of an adapter's files that are links, by its folder; "" stands for the folder itself. Threads as for `files`."""
        self.misnamed: Sequence[str] = ()
        """Folders with a config whose name no adapter may have, at the last `refresh_all`."""

    def refresh_all(self) -> None:
        """List the whole store, update all copies, and remove copies of files that are gone.

        Raises `AdapterError` if the store is an adapter itself, or its folder of aliases is a link.
        """
        listing = self._remote.files()
        if CONFIG_FILE in listing:
            raise AdapterError("it is an adapter, expected a folder of adapters: pass the folder that holds it")
        if ALIASES_FOLDER in listing:
            raise AdapterError(f"{ALIASES_FOLDER} is a link: a store follows none")
        folders = [path.partition("/")[0] for path in listing if path.partition("/")[2] == CONFIG_FILE]
        self.misnamed = sorted(folder for folder in folders if not folder.startswith(".") and not is_reference(folder))
        self._apply(_store_files(listing), {})
        current = {folder for folders in self.folders.values() for folder in folders}
        for copy in self._root.iterdir():
            if is_reference(copy.name) and copy.name not in current:
                self._weights.drop(copy.name)
                discard(copy)
        for copy in self._root.glob(f"[!.]*/{STATISTICS_FILE}"):  # removed from the store while no process had this cache
            if str(copy.relative_to(self._root)) not in self.files:
                copy.unlink()
        self._discard_missing(ALIASES_FOLDER)
        self._discard_missing(BASES_FOLDER)
        replace_file(self._root / MARKS_FILE, json.dumps(self._marks).encode())

    def refresh(self, names: Iterable[str]) -> None:
        """Update the aliases called `names`, and all versions of the adapters called `names`."""
        for name in names:
            # The alias comes first: its target was written before it, so the later listing has the target.
            path = alias_path(name)
            alias = self._remote.file(path)
            self._apply({path: alias} if alias else {}, {other: file for other, file in self.files.items() if other != path})
            if path not in self.files:
                (self._root / path).unlink(missing_ok=True)
            listing = _store_files(self._remote.files_of(name))
            unchanged = {other: file for other, file in self.files.items() if other == path or _owner(other) != name}
            self._apply({path: file for path, file in listing.items() if _owner(path) == name}, unchanged)

    def refresh_aliases(self) -> None:
        """Update all aliases."""
        listing = self._remote.files_in(ALIASES_FOLDER)
        unchanged = {path: file for path, file in self.files.items() if not path.startswith(f"{ALIASES_FOLDER}/")}
        self._apply(_store_files(listing), unchanged)
        self._discard_missing(ALIASES_FOLDER)

    def invalidate(self, paths: Iterable[str]) -> None:
        """Mark copies as stale, so that the next refresh downloads them again. Call before a change of the copies."""
        for path in paths:
            self._marks.pop(path, None)

    def _apply(self, listed: dict[str, RemoteFile], unchanged: Mapping[str, RemoteFile]) -> None:
        """Make `listed` and `unchanged` together the current listing, and update the copies of `listed`."""
        small = [path for path in listed if path.endswith(SMALL_FILES) or path.startswith(f"{ALIASES_FOLDER}/")]
        small = [path for path in small if not is_too_large(path, listed[path])]
        linked = [path for path in listed if listed[path].is_link and "/" in path]
        for path in linked:
            self._drop_linked(path)
        stale = [path for path in small if path not in linked and not self._is_copied(path, listed[path])]
        contents = _guess_aliases(stale, listed, _by_name({**unchanged, **listed}))
        contents |= self._remote.read([path for path in stale if path not in contents])
        write = replace_file if len(contents) <= MAX_SYNCED else _replace_unsynced
        for path in stale:
            if path in contents:
                self._prepare(path)
                write(self._root / path, contents[path])
                self._set_mark(path, listed[path])
            else:  # the file was deleted after the listing
                del listed[path]
        if len(contents) > MAX_SYNCED:
            os.sync()
        # Configs of deleted adapters stay, since requests in flight may need them.
        removed = self.files.keys() - listed.keys() - unchanged.keys()
        self.invalidate(removed)
        for path in removed:
            if path.endswith(f"/{STATISTICS_FILE}"):  # they are optional, so that a copy would still be read
                (self._root / path).unlink(missing_ok=True)
        self.files = {**unchanged, **listed}
        self.folders = _by_name(self.files)
        self.links = _links(self.files)

    def _is_copied(self, path: str, file: RemoteFile) -> bool:
        return file.mark is not None and self._marks.get(path) == file.mark and (self._root / path).is_file()

    def _drop_linked(self, path: str) -> None:
        folder, _, name = path.partition("/")
        self.invalidate([path])
        (self._root / path).unlink(missing_ok=True)
        if folder == ALIASES_FOLDER:  # the name must stay an alias that cannot be read; without one it could mean a folder
            (self._root / folder).mkdir(exist_ok=True)
            replace_file(self._root / path, f"{LINK}\n".encode())
        elif name == WEIGHTS_FILE:
            self._weights.drop(folder)

    def _prepare(self, path: str) -> None:
        folder, _, name = path.partition("/")
        (self._root / folder).mkdir(exist_ok=True)
        # The weights of a version never change. Those of an unversioned folder change with the config.
        if name == CONFIG_FILE and "@" not in folder:
            self._weights.drop(folder)

    def _set_mark(self, path: str, file: RemoteFile) -> None:
        if file.mark is not None:
            self._marks[path] = file.mark

    def _discard_missing(self, folder: str) -> None:
        for copy in (self._root / folder).glob("*"):
            if f"{folder}/{copy.name}" not in self.files:
                discard(copy)


def _store_files(listing: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    return {path: file for path, file in listing.items() if _is_store_file(path, file)}


def _is_store_file(path: str, file: RemoteFile) -> bool:
    # Paths of a listing become local paths, so only the known files of a store may pass.
    folder, _, name = path.partition("/")
    if file.is_link and not name:
        return is_reference(folder)
    if folder == ALIASES_FOLDER:
        return is_name(name)
    if folder == BASES_FOLDER:
        return bool(BASIS.fullmatch(name))
    return name in ADAPTER_FILES and is_reference(folder)


def _owner(path: str) -> str:
    folder, _, name = path.partition("/")
    return name if folder == ALIASES_FOLDER else folder.partition("@")[0]


def _by_name(files: Iterable[str]) -> Mapping[str, Sequence[str]]:
    folders = defaultdict(list)
    for path in sorted(files):
        folder, _, name = path.partition("/")
        if name in (CONFIG_FILE, "") and is_reference(folder):
            folders[folder.partition("@")[0]].append(folder)
    return dict(folders)


def _links(files: Mapping[str, RemoteFile]) -> Mapping[str, Sequence[str]]:
    links = defaultdict(list)
    for path, file in files.items():
        if file.is_link:
            folder, _, name = path.partition("/")
            links[folder].append(name)
    return dict(links)


def _replace_unsynced(file: Path, content: bytes) -> None:
    scratch = file.with_name(f".{file.name}.new")
    scratch.write_bytes(content)
    scratch.replace(file)


def _guess_aliases(
    paths: Iterable[str], listed: Mapping[str, RemoteFile], folders: Mapping[str, Sequence[str]]
) -> dict[str, bytes]:
    """Return the contents of aliases among `paths`, found by the md5 in the listing without a download.

    Most aliases mean a version of their own name, so all such versions are tried. Saves half of the reads at a first start.
    """
    contents = {}
    for path in paths:
        for folder in folders.get(_owner(path), ()) if path.startswith(f"{ALIASES_FOLDER}/") else ():
            content = f"{folder}\n".encode()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == listed[path].md5:
                contents[path] = content
    return contents


def _read_marks(file: Path) -> dict[str, str]:
    try:
        marks = json.loads(file.read_bytes())
    except (OSError, ValueError):  # at the first start, or if the file is damaged, everything is downloaded
        return {}
    return {str(path): str(mark) for path, mark in marks.items()} if isinstance(marks, dict) else {}
