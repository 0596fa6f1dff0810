"""`adapter_model.safetensors`: conversion between the sparse B of every module and the file's tensors.

Per module: `<module>.mask`, uint8, see `lori.rice`; `<module>.values`, (K,); with int8 values also `<module>.scales`, (D,) bf16.
safetensors only, never a pickle. Shapes: D outputs, R rank, N inputs, K nonzero entries.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from lori import rice
from lori.config import AdapterConfig
from lori.native import decode_mask
from lori.sparse import SparseB, ValueType, dequantize, is_canonical, quantize, stored_dtype


def weight_bytes(modules: Mapping[str, SparseB], value_type: ValueType) -> bytes:
    """Return the content of adapter_model.safetensors. Equal modules give equal bytes."""
    tensors = {}
    for name, b in modules.items():
        tensors[f"{name}.mask"] = torch.from_numpy(rice.encode(b.indices.numpy(), b.num_entries))
        if value_type == "int8":
            tensors[f"{name}.values"], tensors[f"{name}.scales"] = quantize(b)
        else:
            tensors[f"{name}.values"] = b.values.to(stored_dtype(value_type)).contiguous()
    return save_tensors(tensors)


def parts(value_type: ValueType) -> tuple[str, ...]:
    """Return the suffixes of the names of a module's tensors."""
    return ("mask", "values", "scales") if value_type == "int8" else ("mask", "values")


def read_modules(
    tensors: Mapping[str, torch.Tensor], config: AdapterConfig, expected: Iterable[str], faults: list[str]
) -> dict[str, SparseB]:
    """Return the B of every sound module in `expected`, in that order. Adds a fault for everything that is wrong."""
    expected = list(expected)
    names = {f"{module}.{part}" for module in expected for part in parts(config.lori.values)}
    faults += [f"{name}: missing" for name in sorted(names - tensors.keys())]
    faults += [f"{name}: unknown tensor" for name in sorted(tensors.keys() - names)]
    modules: dict[str, SparseB] = {}
    for module in expected:
        tensor_names = [f"{module}.{part}" for part in parts(config.lori.values)]
        if (shape := config.shape_of(module)) is None:
            faults.append(f"{module}: lori.shapes has nothing for it")
        elif all(name in tensors for name in tensor_names):
            mask, values, *scales = (tensors[name] for name in tensor_names)
            b = _read_module(module, (shape[0], config.rank_of(module)), mask, values, scales, config.lori.values, faults)
            if b:
                modules[module] = b
    modules = _finite(modules, faults)
    return modules if config.lori.values != "int8" else _canonical(modules, tensors, faults)


def _finite(modules: dict[str, SparseB], faults: list[str]) -> dict[str, SparseB]:
    """Return the `modules` whose values are finite. Adds faults for the others.

    The sums of finite values are finite, except where they overflow. Only if a sum is not are the values checked one by one.
    """
    if not modules or torch.stack([b.values.sum(dtype=torch.float32) for b in modules.values()]).isfinite().all():
        return modules
    counts = {name: b.values.numel() - int(b.values.isfinite().sum()) for name, b in modules.items()}
    faults += [f"{name}.values: {num_bad} values are not finite" for name, num_bad in counts.items() if num_bad]
    return {name: b for name, b in modules.items() if not counts[name]}


def _canonical(modules: Mapping[str, SparseB], tensors: Mapping[str, torch.Tensor], faults: list[str]) -> dict[str, SparseB]:
    """Return the `modules` whose int8 values and scales are canonical (`lori.sparse.is_canonical`). Adds faults for the others.

    Checks all modules at once, since most files are sound. Only if that check fails, checks them one by one.
    """

    def are_canonical(names: Iterable[str]) -> bool:
        rows, end = [], 0
        for name in names:
            rows.append(modules[name].indices.numpy() // np.int64(modules[name].shape[1]) + end)
            end += modules[name].shape[0]
        values, scales = (torch.cat([tensors[f"{name}.{part}"] for name in names]) for part in ("values", "scales"))
        return is_canonical(values, scales, np.concatenate(rows))

    if not modules or are_canonical(modules):
        return dict(modules)
    faulty = [name for name in modules if not are_canonical([name])]
    faults += [
        f"{name}.scales: not those of its values, whose largest in a row is 127, or 0 where the scale is" for name in faulty
    ]
    return {name: b for name, b in modules.items() if name not in faulty}


def _read_module(
    module: str,
    shape: tuple[int, int],
    mask: torch.Tensor,
    values: torch.Tensor,
    scales: list[torch.Tensor],
    value_type: ValueType,
    faults: list[str],
) -> SparseB | None:
    dtypes = {"mask": torch.uint8, "values": stored_dtype(value_type), "scales": torch.bfloat16}
    num_faults = len(faults)
    for part, tensor in zip(dtypes, (mask, values, *scales), strict=False):
        if tensor.dtype != dtypes[part] or tensor.dim() != 1:
            faults.append(f"{module}.{part}: {tensor.dtype} of {tensor.dim()} dimensions, expected {dtypes[part]} of 1")
        elif part == "scales" and len(tensor) != shape[0]:
            faults.append(f"{module}.scales: {len(tensor)} of them, expected {shape[0]}")
    if len(faults) > num_faults:
        return None
    try:
        indices = decode_mask(mask.numpy(), shape[0] * shape[1], values.numel())
    except ValueError as error:
        faults.append(f"{module}: {error}")
        return None
    if scales:
        values = dequantize(values, scales[0], indices // np.int32(shape[1]))
    return SparseB(shape, torch.from_numpy(indices), values)
