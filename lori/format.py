"""An adapter as a folder: `adapter_config.json`, `adapter_model.safetensors`, and any other file its author adds (a card).

The folder verifies itself: one digest covers everything that decides what the adapter does, another the rest of the config.
Statistics of the adapter's prompts, which it may have, verify themselves.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from lori.identity import BaseIdentity, natural_key, projection_of
from lori.names import NUM_VERSION_DIGITS
from lori.peft.config import HUB_ID, peft_fault
from lori.prompt_statistics import MAX_STATISTICS_BYTES, STATISTICS_FILE, PromptStatistics
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
"""Fields of the config that decide what an adapter does."""

MAX_TEXT_BYTES, MAX_WEIGHTS_BYTES = 2**24, 2**34
"""Maximum size of a config or a card, and of the weights."""
MAX_FILE_BYTES = {WEIGHTS_FILE: MAX_WEIGHTS_BYTES, STATISTICS_FILE: MAX_STATISTICS_BYTES}
"""Maximum size of a file, where that is not `MAX_TEXT_BYTES`."""
EXTRA_FILES = (CARD_FILE, STATISTICS_FILE)
"""Files that an adapter may have, and that move with it."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *EXTRA_FILES)
MAX_BASIS_ENTRIES = 2**30
"""Maximum number of entries of A, over all modules, that are drawn if only the file gives their shapes. Five times the entries
of a 70B model at rank 32."""

Files = Mapping[str, bytes]
"""Contents of an adapter's files, by name."""
Read = Callable[[Path, str, int], bytes]
"""Function of a folder, a file name and a maximum size that returns the content: `read_stored`, or `read_source` for imports."""
BasisOf = Callable[[str], Explicit]
"""Function of a digest that returns the explicit basis. Raises `AdapterFormatError` if there is none."""


def content_digest(weights: bytes, config: AdapterConfig) -> str:
    """Return the sha256 (hex) of everything that decides what an adapter does: weights, and the config's `DIGESTED` fields."""
    sha = hashlib.sha256(weights)
    sha.update(json.dumps(config.model_dump(mode="json", include=DIGESTED), sort_keys=True).encode())
    return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class Sealed:
    """An adapter with digests filled in and values rounded, exactly as a reader will load it, and its files."""

    adapter: Adapter
    files: Files


def seal(adapter: Adapter) -> Sealed:
    """Return `adapter` in its on-disk form. Computes the config's digests, and rounds the values to `config.lori.values`.

    The files are parsed again, so a sealed adapter can be loaded. Raises `AdapterFormatError` with every fault of an adapter that
    could not: values that are not finite, a config that is not sound or belongs to another adapter, no modules.
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
    parsed = parse_adapter(adapter.name, files, lambda _: _explicit(adapter.basis))
    if faults := [f"{name}: rank {b.shape[1]}" for name, b in adapter.modules.items() if parsed.modules[name].shape != b.shape]:
        raise AdapterFormatError(adapter.name, [f"{fault}, and not so in its config" for fault in faults])
    in_order = {name: parsed.modules[name] for name in adapter.modules}
    return Sealed(replace(parsed, modules=in_order), files)


def stored_as(adapter: Adapter, values: ValueType) -> Sealed:
    """Return `adapter` sealed with B's values stored as `values`. Drops its metrics, which were measured with other values.

    Raises as `seal`.
    """
    section = adapter.config.lori.model_copy(update={"values": values, "metrics": {}, "measured": {}})
    return seal(replace(adapter, config=adapter.config.model_copy(update={"lori": section})))


def save_adapter(adapter: Adapter, folder: Path) -> Adapter:
    """Write an adapter, and its basis if that is explicit. Return the adapter as a reader will load it, see `seal`.

    The files are written to a scratch folder, synced and moved into place, see `lori.store.files.new_folder`. Raises
    `AdapterFormatError` as `seal`, `AdapterError` as `check_replaceable`.
    """
    check_replaceable(folder)
    sealed = seal(replace(adapter, name=name_of(folder)))
    with stored_basis(folder.parent, adapter.basis), new_folder(folder) as scratch:
        for name, content in sealed.files.items():
            write_file(scratch / name, content)
    return sealed.adapter


@contextmanager
def stored_basis(store: Path, basis: Basis) -> Iterator[None]:
    """Put an explicit basis into `store`. Inside the block no removal deletes the basis as unused."""
    if not isinstance(basis, Explicit):
        yield
        return
    with locked(store, BASES_FOLDER):
        save_basis(store, basis)
        yield


def check_replaceable(folder: Path) -> None:
    """Raise `AdapterError` if `folder` exists and is neither an adapter nor empty: nothing is saved over such a folder."""
    if folder.exists() and not (folder / CONFIG_FILE).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise AdapterError(f"{folder} is there and is no adapter: nothing is saved over it")


def write_record(folder: Path, config: AdapterConfig, card: str) -> None:
    """Replace the config of a saved adapter, with new metrics, and its card. The weights stay as they are.

    Raises `AdapterFormatError` if the config is not sound or has another content digest than the weights.
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
    """Read an adapter's config and no other file. Raises `AdapterFormatError` with every fault of the config."""
    faults: list[str] = []
    content = read_file(folder, CONFIG_FILE, faults)
    config = None if content is None else _parse(content, faults, is_pickled=_is_pickled(folder))
    if config is None or faults:
        raise AdapterFormatError(str(folder), faults)
    return config


