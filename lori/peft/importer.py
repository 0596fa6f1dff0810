"""Import of adapters from outside: a PEFT LoRA, as the paper's authors publish, or the file contents of a LoRI adapter.

A PEFT LoRA becomes an explicit basis and a sparse B of its nonzero entries. All checks come before anything is stored.
Reads safetensors only, never a pickle. Does not import PEFT. Shapes: D outputs, R rank, N inputs of a module.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from safetensors import safe_open

from lori.adapter import Adapter
from lori.basis import Basis, Explicit, Seeded
from lori.config import CONFIG_FILE, new_config, target_names
from lori.errors import AdapterError, AdapterFormatError
from lori.format import ONLY_PICKLE, PICKLE_FILE, WEIGHTS_FILE, BasisOf, Files, Sealed, parse_adapter, read_file, seal
from lori.identity import BaseIdentity
from lori.mask import top_k_mask
from lori.names import check_name
from lori.peft.config import HUB_ID, NO_LORA, TEMPLATES_FILE, PeftConfig, parse_peft_config
from lori.sparse import SparseB, ValueType, rounding_error
from lori.store.files import read_source, source_file
from lori.template import Template
from lori.tensor_file import UNREADABLE, first_bytes, unreadable_fault

TENSOR = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")
"""Names of LoRA tensors: `<path>.lora_A.weight`, or with the adapter's name in PEFT, `<path>.lora_A.default.weight`."""
EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)(\.base_layer)?\.(weight|bias)")
"""Names of embeddings, which PEFT saves on its own if the vocabulary was resized."""
WRAPPERS = frozenset(("base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module"))
"""Prefixes that PEFT, `torch.compile` and data parallelism put before a module's name, any number of them."""
FEATURES = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA of embeddings",
    "lora_B.bias": "a bias of lora_B",
    "modules_to_save": "a module that was trained whole",
}
"""Parts of tensor names that plain LoRA does not have, and their meaning."""
NO_LAYER, WRONG_SHAPE = ": the base has no linear layer called ", ": shape is "
"""Parts of the faults of tensors that belong to another base."""
DTYPES: dict[torch.dtype, ValueType] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (R, N) and B (D, R) of one module."""


@dataclass(frozen=True, slots=True)
class Imported:
    """An imported adapter in memory, not saved yet, and notes for the user."""

    adapter: Adapter
    """The adapter, on the shared default basis if its A equals that basis exactly, else on an explicit basis."""
    ignored: tuple[str, ...]
    """Names of tensors that were left out: embeddings that PEFT saved on its own."""
    pruning_error: float
    """|delta - pruned delta| / |delta| in the Frobenius norm over all modules; 0 without pruning."""
    rounding_error: float
    """|rounded B - B| / |B| in the same norm, for storage in another type than the file's; see `lori.sparse`."""


def import_peft(
    folder: Path,
    base: BaseIdentity,
    *,
    name: str,
    sparsity: float | None = None,
    values: ValueType | None = None,
    templates: Sequence[Template] | None = None,
) -> Imported:
    """Read the PEFT LoRA adapter in `folder`, trained on `base`, as an adapter called `name`.

    Without `sparsity`, all nonzero entries of B stay, which is exact. With `sparsity`, the largest entries stay (see
    `_contributions`): at most a share 1 - `sparsity` of all entries, and no zeros. `values` is the storage type of B, by default
    its dtype in the file. `templates` are the prompt templates, by default those noted by our export, else `chat`. Raises
    `AdapterFormatError` with every fault of the folder, `AdapterError` for an invalid `name` or `sparsity`.
    """
    check_name(name)
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise AdapterError(f"sparsity is {sparsity}, expected 0 <= sparsity < 1")
    peft, pairs, ignored = _read_folder(folder, base)
    alphas = {module: peft.alpha_of(module) for module in pairs}
    scales = {module: alphas[module] / peft.rank_of(module) for module in pairs}
    masks = {module: b != 0 for module, (_, b) in pairs.items()}
    if sparsity is not None:
        largest = top_k_mask(_contributions(pairs, scales), sparsity)
        masks = {module: mask & largest[module] for module, mask in masks.items()}
    error = _pruning_error(pairs, scales, masks)
    modules = {module: SparseB.from_dense(b, masks[module]) for module, (_, b) in pairs.items()}
    basis = _basis({module: a for module, (a, _) in pairs.items()})
    pruning = {} if sparsity is None else {"sparsity": sparsity, "error": error}
    try:
        config = new_config(
            modules,
            basis,
            base,
            alphas=alphas,
            target_modules=target_names(modules, base.shapes),
            values=values or _value_type(b for _, b in pairs.values()),
            templates=_templates(folder) if templates is None else templates,
            training={"imported": _source(peft) | pruning},
        )
    except ValidationError as invalid:
        raise AdapterFormatError(str(folder), [e["msg"] for e in invalid.errors()]) from invalid
    rounding = rounding_error(modules.values(), config.lori.values)
    return Imported(seal(Adapter(name, config, modules, basis)).adapter, ignored, error, rounding)


