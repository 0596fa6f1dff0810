"""What a process keeps of the adapters of a store that lies elsewhere: which weights are here, within a budget of bytes.

Knows nothing of where they come from. Configs stay: they are small.
"""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from lori.durable import discard
from lori.format import CARD_FILE, WEIGHTS_FILE


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
        """Lets nothing of `folder` go before the block ends."""
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
        """Notes that what is in `folder` came, or is used: it goes last."""
        os.utime(self._root / folder / WEIGHTS_FILE)  # for the next process
        with self._lock:
            self._sizes[folder] = self._size(folder)
            self._sizes.move_to_end(folder)
            self._make_room()

    def drop(self, folder: str) -> None:
        """Lets the weights and the card of `folder` go; who reads them already has them open."""
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
    """Returns the first folder in `root` that no other process has, and the lock that keeps others out as long as it lives.

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
