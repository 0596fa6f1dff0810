"""An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`, and whatever else its maker put there (a card).

The folder verifies itself: one digest covers all that decides what the adapter does, another the rest of the config.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from lori.adapter import Adapter
from lori.basis import Basis
from lori.basis_file import load_basis
from lori.config import AdapterConfig, ExplicitConfig
from lori.durable import new_folder, replace_file, write_file
from lori.errors import AdapterFormatError
from lori.identity import BaseIdentity
from lori.names import natural
from lori.sparse import SparseB
from lori.values import ValueType, rounded
from lori.weights import read_modules, weight_bytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
DIGESTED: dict[str, Any] = {"lori": {"basis", "base_digest", "shapes"}} | dict.fromkeys(
    ("r", "lora_alpha", "rank_pattern", "alpha_pattern"), True
)
"""The fields of the config that decide what an adapter does."""


def content_digest(weights: bytes, config: AdapterConfig) -> str:
    """Returns the sha256 (hex) of all that decides what an adapter does: the weights, and the fields `DIGESTED` of its config."""
    sha = hashlib.sha256(weights)
    sha.update(json.dumps(config.model_dump(mode="json", include=DIGESTED), sort_keys=True).encode())
    return sha.hexdigest()


def config_digest(content: bytes) -> str:
    """Returns the sha256 (hex) of a config's JSON, its own digest left out: however it is spaced and ordered."""
    document = json.loads(content)
    del document["lori"]["config_digest"]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def stored_as(adapter: Adapter, values: ValueType) -> Adapter:
    """Returns `adapter`, its config saying that B's values are stored as `values`."""
    section = adapter.config.lori.model_copy(update={"values": values})
    return replace(adapter, config=adapter.config.model_copy(update={"lori": section}))


@dataclass(frozen=True, slots=True)
class Sealed:
    """An adapter as it will be read, its digests filled in and its values rounded, and the files it will be read from."""

    adapter: Adapter
    files: Mapping[str, bytes]


def seal(adapter: Adapter) -> Sealed:
    """Returns what `adapter` is on disk. The digests in its config do not matter; its values are rounded to `config.lori.values`.

    Raises `AdapterFormatError` for what could not be loaded again: values that are not finite, a config that is not sound.
    """
    value_type = adapter.config.lori.values
    kept = {name: rounded(b, value_type) for name, b in adapter.modules.items()}
    if faults := [
        f"{name}: values that are not finite in {value_type}"
        for name, b in kept.items()
        if not (b.values.isfinite().all() and adapter.modules[name].values.isfinite().all())
    ]:
        raise AdapterFormatError(adapter.name, faults)
    weights = weight_bytes(adapter.modules, value_type)
    section = adapter.config.lori.model_copy(update={"content_digest": content_digest(weights, adapter.config)})
    config, content = _seal_config(adapter.name, adapter.config.model_copy(update={"lori": section}))
    return Sealed(replace(adapter, config=config, modules=kept), {WEIGHTS_FILE: weights, CONFIG_FILE: content})


def save_adapter(folder: Path, config: AdapterConfig, modules: Mapping[str, SparseB]) -> Adapter:
    """Writes an adapter, see `seal`, and returns it as it will be read.

    Written aside, synced and renamed, see `lori.durable.new_folder`. An explicit basis must lie in the same store, see
    `lori.basis_file`. Raises `AdapterFormatError` as `seal`.
    """
    sealed = seal(Adapter(name_of(folder), config, modules, _basis(folder, config)))
    with new_folder(folder) as scratch:
        for name, content in sealed.files.items():
            write_file(scratch / name, content)
    return sealed.adapter


def write_config(folder: Path, config: AdapterConfig, card: str) -> None:
    """Replaces the config of a saved adapter, what was measured since, and its card (README.md). The weights stay as they are.

    Raises `AdapterFormatError` where the config is not sound.
    """
    _, content = _seal_config(str(folder), config)
    replace_file(folder / CARD_FILE, card.encode())
    replace_file(folder / CONFIG_FILE, content)


def _seal_config(source: str, config: AdapterConfig) -> tuple[AdapterConfig, bytes]:
    """Returns `config` with its own digest, and its JSON, which is read again: a copy with changes was never checked."""
    digest = config_digest(config.model_dump_json().encode())
    section = config.lori.model_copy(update={"config_digest": digest})
    content = (config.model_copy(update={"lori": section}).model_dump_json(indent=2) + "\n").encode()
    return _parse_config(source, content), content