def module_of(path: str, modules: Collection[str]) -> str | None:
    """Return the module among `modules` (full names in the base) that `path` names, or None.

    This is the longest name that `path` ends with; only wrappers may come before it.
    """
    parts = path.split(".")
    for i, part in enumerate(parts):
        if (name := ".".join(parts[i:])) in modules:
            return name
        if part not in WRAPPERS:
            return None
    return None


def _read_folder(folder: Path, base: BaseIdentity) -> tuple[PeftConfig, dict[str, Pair], tuple[str, ...]]:
    """Return the config, A and B by module in the base's order, and the names of the tensors that were ignored."""
    faults: list[str] = []
    config = read_peft_config(folder, faults)
    if any(fault.endswith(NO_LORA) for fault in faults):  # checks of LoRA tensors make no sense for another type
        raise AdapterFormatError(str(folder), faults)
    tensors, ignored = _read_tensors(folder, base, faults)
    pairs: dict[str, Pair] = {}
    for module in base.shapes:
        if module not in tensors:
            continue
        if missing := [part for part in "AB" if part not in tensors[module]]:
            faults.append(f"{module}: it has no lora_{missing[0]}")
            continue
        a, b = tensors[module]["A"], tensors[module]["B"]
        rank = config.rank_of(module) if config else a.shape[0] if a.dim() else 0
        num_outputs, num_inputs = base.shapes[module]
        faults += _tensor_faults(f"{module}.lora_A", a, (rank, num_inputs))
        faults += _tensor_faults(f"{module}.lora_B", b, (num_outputs, rank))
        pairs[module] = (a, b)
    if config and any(misfit in fault for fault in faults for misfit in (NO_LAYER, WRONG_SHAPE)):
        faults = _base_faults(config, base) or faults
    if faults or config is None:
        raise AdapterFormatError(str(folder), faults)
    return config, pairs, ignored


def read_peft_config(folder: Path, faults: list[str]) -> PeftConfig | None:
    """Return the config of the PEFT adapter in `folder`, or None. Adds every fault to `faults`, as `parse_peft_config`."""
    content = read_file(folder, CONFIG_FILE, faults, read_source)
    return None if content is None else parse_peft_config(content, faults)


def _base_faults(config: PeftConfig, base: BaseIdentity) -> list[str]:
    """Return the fault of an adapter whose config names another base than `base`. Empty if it names `base`, or no base."""
    name = config.base_model_name_or_path
    if not name or name.rstrip("/").rpartition("/")[2].lower() == base.name.rpartition("/")[2].lower():
        return []
    flag = f"--model {name}" if HUB_ID.fullmatch(name) else f"--model with the folder of {name}"
    return [f"it was trained on the base {name}, and does not fit {base.name}: pass {flag}"]


def _read_tensors(
    folder: Path, base: BaseIdentity, faults: list[str]
) -> tuple[dict[str, dict[str, torch.Tensor]], tuple[str, ...]]:
    """Return {module: {"A": …, "B": …}} for the tensors in the file, and the names of the tensors that were ignored."""
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    ignored: list[str] = []
    features: dict[str, list[str]] = defaultdict(list)
    if not (folder / WEIGHTS_FILE).is_file():
        faults.append(_no_weights(folder))
        return tensors, ()
    try:
        weights = source_file(folder, WEIGHTS_FILE)
    except OSError as error:
        faults.append(f"{WEIGHTS_FILE} cannot be read: {error.strerror}")
        return tensors, ()
    try:
        # The file is mapped and not read as a whole, since saved embeddings can be most of it.
        with safe_open(weights, framework="pt") as file:
            keys = sorted(file.keys())
            for key in keys:
                match = TENSOR.fullmatch(key)
                module = module_of(match["path"], base.shapes) if match else None
                if match and module and match["part"] not in tensors[module]:
                    tensors[module][match["part"]] = file.get_tensor(key).clone()  # a copy, since the file is only mapped
                elif EMBEDDING.fullmatch(key):
                    ignored.append(key)
                elif feature := next((part for part in FEATURES if part in key), None):
                    features[feature].append(key)
                else:
                    faults.append(_tensor_name_fault(key, module, match))
    except (OSError, *UNREADABLE) as error:
        faults.append(unreadable_fault(WEIGHTS_FILE, first_bytes(weights), error))
        return tensors, ()
    for feature, names in features.items():
        num_more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        faults.append(f"{names[0]}{num_more}: {FEATURES[feature]}, and only plain LoRA can be imported")
    if not any(TENSOR.fullmatch(key) for key in keys):
        faults.append(f"{WEIGHTS_FILE}: it has no lora_A and no lora_B")
    return tensors, tuple(ignored)


