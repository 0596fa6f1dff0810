"""The import of adapters from outside: a PEFT LoRA, as the paper's authors publish, or one of ours as the bytes of its files.

A PEFT LoRA becomes an explicit basis, and a B of its nonzero entries. An adapter is checked whole before any of it is kept.
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
"""`<path>.lora_A.weight`, or with the name that the adapter had in PEFT, `<path>.lora_A.default.weight`."""
EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)(\.base_layer)?\.(weight|bias)")
"""What PEFT saves by itself where the vocabulary was resized."""
WRAPPERS = frozenset(("base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module"))
"""What PEFT, `torch.compile` and data parallelism put before a module's name, in any number."""
FEATURES = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA of embeddings",
    "lora_B.bias": "a bias of lora_B",
    "modules_to_save": "a module that was trained whole",
}
"""Parts of the names of tensors that plain LoRA has not."""
NO_LAYER, WRONG_SHAPE = ": the base has no linear layer called ", ": shape is "
"""In faults of tensors that are not for this base."""
DTYPES: dict[torch.dtype, ValueType] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (R, N) and B (D, R) of one module."""


@dataclass(frozen=True, slots=True)
class Imported:
    """An adapter in memory, not saved yet, and what its reader should be told."""

    adapter: Adapter
    """On the shared default basis where its A is exactly that, else on an explicit one."""
    ignored: tuple[str, ...]
    """Tensors of the file that were left out: embeddings that PEFT saved by itself."""
    pruning_error: float
    """|delta - pruned delta| / |delta| in the Frobenius norm over all modules; 0 where nothing was pruned."""
    rounding_error: float
    """|rounded B - B| / |B| likewise, where the values are stored in another type than they had; see `lori.sparse`."""


def import_peft(
    folder: Path,
    base: BaseIdentity,
    *,
    name: str,
    sparsity: float | None = None,
    values: ValueType | None = None,
    templates: Sequence[Template] | None = None,
) -> Imported:
    """Read the PEFT LoRA adapter in `folder`, made for `base`, and calls it `name`.

    Every nonzero entry of B is kept, which is exact; with `sparsity` at most 1 - `sparsity` of all entries, the largest ones (see
    `_sizes`), and never a zero. `values` is how B will be stored, None for its dtype in the file. `templates` are how its prompts
    are written, None for what an export of ours says, else `chat`. Raises `AdapterFormatError` with every fault of the folder,
    `AdapterError` for a `name` or a `sparsity` that cannot be.
    """
    check_name(name)
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise AdapterError(f"sparsity is {sparsity}, expected 0 <= sparsity < 1")
    peft, pairs, ignored = _read(folder, base)
    alphas = {module: peft.alpha_of(module) for module in pairs}
    scales = {module: alphas[module] / peft.rank_of(module) for module in pairs}
    masks = {module: b != 0 for module, (_, b) in pairs.items()}
    if sparsity is not None:
        largest = top_k_mask(_sizes(pairs, scales), sparsity)
        masks = {module: mask & largest[module] for module, mask in masks.items()}
    error = _error(pairs, scales, masks)
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
    """Return which of `modules`, full names in the base, `path` means: the longest that it ends with, after wrappers only."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if (name := ".".join(parts[i:])) in modules:
            return name
        if part not in WRAPPERS:
            return None
    return None


