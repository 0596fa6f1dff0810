"""An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`, and whatever else its maker put there (a card).

The folder verifies itself: one digest covers all that decides what the adapter does, another the rest of the config.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lori.adapter import Adapter
from lori.basis import Basis, Explicit
from lori.config import CONFIG_FILE, AdapterConfig, ExplicitConfig, basis_config, parse_config, seal_config
from lori.errors import AdapterError, AdapterFormatError
from lori.identity import BaseIdentity, last, natural
from lori.names import NUM_VERSION_DIGITS
from lori.peft.config import HUB_ID, peft_fault
from lori.sparse import ValueType
from lori.store.bases import BASES_FOLDER, load_basis, save_basis
from lori.store.files import new_folder, open_stored, read_stored, replace_file, write_file
from lori.store.locks import locked
from lori.tensor_file import length_fault, parse_tensors
from lori.weights import read_modules, weight_bytes

WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PICKLE_FILE = "adapter_model.bin"
ONLY_PICKLE = (
    f"{WEIGHTS_FILE} is missing, and {PICKLE_FILE} is a pickle, which can run any code: never read, it cannot be imported. "
    "Load the adapter with PEFT, write it with save_pretrained(folder, safe_serialization=True), and import that"
)
DIGESTED: dict[str, Any] = {"lori": {"basis", "base_digest", "shapes", "templates"}} | dict.fromkeys(
    ("r", "lora_alpha", "rank_pattern", "alpha_pattern"), True
)
"""The fields of the config that decide what an adapter does."""

MAX_TEXT_BYTES, MAX_WEIGHTS_BYTES = 2**24, 2**34
"""Of a config or a card, and of weights."""
MAX_BASIS_ENTRIES = 2**30
"""Entries of A over all modules, five times a 70B model's at rank 32: what a file alone may make us draw."""

Files = Mapping[str, bytes]
Read = Callable[[Path, str, int], bytes]
"""Returns the content of a file in a folder, of so many bytes at most: `read_stored`, or `read_source` for what is imported."""
BasisOf = Callable[[str], Explicit]
"""Returns the explicit basis of a digest. Raises `AdapterFormatError` where it has none."""


def content_digest(weights: bytes, config: AdapterConfig) -> str:
    """Return the sha256 (hex) of all that decides what an adapter does: the weights, and the fields `DIGESTED` of its config."""
    sha = hashlib.sha256(weights)
    sha.update(json.dumps(config.model_dump(mode="json", include=DIGESTED), sort_keys=True).encode())
    return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class Sealed:
    """An adapter as it is read, its digests filled in and its values rounded, and the files it is read from."""

    adapter: Adapter
    files: Files


def seal(adapter: Adapter) -> Sealed:
    """Return what `adapter` is on disk. The digests in its config do not matter; its values are rounded to `config.lori.values`.

    The files are read again, so what is sealed can be loaded. Raises `AdapterFormatError` with every fault of what could not:
    values that are not finite, a config that is not sound or not this adapter's, no modules.
    """
    if faults := [f"{name}: values that are not finite" for name, b in adapter.modules.items() if not b.values.isfinite().all()]:
        raise AdapterFormatError(adapter.name, faults)
    config = adapter.config
    if config.lori.basis != basis_config(adapter.basis):
        raise AdapterFormatError(adapter.name, [f"its basis is {adapter.basis}, and its config's {config.lori.basis}"])
    weights = weight_bytes(adapter.modules, config.lori.values)
    section = config.lori.model_copy(update={"content_digest": content_digest(weights, config)})
    _, content = seal_config(adapter.name, config.model_copy(update={"lori": section}))
    files = {CONFIG_FILE: content, WEIGHTS_FILE: weights}
    kept = parse_adapter(adapter.name, files, lambda _: _explicit(adapter.basis))
    if faults := [f"{name}: rank {b.shape[1]}" for name, b in adapter.modules.items() if kept.modules[name].shape != b.shape]:
        raise AdapterFormatError(adapter.name, [f"{fault}, and not so in its config" for fault in faults])
    in_order = {name: kept.modules[name] for name in adapter.modules}
    return Sealed(replace(kept, modules=in_order), files)


def stored_as(adapter: Adapter, values: ValueType) -> Sealed:
    """Return `adapter` with B's values stored as `values`, without metrics: others were measured. Raises as `seal`."""
    section = adapter.config.lori.model_copy(update={"values": values, "metrics": {}, "measured": {}})
    return seal(replace(adapter, config=adapter.config.model_copy(update={"lori": section})))


def save_adapter(adapter: Adapter, folder: Path) -> Adapter:
    """Write an adapter, see `seal`, and its basis where it is an explicit one, and return it as it is read.

    Written aside, synced and put in place, see `lori.store.files.new_folder`. Raises `AdapterFormatError` as `seal`,
    `AdapterError` as `check_replaceable`.
    """
    check_replaceable(folder)
    sealed = seal(replace(adapter, name=name_of(folder)))
    with basis_kept(folder.parent, adapter.basis), new_folder(folder) as scratch:
        for name, content in sealed.files.items():
            write_file(scratch / name, content)
    return sealed.adapter


