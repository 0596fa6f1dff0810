"""A mirror of a store that lies elsewhere: its last listing, copies of its configs and aliases, and weights within a budget of
bytes.

A copy is fetched again where the listing says another thing of the file than when it was fetched. Configs and aliases are never
evicted: they are small.
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
from lori.format import CARD_FILE, WEIGHTS_FILE
from lori.names import NAME, VERSION
from lori.store.aliases import ALIASES_FOLDER
from lori.store.bases import BASES_FOLDER
from lori.store.files import LINK, discard, replace_file
from lori.store.remote_folder import RemoteFile, RemoteFolder


class WeightCache:
    """The weights and cards in the folders of `root`, those used longest ago first. Any threads may use it.

    More than `max_bytes` are there only while they are read: who is held does not go.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        found = sorted((file.stat().st_mtime, file.parent.name) for file in root.glob(f"[!.]*/{WEIGHTS_FILE}"))
        self._sizes = OrderedDict((folder, self._size(folder)) for _, folder in found)
        self._make_room()

    @property
    def num_bytes(self) -> int:
        """What is here, in bytes."""
        return sum([*self._sizes.values()])

    @contextmanager
    def held(self, folder: str) -> Iterator[None]:
        """Let nothing of `folder` go before the block ends."""
        with self._lock:
            self._held[folder] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[folder] -= 1
                if not self._held[folder]:
                    del self._held[folder]
                self._make_room()

    def use(self, folder: str) -> None:
        """Note that what is in `folder` came, or is used: it goes last."""
        os.utime(self._root / folder / WEIGHTS_FILE)  # for the next process
        with self._lock:
            self._sizes[folder] = self._size(folder)
            self._sizes.move_to_end(folder)
            self._make_room()

    def drop(self, folder: str) -> None:
        """Let the weights and the card of `folder` go; who reads them already has them open."""
        with self._lock:
            self._drop(folder)

    def _make_room(self) -> None:
        left = self.num_bytes
        for folder in [*self._sizes]:
            if left <= self._max_bytes:
                return
            if folder not in self._held:
                left -= self._sizes[folder]
                self._drop(folder)

    def _drop(self, folder: str) -> None:
        self._sizes.pop(folder, None)
        for name in (WEIGHTS_FILE, CARD_FILE):
            (self._root / folder / name).unlink(missing_ok=True)

    def _size(self, folder: str) -> int:
        files = (self._root / folder / name for name in (WEIGHTS_FILE, CARD_FILE))
        return sum(file.stat().st_size for file in files if file.exists())