def _read(folder: Path, base: BaseIdentity) -> tuple[PeftConfig, dict[str, Pair], tuple[str, ...]]:
    """Return config, A and B by module in the base's order, and the names of the tensors that were ignored."""
    faults: list[str] = []
    config = read_peft_config(folder, faults)
    if any(fault.endswith(NO_LORA) for fault in faults):  # whatever else it has is not to be that of a LoRA
        raise AdapterFormatError(str(folder), faults)
    tensors, ignored = _read_tensors(folder, base, faults)
    pairs: dict[str, Pair] = {}
    for module in base.shapes:
        if module not in tensors:
            continue
        if absent := [part for part in "AB" if part not in tensors[module]]:
            faults.append(f"{module}: it has no lora_{absent[0]}")
            continue
        a, b = tensors[module]["A"], tensors[module]["B"]
        rank = config.rank_of(module) if config else a.shape[0] if a.dim() else 0
        num_outputs, num_inputs = base.shapes[module]
        faults += _tensor_faults(f"{module}.lora_A", a, (rank, num_inputs))
        faults += _tensor_faults(f"{module}.lora_B", b, (num_outputs, rank))
        pairs[module] = (a, b)
    if config and any(misfit in fault for fault in faults for misfit in (NO_LAYER, WRONG_SHAPE)):
        faults = _other_base(config, base) or faults
    if faults or config is None:
        raise AdapterFormatError(str(folder), faults)
    return config, pairs, ignored


def read_peft_config(folder: Path, faults: list[str]) -> PeftConfig | None:
    """Return the config of the PEFT adapter in `folder`. Adds to `faults` as `parse_peft_config`."""
    content = read_file(folder, CONFIG_FILE, faults, read_source)
    return None if content is None else parse_peft_config(content, faults)


def _other_base(config: PeftConfig, base: BaseIdentity) -> list[str]:
    """Return the one fault of an adapter whose config names another base than `base`; none where it names this one, or none."""
    name = config.base_model_name_or_path
    if not name or name.rstrip("/").rpartition("/")[2].lower() == base.name.rpartition("/")[2].lower():
        return []
    flag = f"--model {name}" if HUB_ID.fullmatch(name) else f"--model with the folder of {name}"
    return [f"it was trained on the base {name}, and does not fit {base.name}: pass {flag}"]


def _read_tensors(
    folder: Path, base: BaseIdentity, faults: list[str]
) -> tuple[dict[str, dict[str, torch.Tensor]], tuple[str, ...]]:
    """Return {module: {"A": …, "B": …}}, as far as they are there, and the names of the tensors that were ignored."""
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
        # Opened, not read: saved embeddings can be most of the file.
        with safe_open(weights, framework="pt") as file:
            keys = sorted(file.keys())
            for key in keys:
                found = TENSOR.fullmatch(key)
                module = module_of(found["path"], base.shapes) if found else None
                if found and module and found["part"] not in tensors[module]:
                    tensors[module][found["part"]] = file.get_tensor(key).clone()  # the file is only mapped
                elif EMBEDDING.fullmatch(key):
                    ignored.append(key)
                elif feature := next((part for part in FEATURES if part in key), None):
                    features[feature].append(key)
                else:
                    faults.append(_unknown(key, module, found))
    except (OSError, *UNREADABLE) as error:
        faults.append(unreadable_fault(WEIGHTS_FILE, first_bytes(weights), error))
        return tensors, ()
    for feature, found_in in features.items():
        more = f" and {len(found_in) - 1} more" if len(found_in) > 1 else ""
        faults.append(f"{found_in[0]}{more}: {FEATURES[feature]}, and only plain LoRA can be imported")
    if not any(TENSOR.fullmatch(key) for key in keys):
        faults.append(f"{WEIGHTS_FILE}: it has no lora_A and no lora_B")
    return tensors, tuple(ignored)


def _no_weights(folder: Path) -> str:
    if (folder / WEIGHTS_FILE).exists():
        return f"{WEIGHTS_FILE} is not a regular file"
    if (folder / PICKLE_FILE).exists():
        return ONLY_PICKLE
    return f"there is no {WEIGHTS_FILE}"


def _unknown(key: str, module: str | None, found: re.Match[str] | None) -> str:
    if module and found:
        return f"{key}: a second lora_{found['part']} of {module}"
    if found:
        return f"{key}{NO_LAYER}{found['path']!r}"
    return f"{key}: unknown tensor"


