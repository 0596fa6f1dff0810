"""Locks on a store's names: one writer at a time for each name, across processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lori.errors import AdapterError
from lori.store.aliases import ALIASES_FOLDER
from lori.store.files import discard, no_link

LOCKS_FOLDER = ".locks"
LOCK_S = 60.0
"""Maximum time that a writer waits for another writer of the same name, in seconds."""


@contextmanager
def locked(root: Path, *names: str) -> Iterator[None]:
    """Hold the locks of `names` in the store `root` during the block, and remove leftovers of killed writers of these names.

    Makes `root` if it does not exist. Raises `AdapterError` if another process keeps a lock for too long, or if the folder of
    locks or aliases is a link.
    """
    no_link(root / ALIASES_FOLDER)
    no_link(root / LOCKS_FOLDER).mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        for name in sorted(names):  # one order for all processes, which prevents deadlocks
            try:
                locks.enter_context(FileLock(root / LOCKS_FOLDER / name, timeout=LOCK_S))
            except Timeout as error:
                raise AdapterError(f"another process has been writing {name!r} in {root} for {LOCK_S:.0f} s") from error
            for folder in (root, root / ALIASES_FOLDER):
                for leftover in folder.glob(f".{name}@*"):  # from a killed writer, since a living one would hold the lock
                    discard(leftover)
        yield