def take_place(root: Path) -> tuple[Path, FileLock]:
    """Return the first folder in `root` that no other process has, and the lock that keeps others out as long as it lives.

    What a process that was killed left half done in it is gone. Raises `OSError` where `root` cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    for number in count():
        lock = FileLock(root / f"{number}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        place = root / str(number)
        place.mkdir(exist_ok=True)
        for left in place.glob(".fetching-*"):
            discard(left)
        return place, lock
    raise AssertionError("numbers do not end")


ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
FOLDER = re.compile(rf"{NAME.pattern}(@{VERSION.pattern})?")
BASIS = re.compile(r"[0-9a-f]{64}\.safetensors")
MARKS_FILE = ".marks.json"
MAX_SYNCED = 16
"""Copies that are synced one by one: thousands would take minutes, and are synced together."""


def alias_path(name: str) -> str:
    """Return where a store keeps the alias `name`."""
    return f"{ALIASES_FOLDER}/{name}"


class Mirror:
    """The store in `remote`, in the folder `root`. For one thread at a time, but for what says so."""

    def __init__(self, remote: RemoteFolder, root: Path, weights: WeightCache) -> None:
        self._remote, self._root, self._weights = remote, root, weights
        self._marks = _read_marks(root / MARKS_FILE)
        self.files: Mapping[str, RemoteFile] = {}
        """By path. Any thread may look: it is never changed, but replaced."""
        self.folders: Mapping[str, Sequence[str]] = {}
        """The folders of adapters, which have a config or are links, by the adapter's name; likewise."""
        self.links: Mapping[str, Sequence[str]] = {}
        """By the folder of an adapter, the names of its files that are links, or "" where it is one itself; likewise."""
        self.misnamed: Sequence[str] = ()
        """Folders with a config whose name no adapter may have, when all was looked at last."""

    def look_at_all(self) -> None:
        """Look at the whole store, and forgets copies of what it does not hold.

        Raises `AdapterError` where it is an adapter itself, or keeps its aliases behind a link.
        """
        found = self._remote.files()
        if CONFIG_FILE in found:
            raise AdapterError("it is an adapter, expected a folder of adapters: pass the folder that holds it")
        if ALIASES_FOLDER in found:
            raise AdapterError(f"{ALIASES_FOLDER} is a link: a store follows none")
        configs = [path.partition("/")[0] for path in found if path.partition("/")[2] == CONFIG_FILE]
        self.misnamed = sorted(of for of in configs if not of.startswith(".") and not FOLDER.fullmatch(of))
        self._take_over(_ours(found), {})
        there = {folder for folders in self.folders.values() for folder in folders}
        for left in self._root.iterdir():
            if FOLDER.fullmatch(left.name) and left.name not in there:
                self._weights.drop(left.name)
                discard(left)
        self._drop_gone(ALIASES_FOLDER)
        self._drop_gone(BASES_FOLDER)
        replace_file(self._root / MARKS_FILE, json.dumps(self._marks).encode())

    def look_at(self, names: Iterable[str]) -> None:
        """Look at what these names mean as aliases, and at all versions of adapters that are called so."""
        for name in names:
            # First the alias: what it means was there before it.
            path = alias_path(name)
            alias = self._remote.file(path)
            self._take_over({path: alias} if alias else {}, {of: file for of, file in self.files.items() if of != path})
            if path not in self.files:
                (self._root / path).unlink(missing_ok=True)
            found = self._remote.files_of(name)
            kept = {of: file for of, file in self.files.items() if of == path or _owner(of) != name}
            self._take_over({of: file for of, file in _ours(found).items() if _owner(of) == name}, kept)

    def look_at_aliases(self) -> None:
        """Look at all aliases."""
        found = self._remote.files_in(ALIASES_FOLDER)
        kept = {path: file for path, file in self.files.items() if not path.startswith(f"{ALIASES_FOLDER}/")}
        self._take_over(_ours(found), kept)
        self._drop_gone(ALIASES_FOLDER)

    def forget(self, paths: Iterable[str]) -> None:
        """Have files fetched again, when they are looked at: their copies are about to be changed."""
        for path in paths:
            self._marks.pop(path, None)

    def _take_over(self, found: dict[str, RemoteFile], kept: Mapping[str, RemoteFile]) -> None:
        small = [path for path in found if path.endswith(f"/{CONFIG_FILE}") or path.startswith(f"{ALIASES_FOLDER}/")]
        linked = [path for path in found if found[path].is_link and "/" in path]
        for path in linked:
            self._drop_linked(path)
        stale = [path for path in small if path not in linked and not self._is_copied(path, found[path])]
        contents = _guessed(stale, found, _by_name({**kept, **found}))
        contents |= self._remote.read([path for path in stale if path not in contents])
        write = replace_file if len(contents) <= MAX_SYNCED else _replace_unsynced
        for path in stale:
            if path in contents:
                self._prepare(path)
                write(self._root / path, contents[path])
                self._note(path, found[path])
            else:  # it went between the two looks
                del found[path]
        if len(contents) > MAX_SYNCED:
            os.sync()
        # Configs stay, though their adapters are no more: requests under way may need them.
        self.forget(self.files.keys() - found.keys() - kept.keys())
        self.files = {**kept, **found}
        self.folders = _by_name(self.files)
        self.links = _links(self.files)

    def _is_copied(self, path: str, file: RemoteFile) -> bool:
        return file.mark is not None and self._marks.get(path) == file.mark and (self._root / path).is_file()

    def _drop_linked(self, path: str) -> None:
        folder, _, name = path.partition("/")
        self.forget([path])
        (self._root / path).unlink(missing_ok=True)
        if folder == ALIASES_FOLDER:  # its name is not to mean what it would without an alias
            (self._root / folder).mkdir(exist_ok=True)
            replace_file(self._root / path, f"{LINK}\n".encode())
        elif name == WEIGHTS_FILE:
            self._weights.drop(folder)

    def _prepare(self, path: str) -> None:
        folder, _, name = path.partition("/")
        (self._root / folder).mkdir(exist_ok=True)
        # A version's weights are what its name says. Of a folder as its maker left it they change with the config.
        if name == CONFIG_FILE and "@" not in folder:
            self._weights.drop(folder)

    def _note(self, path: str, file: RemoteFile) -> None:
        if file.mark is not None:
            self._marks[path] = file.mark

    def _drop_gone(self, folder: str) -> None:
        for copy in (self._root / folder).glob("*"):
            if f"{folder}/{copy.name}" not in self.files:
                discard(copy)


def _ours(found: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    return {path: file for path, file in found.items() if _is_ours(path, file)}


def _is_ours(path: str, file: RemoteFile) -> bool:
    # What a listing says becomes a path here: nothing but what a store is made of may.
    folder, _, name = path.partition("/")
    if file.is_link and not name:
        return bool(FOLDER.fullmatch(folder))
    if folder == ALIASES_FOLDER:
        return bool(NAME.fullmatch(name))
    if folder == BASES_FOLDER:
        return bool(BASIS.fullmatch(name))
    return name in ADAPTER_FILES and bool(FOLDER.fullmatch(folder))


def _owner(path: str) -> str:
    folder, _, name = path.partition("/")
    return name if folder == ALIASES_FOLDER else folder.partition("@")[0]


def _by_name(files: Iterable[str]) -> Mapping[str, Sequence[str]]:
    found = defaultdict(list)
    for path in sorted(files):
        folder, _, name = path.partition("/")
        if name in (CONFIG_FILE, "") and FOLDER.fullmatch(folder):
            found[folder.partition("@")[0]].append(folder)
    return dict(found)


def _links(files: Mapping[str, RemoteFile]) -> Mapping[str, Sequence[str]]:
    found = defaultdict(list)
    for path, file in files.items():
        if file.is_link:
            folder, _, name = path.partition("/")
            found[folder].append(name)
    return dict(found)


def _replace_unsynced(file: Path, content: bytes) -> None:
    scratch = file.with_name(f".{file.name}.new")
    scratch.write_bytes(content)
    scratch.replace(file)


def _guessed(paths: Iterable[str], found: Mapping[str, RemoteFile], folders: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Return what aliases hold that mean a version of their own name, as most do, where the listing has the md5 of it.

    So half of what a first start has to read need not be read.
    """
    guessed = {}
    for path in paths:
        for folder in folders.get(_owner(path), ()) if path.startswith(f"{ALIASES_FOLDER}/") else ():
            content = f"{folder}\n".encode()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == found[path].md5:
                guessed[path] = content
    return guessed


def _read_marks(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):  # it is the first time, or the file is damaged: everything is fetched
        return {}
    return {str(path): str(mark) for path, mark in found.items()} if isinstance(found, dict) else {}