def _parse(content: bytes, faults: list[str], *, is_pickled: bool) -> AdapterConfig | None:
    """Return the config in `content`, or None. Adds its faults; a PEFT config gives a single fault that says how to import it."""
    config_faults: list[str] = []
    config = parse_config(content, config_faults)
    if config is None and (peft := peft_fault(content)):
        config_faults = [ONLY_PICKLE if is_pickled else peft]
    faults += [fault for fault in config_faults if fault not in faults]
    return config


def _is_pickled(folder: Path) -> bool:
    return os.path.lexists(folder / PICKLE_FILE) and not os.path.lexists(folder / WEIGHTS_FILE)


def read_files(folder: Path, faults: list[str], read: Read = read_stored, extras: Sequence[str] = EXTRA_FILES) -> Files:
    """Return the contents of an adapter's files by name, with those of `extras` that it has.

    Adds a fault for each file that cannot be read.
    """
    names = [CONFIG_FILE, WEIGHTS_FILE, *(name for name in extras if os.path.lexists(folder / name))]
    contents = {name: read_file(folder, name, faults, read) for name in names}
    return {name: content for name, content in contents.items() if content is not None}


def read_file(folder: Path, name: str, faults: list[str], read: Read = read_stored) -> bytes | None:
    """Return the content of a regular file. Adds a fault and returns None if it cannot be read, such as a link in a store."""
    try:
        return read(folder, name, MAX_FILE_BYTES.get(name, MAX_TEXT_BYTES))
    except OSError as error:
        faults.append(_unreadable(folder, name, error))
        return None


def _unreadable(folder: Path, name: str, error: OSError) -> str:
    if name == WEIGHTS_FILE and isinstance(error, FileNotFoundError) and _is_pickled(folder):
        return ONLY_PICKLE
    return f"{name} cannot be read: {error.strerror}"