@contextmanager
def basis_kept(store: Path, basis: Basis) -> Iterator[None]:
    """Inside, an explicit basis is in `store`, and no removal takes it for one that nobody needs."""
    if not isinstance(basis, Explicit):
        yield
        return
    with locked(store, BASES_FOLDER):
        save_basis(store, basis)
        yield


def check_replaceable(folder: Path) -> None:
    """Raise `AdapterError` where `folder` is there, and is neither an adapter nor empty: an adapter is not saved over it."""
    if folder.exists() and not (folder / CONFIG_FILE).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise AdapterError(f"{folder} is there and is no adapter: nothing is saved over it")


def write_record(folder: Path, config: AdapterConfig, card: str) -> None:
    """Replace the config of a saved adapter, what was measured since, and its card. What the adapter does stays as it is.

    Raises `AdapterFormatError` where the config is not sound, or says that the adapter does something else.
    """
    _, content = seal_config(str(folder), config)
    faults: list[str] = []
    weights = read_file(folder, WEIGHTS_FILE, faults)
    if weights is None:
        raise AdapterFormatError(str(folder), faults)
    if content_digest(weights, config) != config.lori.content_digest:
        raise AdapterFormatError(str(folder), ["the new config is not that of its weights"])
    replace_file(folder / CARD_FILE, card.encode())
    replace_file(folder / CONFIG_FILE, content)


def read_config(folder: Path) -> AdapterConfig:
    """Read an adapter's config alone. Raises `AdapterFormatError` with everything that is wrong with it."""
    faults: list[str] = []
    content = read_file(folder, CONFIG_FILE, faults)
    config = None if content is None else _parse(content, faults, is_pickled=_is_pickled(folder))
    if config is None or faults:
        raise AdapterFormatError(str(folder), faults)
    return config


def _parse(content: bytes, faults: list[str], *, is_pickled: bool) -> AdapterConfig | None:
    """Return the config in `content`. Adds its faults; that of a PEFT adapter has one, which says what to do with it."""
    found: list[str] = []
    config = parse_config(content, found)
    if config is None and (peft := peft_fault(content)):
        found = [ONLY_PICKLE if is_pickled else peft]
    faults += [fault for fault in found if fault not in faults]
    return config


def _is_pickled(folder: Path) -> bool:
    return os.path.lexists(folder / PICKLE_FILE) and not os.path.lexists(folder / WEIGHTS_FILE)


def read_files(folder: Path, faults: list[str], read: Read = read_stored) -> Files:
    """Return the content of an adapter's files by name, its card's too; what cannot be read is added to `faults`."""
    names = [CONFIG_FILE, WEIGHTS_FILE, *([CARD_FILE] if os.path.lexists(folder / CARD_FILE) else [])]
    found = {name: read_file(folder, name, faults, read) for name in names}
    return {name: content for name, content in found.items() if content is not None}


def read_file(folder: Path, name: str, faults: list[str], read: Read = read_stored) -> bytes | None:
    """Return the content of a regular file; where it cannot be read, as a link in a store, that is added to `faults`."""
    try:
        return read(folder, name, MAX_WEIGHTS_BYTES if name == WEIGHTS_FILE else MAX_TEXT_BYTES)
    except OSError as error:
        faults.append(_unreadable(folder, name, error))
        return None


def _unreadable(folder: Path, name: str, error: OSError) -> str:
    if name == WEIGHTS_FILE and isinstance(error, FileNotFoundError) and _is_pickled(folder):
        return ONLY_PICKLE
    return f"{name} cannot be read: {error.strerror}"


def file_faults(folder: Path) -> list[str]:
    """Return what is wrong with an adapter's files as far as that is seen at once: none is read whole, nor the config at all.

    Files that are not there or are links, and weights that are not as long as they say.
    """
    faults: list[str] = []
    for name in (WEIGHTS_FILE, *([CARD_FILE] if os.path.lexists(folder / CARD_FILE) else [])):
        try:
            with open_stored(folder, name) as file:
                fault = length_fault(name, file) if name == WEIGHTS_FILE else None
        except OSError as error:
            fault = _unreadable(folder, name, error)
        faults += [fault] if fault else []
    return faults


def name_of(folder: Path) -> str:
    """Return the name of the adapter in `folder`, which may be called `name@version`."""
    return folder.name.partition("@")[0]


def load_adapter(folder: Path, base: BaseIdentity | None = None) -> Adapter:
    """Read an adapter and checks it, against `base` too where that is given.

    Raises `AdapterFormatError` with every fault: files that cannot be read, missing, unknown and misshapen tensors, wrong dtypes,
    counts that differ, values that are not finite, content that is not what the digests say, another base, another A (which is
    drawn, where there is no `base`, only if the digests are right).
    """
    faults: list[str] = []
    files = read_files(folder, faults)
    return parse_adapter(name_of(folder), files, partial(load_basis, folder.parent), base, source=str(folder), faults=faults)


