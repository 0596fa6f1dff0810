"""The explicit bases of a store: `.bases/<digest>.safetensors` beside its adapters, each kept once by content."""

from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lori.basis import Explicit
from lori.durable import replace_file
from lori.errors import AdapterFormatError

BASES_FOLDER = ".bases"

_loaded: WeakValueDictionary[str, Explicit] = WeakValueDictionary()


def basis_file(store: Path, digest: str) -> Path:
    """Returns where `store` keeps the basis of this digest."""
    return store / BASES_FOLDER / f"{digest}.safetensors"


def save_basis(store: Path, basis: Explicit) -> Path:
    """Puts a basis in `store`, where it is not there yet, and returns its file."""
    file = basis_file(store, basis.content_digest)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, basis_bytes(basis))
    return file


def basis_bytes(basis: Explicit) -> bytes:
    """Returns the content of a basis's file."""
    return save_tensors({module: a.contiguous() for module, a in basis.tensors.items()})


def load_basis(store: Path, digest: str) -> Explicit:
    """Returns the basis of this digest, read from `store` and checked; the adapters on it share one in memory.

    Raises `AdapterFormatError` where it is not there or not sound.
    """
    if (basis := _loaded.get(digest)) is not None:
        return basis
    file = basis_file(store, digest)
    try:
        tensors = load_tensors(file.read_bytes())
    except OSError as error:
        fault = f"its basis cannot be read: {error.strerror} (an adapter with an A of its own is moved with it: pack and unpack)"
        raise AdapterFormatError(str(file), [fault]) from error
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:  # the last three: what torch cannot hold
        raise AdapterFormatError(str(file), [f"it is not a safetensors file: {error}"]) from error
    if faults := [f"{m}: not a matrix of finite floats" for m, a in tensors.items() if not is_matrix(a)]:
        raise AdapterFormatError(str(file), faults)
    basis = Explicit.of(tensors)
    if basis.content_digest != digest:
        raise AdapterFormatError(str(file), [f"its digest is {basis.content_digest}, expected {digest}"])
    return _loaded.setdefault(digest, basis)


def is_matrix(tensor: torch.Tensor) -> bool:
    """Says whether `tensor` is a matrix of finite floats."""
    return tensor.is_floating_point() and tensor.dim() == 2 and bool(tensor.isfinite().all())