def _no_weights(folder: Path) -> str:
    if (folder / WEIGHTS_FILE).exists():
        return f"{WEIGHTS_FILE} is not a regular file"
    if (folder / PICKLE_FILE).exists():
        return ONLY_PICKLE
    return f"there is no {WEIGHTS_FILE}"


def _tensor_name_fault(key: str, module: str | None, match: re.Match[str] | None) -> str:
    if module and match:
        return f"{key}: a second lora_{match['part']} of {module}"
    if match:
        return f"{key}{NO_LAYER}{match['path']!r}"
    return f"{key}: unknown tensor"


def _tensor_faults(name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> Iterable[str]:
    if tensor.dtype not in DTYPES:
        yield f"{name}: {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}"
    elif num_bad := tensor.numel() - int(tensor.isfinite().sum()):
        yield f"{name}: {num_bad} values are not finite"
    if tuple(tensor.shape) != shape:
        yield f"{name}{WRONG_SHAPE}{tuple(tensor.shape)}, expected {shape}"


def _value_type(tensors: Iterable[torch.Tensor]) -> ValueType:
    """Return the common dtype of `tensors`; fp32, which can hold all values, if their dtypes differ."""
    dtypes = {b.dtype for b in tensors}
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else "float32"


def _source(config: PeftConfig) -> dict[str, Any]:
    source = {"format": "peft", "from": config.base_model_name_or_path, "peft_version": config.peft_version}
    return {key: value for key, value in source.items() if value}


class TemplatesFile(BaseModel):
    """Content of the file that our export adds to PEFT's files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    templates: tuple[Template, ...] = Field(min_length=1)


def _templates(folder: Path) -> Sequence[Template]:
    if not (folder / TEMPLATES_FILE).exists():
        return ("chat",)
    faults: list[str] = []
    content = read_file(folder, TEMPLATES_FILE, faults, read_source)
    try:
        if content is not None:
            return TemplatesFile.model_validate_json(content).templates
    except ValidationError as error:
        faults += [f"{TEMPLATES_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
    raise AdapterFormatError(str(folder), faults)


def _basis(tensors: Mapping[str, torch.Tensor]) -> Basis:
    """Return the shared default basis if `tensors` equal its A exactly, as in our exports, else an explicit basis."""
    default = Seeded()
    is_default = all(a.dtype == torch.float32 and torch.equal(a, default.draw(module, *a.shape)) for module, a in tensors.items())
    return default if is_default else Explicit.from_tensors(tensors)


def _contributions(pairs: Mapping[str, Pair], scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return the Frobenius norm of each entry's part of the delta, (D, R) by module: scale |B[d, j]| |A[j]|.

    The paper ranks by |B|, since its scale is the same everywhere and its rows of A have about the same norm. Neither must hold
    for an import. If the rows of A are orthogonal, as random rows nearly are, the largest contributions give the best
    approximation of the delta with this number of entries.
    """
    return {module: scales[module] * b.float().abs() * a.float().norm(dim=1) for module, (a, b) in pairs.items()}


def _pruning_error(pairs: Mapping[str, Pair], scales: Mapping[str, float], masks: Mapping[str, torch.Tensor]) -> float:
    """Return |delta - masked delta| / |delta| in the Frobenius norm over all modules together."""
    lost = total = 0.0
    for module, (a, b) in pairs.items():
        total += scales[module] ** 2 * _squared_norm(a, b)
        lost += scales[module] ** 2 * _squared_norm(a, b.masked_fill(masks[module], 0.0))
    return math.sqrt(lost / total) if total else 0.0


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |B A|² = sum((BᵀB) ∘ (A Aᵀ)), in fp64, without the (D, N) product."""
    a, b = a.double(), b.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def is_peft(files: Files) -> bool:
    """Return whether the config in `files` is PEFT's for LoRA."""
    try:
        document = from_json(files.get(CONFIG_FILE, b""))
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("peft_type") == "LORA"


def parse_incoming(name: str, files: Files, basis_of: BasisOf, base: BaseIdentity) -> Sealed:
    """Return the adapter in `files`, called `name`, and the files to store. The files of a LoRI adapter stay as they are.

    A PEFT adapter is converted to a LoRI adapter, exactly. Raises `AdapterFormatError` with every fault, `AdapterError` as
    `import_peft`.
    """
    if not is_peft(files):
        return Sealed(parse_adapter(name, files, basis_of, base), files)
    with TemporaryDirectory() as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        try:
            return seal(import_peft(Path(folder), base, name=name).adapter)
        except AdapterFormatError as error:
            raise AdapterFormatError(name, error.faults) from error
