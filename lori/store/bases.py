"""The explicit bases of a store: `.bases/<digest>.safetensors` beside its adapters, each stored once by content."""

from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors.torch import save

from lori.basis import Explicit
from lori.errors import AdapterFormatError
from lori.store.files import read_stored, replace_file
from lori.tensor_file import parse_tensors

BASES_FOLDER = ".bases"
MAX_BYTES = 2**34
"""Maximum size of a basis's file."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_cache: WeakValueDictionary[Path, Explicit] = WeakValueDictionary()


def basis_file(store: Path, digest: str) -> Path:
    """Return the path of the basis with this digest in `store`."""
    return store / BASES_FOLDER / f"{digest}.safetensors"


def save_basis(store: Path, basis: Explicit) -> Path:
    """Put a basis into `store` if it is missing there or damaged, and return its file."""
    file, content = basis_file(store, basis.content_digest), basis_bytes(basis)
    if not _holds(file, content):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, content)
    return file


def basis_bytes(basis: Explicit) -> bytes:
    """Return the content of a basis's file."""
    return save({module: a.contiguous() for module, a in basis.tensors.items()})


def load_basis(store: Path, digest: str) -> Explicit:
    """Return the basis with this digest, read from `store` and checked. All adapters on the basis share it in memory.

    Raises `AdapterFormatError` if the basis is missing or not sound.
    """
    file = basis_file(store.absolute(), digest)
    cached = _cache.get(file)
    if cached is not None and file.is_file():
        return cached
    try:
        content = read_stored(file.parent, file.name, MAX_BYTES)
    except OSError as error:
        fault = f"its basis cannot be read: {error.strerror} (an adapter with an A of its own is moved with it: pack and unpack)"
        raise AdapterFormatError(str(file), [fault]) from error
    basis = parse_basis(str(file), content, digest)
    _cache[file] = basis
    return basis


def parse_basis(source: str, content: bytes, digest: str) -> Explicit:
    """Return the basis in `content`. Raises `AdapterFormatError` about `source` if it is not sound or has another digest."""
    faults: list[str] = []
    tensors = parse_tensors("its basis", content, faults) or {}
    faults += [f"{module}: not a matrix of finite floats" for module, a in tensors.items() if not _is_matrix(a)]
    if faults:
        raise AdapterFormatError(source, faults)
    basis = Explicit.from_tensors(tensors)
    if basis.content_digest != digest:
        raise AdapterFormatError(source, [f"its basis has the digest {basis.content_digest}, expected {digest}"])
    return basis


def _holds(file: Path, content: bytes) -> bool:
    try:
        return read_stored(file.parent, file.name, MAX_BYTES) == content
    except OSError:  # a missing file or a link is replaced
        return False


def _is_matrix(tensor: torch.Tensor) -> bool:
    return tensor.dtype in DTYPES and tensor.dim() == 2 and bool(tensor.isfinite().all())
