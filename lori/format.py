"""An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`, and whatever else its maker put there (a card).

Per module the weights hold `<module>.mask`, a bitmap of (ceil(D R / 8),) uint8, and `<module>.values`, (K,) bf16.
safetensors only, never a pickle. Shapes: D outputs, R rank, N inputs, K kept entries.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lori.adapter import Adapter
from lori.config import AdapterConfig
from lori.errors import AdapterFormatError
from lori.sparse import SparseB, pack_mask, unpack_mask

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
VALUE_DTYPE = torch.bfloat16


def weight_bytes(modules: Mapping[str, SparseB]) -> bytes:
    """Returns the content of adapter_model.safetensors: the same modules give the same bytes."""
    tensors = {}
    for name in sorted(modules):
        tensors[f"{name}.mask"] = pack_mask(modules[name].mask)
        tensors[f"{name}.values"] = modules[name].values.to(VALUE_DTYPE).contiguous()
    return save_tensors(tensors)


def content_digest(weights: bytes, config: Mapping[str, object]) -> str:
    """Returns the sha256 (hex) of all that decides what an adapter does: the weights, and these fields of its config."""
    sha = hashlib.sha256(weights)
    sha.update(json.dumps({key: config[key] for key in ("r", "lora_alpha", "basis", "base_digest")}, sort_keys=True).encode())
    return sha.hexdigest()


def _digested_fields(config: AdapterConfig) -> dict[str, object]:
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "basis": config.lori.basis.model_dump(),
        "base_digest": config.lori.base_digest,
    }


def save_adapter(folder: Path, config: AdapterConfig, modules: Mapping[str, SparseB]) -> Adapter:
    """Writes an adapter, its content digest filled in, and returns it as it will be read.

    Written aside, synced and renamed: a reader sees the old folder or the new one, or none for the moment between two renames.
    A crash in that moment leaves the old one beside, hidden, its name ending in `.old`. Raises `AdapterFormatError` for what
    could not be loaded again: values that are not finite, a config that is not sound.
    """
    rounded = {name: SparseB(b.mask, b.values.to(VALUE_DTYPE)) for name, b in modules.items()}
    if faults := [
        f"{name}: values that are not finite in {VALUE_DTYPE}" for name, b in rounded.items() if not b.values.isfinite().all()
    ]:
        raise AdapterFormatError(str(folder), faults)
    weights = weight_bytes(rounded)
    digest = content_digest(weights, _digested_fields(config))
    config = config.model_copy(update={"lori": config.lori.model_copy(update={"content_digest": digest})})
    config_file = _config_bytes(folder, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        _write(scratch / WEIGHTS_FILE, weights)
        _write(scratch / CONFIG_FILE, config_file)
        _put_in_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Adapter(folder.name, config, rounded)


def write_config(folder: Path, config: AdapterConfig, card: str) -> None:
    """Replaces the config of a saved adapter, what was measured since, and its card (README.md). The weights stay as they are.

    Raises `AdapterFormatError` where the config is not sound.
    """
    for name, content in (("README.md", card.encode()), (CONFIG_FILE, _config_bytes(folder, config))):
        _write(folder / f".{name}", content)
        (folder / f".{name}").replace(folder / name)


def _config_bytes(folder: Path, config: AdapterConfig) -> bytes:
    # Read again before it is written: a copy with changes was never checked.
    content = (config.model_dump_json(indent=2) + "\n").encode()
    _parse_config(folder, content)
    return content


def _parse_config(folder: Path, content: bytes) -> AdapterConfig:
    try:
        return AdapterConfig.model_validate_json(content)
    except ValidationError as error:
        faults = [f"{CONFIG_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
        raise AdapterFormatError(str(folder), faults) from error


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(scratch: Path, folder: Path) -> None:
    if folder.exists():
        # A folder cannot be renamed over one that is not empty: the old one steps aside first.
        aside = scratch.with_name(scratch.name + ".old")
        folder.rename(aside)
        try:
            scratch.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()
    else:
        scratch.rename(folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def read_config(folder: Path) -> AdapterConfig:
    """Reads an adapter's config alone. Raises `AdapterFormatError` with everything that is wrong with it."""
    try:
        content = (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise AdapterFormatError(str(folder), [f"{CONFIG_FILE} cannot be read: {error.strerror}"]) from error
    return _parse_config(folder, content)


def load_adapter(folder: Path, base_digest: str, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Reads an adapter and checks it against the base model that has this digest and these `shapes` (name -> (D, N)).

    Raises `AdapterFormatError` with every fault: missing, unknown and misshapen tensors, wrong dtypes, counts that differ,
    values that are not finite, content that is not what the digest says, another base, another A.
    """
    config = read_config(folder)
    try:
        if (folder / WEIGHTS_FILE).is_fifo():
            raise AdapterFormatError(str(folder), [f"{WEIGHTS_FILE} is a pipe"])  # It would be read for ever.
        weights = (folder / WEIGHTS_FILE).read_bytes()
        tensors = load_tensors(weights)
    except OSError as error:
        raise AdapterFormatError(str(folder), [f"{WEIGHTS_FILE} cannot be read: {error.strerror}"]) from error
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:  # the last three: what torch cannot hold
        raise AdapterFormatError(str(folder), [f"{WEIGHTS_FILE} is not a safetensors file: {error}"]) from error
    faults = []
    if (found := content_digest(weights, _digested_fields(config))) != config.lori.content_digest:
        faults.append(f"content digest is {found}, expected {config.lori.content_digest}")
    if config.lori.base_digest != base_digest:
        faults.append(
            f"trained on the base {config.base_model_name_or_path} ({config.lori.base_digest[:12]}), "
            f"expected the base that is served ({base_digest[:12]})"
        )
    targets = {n: s for n, s in shapes.items() if n.rpartition(".")[2] in config.target_modules}
    modules = _read_modules(tensors, targets, config.r, faults)
    inputs = {name: (config.r, num_inputs) for name, (_, num_inputs) in targets.items()}
    known = {name.rpartition(".")[2] for name in targets}
    faults += [f"target_modules: the base has no linear layer called {t!r}" for t in config.target_modules if t not in known]
    # Not drawn where no module has the shape it should: the rank may be anything.
    if modules and (drawn := config.lori.basis.basis().digest(inputs)) != config.lori.basis_digest:
        faults.append(f"A drawn again has the digest {drawn}, expected {config.lori.basis_digest}")
    if faults:
        raise AdapterFormatError(str(folder), faults)
    return Adapter(folder.name, config, modules)


def _read_modules(
    tensors: Mapping[str, torch.Tensor], targets: Mapping[str, tuple[int, int]], rank: int, faults: list[str]
) -> dict[str, SparseB]:
    expected = {f"{module}.{part}" for module in targets for part in ("mask", "values")}
    faults += [f"{name}: missing" for name in sorted(expected - tensors.keys())]
    faults += [f"{name}: unknown tensor" for name in sorted(tensors.keys() - expected)]
    modules = {}
    for module, (num_outputs, _) in targets.items():
        bitmap, values = tensors.get(f"{module}.mask"), tensors.get(f"{module}.values")
        if bitmap is None or values is None:
            continue
        before = len(faults)
        num_bytes = (num_outputs * rank + 7) // 8
        if bitmap.dtype != torch.uint8 or bitmap.shape != (num_bytes,):
            faults.append(f"{module}.mask: {bitmap.dtype} {tuple(bitmap.shape)}, expected torch.uint8 ({num_bytes},)")
        if values.dtype != VALUE_DTYPE or values.dim() != 1:
            faults.append(f"{module}.values: {values.dtype} of {values.dim()} dimensions, expected {VALUE_DTYPE} of 1")
        elif not values.isfinite().all():
            faults.append(f"{module}.values: {int((~values.isfinite()).sum())} values are not finite")
        if len(faults) > before:
            continue
        mask = unpack_mask(bitmap, (num_outputs, rank))
        if (kept := int(mask.sum())) != values.numel():
            faults.append(f"{module}: the mask keeps {kept} entries, and there are {values.numel()} values")
        else:
            modules[module] = SparseB(mask, values)
    return modules
