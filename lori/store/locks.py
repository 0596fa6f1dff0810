"""The locks of a store's names: one writer at a time for each, over all processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lori.errors import AdapterError
from lori.store.aliases import ALIASES_FOLDER
from lori.store.files import discard, no_link

LOCKS_FOLDER = ".locks"
LOCK_S = 60.0
"""How long a writer waits for another one of the same name."""


@contextmanager
def locked(root: Path, *names: str) -> Iterator[None]:
    """Hold the locks of `names` in the store `root`, which is made, and cleans up after writers of them that were killed.

    Raises `AdapterError` where another process does not let go of one, or the folder of the locks or aliases is a link.
    """
    no_link(root / ALIASES_FOLDER)
    no_link(root / LOCKS_FOLDER).mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for name in sorted(names):  # in one order everywhere, or two could wait for each other
            try:
                held.enter_context(FileLock(root / LOCKS_FOLDER / name, timeout=LOCK_S))
            except Timeout as error:
                raise AdapterError(f"another process has been writing {name!r} in {root} for {LOCK_S:.0f} s") from error
            for folder in (root, root / ALIASES_FOLDER):
                for left in folder.glob(f".{name}@*"):  # a living writer would hold the lock
                    discard(left)
        yield