def file_faults(folder: Path) -> list[str]:
    """Return the faults of an adapter's weights and card that show without reading them whole. Does not read the config.

    These are missing weights (a card is optional), links, other files that cannot be opened, and weights whose length is not the
    one in their header.
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
    """Return the name of the adapter in `folder`. The folder may be called `name@version`."""
    return folder.name.partition("@")[0]


def load_adapter(folder: Path, base: BaseIdentity | None = None) -> Adapter:
    """Read and check an adapter, against `base` too if it is given.

    Raises `AdapterFormatError` with every fault: files that cannot be read, missing, unknown and misshapen tensors, wrong dtypes,
    counts that differ, values that are not finite, wrong digests, another base, another A. Without a `base`, A is drawn and
    compared only if there is no other fault.
    """
    faults: list[str] = []
    # Statistics that are damaged must not keep an adapter from being loaded.
    files = read_files(folder, faults, extras=[CARD_FILE])
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
    """Return the adapter in `files`, called `name`, with the checks of `load_adapter`. `faults` are those of reading the files.

    Statistics of prompts among the files are checked, too. Raises `AdapterFormatError` with every fault, about `source`, by
    default `name`.
    """
    faults = list(faults)
    config = _parse(files[CONFIG_FILE], faults, is_pickled=ONLY_PICKLE in faults) if CONFIG_FILE in files else None
    weights = files.get(WEIGHTS_FILE)
    tensors = None if weights is None else parse_tensors(WEIGHTS_FILE, weights, faults)
    adapter = None
    if config and base:
        faults += base_faults(config, base)
    if config and weights is not None and tensors is not None:
        if (digest := content_digest(weights, config)) != config.lori.content_digest:
            faults.append(f"content digest is {digest}, expected {config.lori.content_digest}")
        if STATISTICS_FILE in files:
            try:
                parse_statistics(files[STATISTICS_FILE], config.lori.content_digest)
            except AdapterFormatError as error:
                faults += error.faults
        # For an adapter of another base with other shapes, faults about missing or unknown tensors would add nothing.
        is_other = base and config.lori.base_digest != base.digest and _shape_faults(config, base)
        adapter = _assemble(name, config, tensors, basis_of, None if is_other else base, faults)
    if faults or adapter is None:
        raise AdapterFormatError(source or name, faults)
    return adapter


def parse_statistics(content: bytes, digest: str | None, source: str = STATISTICS_FILE) -> PromptStatistics:
    """Return the statistics in a file's `content`.

    Raises `AdapterFormatError` about `source` with their faults. It is one that they are of an adapter whose content has another
    `digest`.
    """
    if len(content) > MAX_STATISTICS_BYTES:
        fault = f"{STATISTICS_FILE}: has {len(content)} bytes, expected {MAX_STATISTICS_BYTES} at most"
        raise AdapterFormatError(source, [fault])
    try:
        statistics = PromptStatistics.from_bytes(source, content)
    except AdapterFormatError as error:
        raise AdapterFormatError(source, [f"{STATISTICS_FILE}: {fault}" for fault in error.faults]) from error
    if digest and statistics.adapter_digest != digest:
        versions = f"{statistics.adapter_digest[:NUM_VERSION_DIGITS]}, expected {digest[:NUM_VERSION_DIGITS]}"
        remedy = "run python -m training.calibrate again, or remove it"
        raise AdapterFormatError(source, [f"{STATISTICS_FILE}: belongs to the version {versions}: {remedy}"])
    return statistics


def _assemble(
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    basis_of: BasisOf,
    base: BaseIdentity | None,
    faults: list[str],
) -> Adapter | None:
    # A is drawn only for trusted shapes: for others the draw could take all memory, or hours.
    may_draw = not faults
    if base:
        may_draw = not _shape_faults(config, base)
        expected = [module for module in base.shapes if config.is_target(module)]
    else:
        expected = sorted({tensor.rpartition(".")[0] for tensor in tensors}, key=natural_key)
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
    """Return the basis that `config` names, or None if it cannot be used. Adds a fault if it is missing or its A differs."""
    named = config.lori.basis
    try:
        basis = basis_of(named.digest) if isinstance(named, ExplicitConfig) else named.basis()
    except AdapterFormatError as error:
        faults += error.faults
        return None
    shapes = {module: shape for module in modules if (shape := config.shape_of(module))}
    if isinstance(basis, Explicit):
        if missing := [module for module in shapes if module not in basis.tensors]:
            faults += [f"{module}: its basis has no A for it" for module in missing]
            return None
        widths = {module: basis.tensors[module].shape[1] for module in shapes}
        misshapen = [module for module, num_inputs in widths.items() if num_inputs != shapes[module][1]]
        if misshapen:
            faults += [f"{module}: its A has {widths[module]} inputs, expected {shapes[module][1]}" for module in misshapen]
            return None
    drawn = basis.digest({module: (config.rank_of(module), num_inputs) for module, (_, num_inputs) in shapes.items()})
    if drawn != config.lori.basis_digest:
        faults.append(f"A drawn again has the digest {drawn}, expected {config.lori.basis_digest}")
    return basis


def _basis_entries(config: AdapterConfig, modules: Iterable[str]) -> int:
    shapes = {module: shape for module in modules if (shape := config.shape_of(module))}
    return sum(config.rank_of(module) * num_inputs for module, (_, num_inputs) in shapes.items())


def base_faults(config: AdapterConfig, base: BaseIdentity) -> list[str]:
    """Return the faults of an adapter's `config` that keep the adapter from working on `base`."""
    if config.lori.base_digest != base.digest:
        expected = f"{base.name} ({base.digest[:NUM_VERSION_DIGITS]})"
        return [f"trained on the base {config.base_name}, expected {expected}: {_base_advice(config.base_model_name_or_path)}"]
    faults = []
    targets = {module for module in base.shapes if config.is_target(module)}
    names = targets | {projection_of(module) for module in targets}
    faults += [f"target_modules: the base has no linear layer called {t!r}" for t in config.target_modules if t not in names]
    return faults + _shape_faults(config, base)


def _base_advice(name: str) -> str:
    flag = f"--model {name}" if HUB_ID.fullmatch(name) else f"--model with the folder of {name}"
    return f"pass {flag}, or train or import an adapter for the base that is loaded"


def _shape_faults(config: AdapterConfig, base: BaseIdentity) -> list[str]:
    shapes = {module: config.shape_of(module) for module in base.shapes if config.is_target(module)}
    return [
        f"{module}: lori.shapes has {shape}, expected {base.shapes[module]}"
        for module, shape in shapes.items()
        if shape not in (None, base.shapes[module])
    ]


def _explicit(basis: Basis) -> Explicit:
    assert isinstance(basis, Explicit)
    return basis