def _parse_config(source: str, content: bytes) -> AdapterConfig:
    """Returns the config that `content` is, whatever its digest; `source` is for the message.

    Raises `AdapterFormatError` with everything that is wrong with it.
    """
    try:
        return AdapterConfig.model_validate_json(content)
    except ValidationError as error:
        faults = [f"{CONFIG_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
        raise AdapterFormatError(source, faults) from error


def _digest_faults(config: AdapterConfig, content: bytes) -> list[str]:
    try:
        found = config_digest(content)
    except ValueError as error:  # what pydantic's parser takes and Python's does not: a number of 5,000 digits
        return [f"{CONFIG_FILE}: JSON: {error}"]
    if found == config.lori.config_digest:
        return []
    return [f"{CONFIG_FILE}: its digest is {found}, expected {config.lori.config_digest}: it was changed, or is damaged"]


def read_config(folder: Path) -> AdapterConfig:
    """Reads an adapter's config alone. Raises `AdapterFormatError` with everything that is wrong with it."""
    content = read_regular(folder, CONFIG_FILE)
    config = _parse_config(str(folder), content)
    if faults := _digest_faults(config, content):
        raise AdapterFormatError(str(folder), faults)
    return config


def read_regular(folder: Path, name: str) -> bytes:
    """Returns the content of a file.

    Raises `AdapterFormatError` where it cannot be read, or is a pipe or a device, which may never end.
    """
    try:
        if (folder / name).exists() and not (folder / name).is_file():
            raise AdapterFormatError(str(folder), [f"{name} is not a regular file"])
        return (folder / name).read_bytes()
    except OSError as error:
        raise AdapterFormatError(str(folder), [f"{name} cannot be read: {error.strerror}"]) from error


def name_of(folder: Path) -> str:
    """Returns the name of the adapter in `folder`, which may be called `name@version`."""
    return folder.name.partition("@")[0]


def load_adapter(folder: Path, base: BaseIdentity | None = None) -> Adapter:
    """Reads an adapter and checks it, against `base` too where that is given.

    Raises `AdapterFormatError` with every fault: missing, unknown and misshapen tensors, wrong dtypes, counts that differ,
    values that are not finite, content that is not what the digests say, another base, another A.
    """
    content = read_regular(folder, CONFIG_FILE)
    config = _parse_config(str(folder), content)
    weights = read_regular(folder, WEIGHTS_FILE)
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:  # the last three: what torch cannot hold
        raise AdapterFormatError(str(folder), [f"{WEIGHTS_FILE} is not a safetensors file: {error}"]) from error
    faults = _digest_faults(config, content)
    if (found := content_digest(weights, config)) != config.lori.content_digest:
        faults.append(f"content digest is {found}, expected {config.lori.content_digest}")
    if base:
        shape_faults = _shape_faults(config, base)
        faults += _base_faults(config, base) + shape_faults
        expected = [module for module in base.shapes if config.is_target(module)]
        may_draw = not shape_faults
    else:
        expected = sorted({name.rpartition(".")[0] for name in tensors}, key=natural)
        may_draw = not faults
        faults += [f"{module}: not among target_modules" for module in expected if not config.is_target(module)]
    modules = read_modules(tensors, config, expected, faults)
    # A of shapes that nothing bears out is not drawn: it could take all memory.
    basis = _checked_basis(folder, config, expected, faults) if may_draw and modules else None
    if faults or basis is None:
        raise AdapterFormatError(str(folder), faults or ["it has no modules"])
    return Adapter(name_of(folder), config, modules, basis)


def _checked_basis(folder: Path, config: AdapterConfig, modules: Iterable[str], faults: list[str]) -> Basis | None:
    try:
        basis = _basis(folder, config)
    except AdapterFormatError as error:
        faults += error.faults
        return None
    shapes = {module: shape for module in modules if (shape := config.shape_of(module))}
    drawn = basis.digest({module: (config.rank_of(module), num_inputs) for module, (_, num_inputs) in shapes.items()})
    if drawn != config.lori.basis_digest:
        faults.append(f"A drawn again has the digest {drawn}, expected {config.lori.basis_digest}")
    return basis


def _base_faults(config: AdapterConfig, base: BaseIdentity) -> list[str]:
    faults = []
    if config.lori.base_digest != base.digest:
        faults.append(
            f"trained on the base {config.base_model_name_or_path} ({config.lori.base_digest[:12]}), "
            f"expected the base that is served ({base.digest[:12]})"
        )
    targets = {module for module in base.shapes if config.is_target(module)}
    known = targets | {module.rpartition(".")[2] for module in targets}
    faults += [f"target_modules: the base has no linear layer called {t!r}" for t in config.target_modules if t not in known]
    return faults


def _shape_faults(config: AdapterConfig, base: BaseIdentity) -> list[str]:
    found = {module: config.shape_of(module) for module in base.shapes if config.is_target(module)}
    return [
        f"{module}: lori.shapes has {shape}, expected {base.shapes[module]}"
        for module, shape in found.items()
        if shape not in (None, base.shapes[module])
    ]


def _basis(folder: Path, config: AdapterConfig) -> Basis:
    if isinstance(config.lori.basis, ExplicitConfig):
        return load_basis(folder.parent, config.lori.basis.digest)
    return config.lori.basis.basis()
