"""What stores and file systems refuse, as a caller is told it: without a path of this machine."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError, UnreachableError
from lori.store.store import AdapterStore
from server.errors import ConflictError, StoreError

MOUNT = (
    "mount it to be written, such as by LORI_ADAPTERS_MODE=rw for docker/compose.yaml, and let it belong to the server's user, "
    "10001 there"
)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def told(*stores: AdapterStore | None) -> Iterator[None]:
    """Raises `ConflictError` or `StoreError` for what the block raises of stores; what a caller can mend stays as it is."""
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