def parse_adapter(
    name: str,
    files: Files,
    basis_of: BasisOf,
    base: BaseIdentity | None = None,
    *,
    source: str | None = None,
    faults: Iterable[str] = (),
) -> Adapter:
    """Return the adapter that `files` are, called `name`, checked as `load_adapter` does; `faults` are those of reading them.

    Raises `AdapterFormatError` with every fault, of `source`, or of `name`.
    """
    faults = list(faults)
    config = _parse(files[CONFIG_FILE], faults, is_pickled=ONLY_PICKLE in faults) if CONFIG_FILE in files else None
    weights = files.get(WEIGHTS_FILE)
    tensors = None if weights is None else parse_tensors(WEIGHTS_FILE, weights, faults)
    adapter = None
    if config and base:
        faults += base_faults(config, base)
    if config and weights is not None and tensors is not None:
        if (found := content_digest(weights, config)) != config.lori.content_digest:
            faults.append(f"content digest is {found}, expected {config.lori.content_digest}")
        # Of another base whose layers have other shapes nothing that is missing or unknown says more.
        is_other = base and config.lori.base_digest != base.digest and _shape_faults(config, base)
        adapter = _assembled(name, config, tensors, basis_of, None if is_other else base, faults)
    if faults or adapter is None:
        raise AdapterFormatError(source or name, faults)
    return adapter


def _assembled(
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    basis_of: BasisOf,
    base: BaseIdentity | None,
    faults: list[str],
) -> Adapter | None:
    # A of shapes that nothing bears out is not drawn: it could take all memory, or hours.
    may_draw = not faults
    if base:
        may_draw = not _shape_faults(config, base)
        expected = [module for module in base.shapes if config.is_target(module)]
    else:
        expected = sorted({tensor.rpartition(".")[0] for tensor in tensors}, key=natural)
        faults += [f"{module}: not among target_modules" for module in expected if not config.is_target(module)]
        if (num_entries := _basis_entries(config, expected)) > MAX_BASIS_ENTRIES:
            may_draw = False
            faults.append(f"A has {num_entries} entries, expected {MAX_BASIS_ENTRIES} at most where no base model bears it out")
    if not expected:
        faults.append("it has no modules")
    modules = read_modules(tensors, config, expected, faults)
    basis = checked_basis(config, expected, basis_of, faults) if may_draw and modules else None
    return Adapter(name, config, modules, basis) if basis else None


def checked_basis(config: AdapterConfig, modules: Iterable[str], basis_of: BasisOf, faults: list[str]) -> Basis | None:
    """Return the basis of `config`; where it is none, or another one, that is added to `faults`."""
    said = config.lori.basis
    try:
        basis = basis_of(said.digest) if isinstance(said, ExplicitConfig) else said.basis()
    except AdapterFormatError as error:
        faults += error.faults
        return None
    shapes = {module: shape for module in modules if (shape := config.shape_of(module))}
    if isinstance(basis, Explicit):
        if lacking := [module for module in shapes if module not in basis.tensors]:
            faults += [f"{module}: its basis has no A for it" for module in lacking]
            return None
        found = {module: basis.tensors[module].shape[1] for module in shapes}
        wrong = [module for module, num_inputs in found.items() if num_inputs != shapes[module][1]]
        if wrong:
            faults += [f"{module}: its A has {found[module]} inputs, expected {shapes[module][1]}" for module in wrong]
            return None
    drawn = basis.digest({module: (config.rank_of(module), num_inputs) for module, (_, num_inputs) in shapes.items()})
    if drawn != config.lori.basis_digest:
        faults.append(f"A drawn again has the digest {drawn}, expected {config.lori.basis_digest}")
    return basis


def _basis_entries(config: AdapterConfig, modules: Iterable[str]) -> int:
    shapes = {module: shape for module in modules if (shape := config.shape_of(module))}
    return sum(config.rank_of(module) * num_inputs for module, (_, num_inputs) in shapes.items())


def base_faults(config: AdapterConfig, base: BaseIdentity) -> list[str]:
    """Return what is wrong with `config` where its adapter is to be of `base`."""
    if config.lori.base_digest != base.digest:
        found, expected = config.base_name, f"{base.name} ({base.digest[:NUM_VERSION_DIGITS]})"
        return [f"trained on the base {found}, expected {expected}: {_other_base(config.base_model_name_or_path)}"]
    faults = []
    targets = {module for module in base.shapes if config.is_target(module)}
    known = targets | {last(module) for module in targets}
    faults += [f"target_modules: the base has no linear layer called {t!r}" for t in config.target_modules if t not in known]
    return faults + _shape_faults(config, base)


def _other_base(name: str) -> str:
    flag = f"--model {name}" if HUB_ID.fullmatch(name) else f"--model with the folder of {name}"
    return f"pass {flag}, or train or import an adapter for the base that is loaded"


def _shape_faults(config: AdapterConfig, base: BaseIdentity) -> list[str]:
    found = {module: config.shape_of(module) for module in base.shapes if config.is_target(module)}
    return [
        f"{module}: lori.shapes has {shape}, expected {base.shapes[module]}"
        for module, shape in found.items()
        if shape not in (None, base.shapes[module])
    ]


def _explicit(basis: Basis) -> Explicit:
    assert isinstance(basis, Explicit)
    return basis