def _tensor_faults(name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> Iterable[str]:
    if tensor.dtype not in DTYPES:
        yield f"{name}: {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}"
    elif num_bad := tensor.numel() - int(tensor.isfinite().sum()):
        yield f"{name}: {num_bad} values are not finite"
    if tuple(tensor.shape) != shape:
        yield f"{name}{WRONG_SHAPE}{tuple(tensor.shape)}, expected {shape}"


def _value_type(tensors: Iterable[torch.Tensor]) -> ValueType:
    """Return the dtype of `tensors`, or fp32, which holds them all, where they differ."""
    dtypes = {b.dtype for b in tensors}
    return DTYPES[dtypes.pop()] if len(dtypes) == 1 else "float32"


def _source(config: PeftConfig) -> dict[str, Any]:
    source = {"format": "peft", "from": config.base_model_name_or_path, "peft_version": config.peft_version}
    return {key: value for key, value in source.items() if value}


class Exported(BaseModel):
    """What an export of ours says beside PEFT's files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    templates: tuple[Template, ...] = Field(min_length=1)


def _templates(folder: Path) -> Sequence[Template]:
    if not (folder / TEMPLATES_FILE).exists():
        return ("chat",)
    faults: list[str] = []
    content = read_file(folder, TEMPLATES_FILE, faults, read_source)
    try:
        if content is not None:
            return Exported.model_validate_json(content).templates
    except ValidationError as error:
        faults += [f"{TEMPLATES_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
    raise AdapterFormatError(str(folder), faults)


def _basis(tensors: Mapping[str, torch.Tensor]) -> Basis:
    """Return the shared default basis where `tensors` are exactly its A, as in an export of ours, else an explicit one."""
    default = Seeded()
    is_default = all(a.dtype == torch.float32 and torch.equal(a, default.draw(module, *a.shape)) for module, a in tensors.items())
    return default if is_default else Explicit.of(tensors)


def _sizes(pairs: Mapping[str, Pair], scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return what each entry of B adds to the delta, (D, R) by module: scale |B[d, j]| |A[j]|, its Frobenius norm.

    The paper ranks |B| alone, over one scale and rows of A that are about as long as each other; here neither need be. Where the
    rows of A are orthogonal, as random ones nearly are, no other choice of as many entries is nearer to the delta.
    """
    return {module: scales[module] * b.float().abs() * a.float().norm(dim=1) for module, (a, b) in pairs.items()}


def _error(pairs: Mapping[str, Pair], scales: Mapping[str, float], masks: Mapping[str, torch.Tensor]) -> float:
    """Return |delta - masked delta| / |delta| in the Frobenius norm over all modules together."""
    lost = total = 0.0
    for module, (a, b) in pairs.items():
        total += scales[module] ** 2 * _squared_norm(a, b)
        lost += scales[module] ** 2 * _squared_norm(a, b.masked_fill(masks[module], 0.0))
    return math.sqrt(lost / total) if total else 0.0


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |B A|² = sum((BᵀB) ∘ (A Aᵀ)), in fp64 and without the (D, N) product."""
    a, b = a.double(), b.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def is_peft(files: Files) -> bool:
    """Return whether the config of `files` is one that PEFT writes for LoRA."""
    try:
        document = from_json(files.get(CONFIG_FILE, b""))
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("peft_type") == "LORA"


def parse_incoming(name: str, files: Files, basis_of: BasisOf, base: BaseIdentity) -> Sealed:
    """Return the adapter that `files` are, called `name`, and the files to keep: those of ours as they are.

    A PEFT adapter becomes one of ours, exactly. Raises `AdapterFormatError` with every fault, `AdapterError` as `import_peft`.
    """
    if not is_peft(files):
        return Sealed(parse_adapter(name, files, basis_of, base), files)
    with TemporaryDirectory() as place:
        for file, content in files.items():
            (Path(place) / file).write_bytes(content)
        try:
            return seal(import_peft(Path(place), base, name=name).adapter)
        except AdapterFormatError as error:
            raise AdapterFormatError(name, error.faults) from error
