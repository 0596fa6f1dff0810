"""`adapter_model.safetensors`: the sparse B of every module as tensors, and back.

Per module: `<module>.mask`, uint8, see `lori.rice`; `<module>.values`, (K,); with int8 values also `<module>.scales`, (D,) bf16.
safetensors only, never a pickle. Shapes: D outputs, R rank, N inputs, K kept entries.
"""

from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import save as save_tensors

from lori import rice
from lori.config import AdapterConfig
from lori.sparse import SparseB
from lori.values import ValueType, dequantize, is_canonical, quantize, stored_dtype


def weight_bytes(modules: Mapping[str, SparseB], value_type: ValueType) -> bytes:
    """Returns the content of adapter_model.safetensors: the same modules give the same bytes."""
    tensors = {}
    for name, b in modules.items():
        tensors[f"{name}.mask"] = torch.from_numpy(rice.encode(b.indices.numpy(), b.num_entries))
        if value_type == "int8":
            tensors[f"{name}.values"], tensors[f"{name}.scales"] = quantize(b)
        else:
            tensors[f"{name}.values"] = b.values.to(stored_dtype(value_type)).contiguous()
    return save_tensors(tensors)


def parts(value_type: ValueType) -> tuple[str, ...]:
    """Returns what follows a module's name in the names of its tensors."""
    return ("mask", "values", "scales") if value_type == "int8" else ("mask", "values")


def read_modules(
    tensors: Mapping[str, torch.Tensor], config: AdapterConfig, expected: Iterable[str], faults: list[str]
) -> dict[str, SparseB]:
    """Returns the B of every module of `expected` that is sound, in that order; whatever is wrong is added to `faults`."""
    expected = list(expected)
    names = {f"{module}.{part}" for module in expected for part in parts(config.lori.values)}
    faults += [f"{name}: missing" for name in sorted(names - tensors.keys())]
    faults += [f"{name}: unknown tensor" for name in sorted(tensors.keys() - names)]
    modules: dict[str, SparseB] = {}
    for module in expected:
        wanted = [f"{module}.{part}" for part in parts(config.lori.values)]
        if (shape := config.shape_of(module)) is None:
            faults.append(f"{module}: lori.shapes has nothing for it")
        elif all(name in tensors for name in wanted):
            mask, values, *scales = (tensors[name] for name in wanted)
            b = _read_module(module, (shape[0], config.rank_of(module)), mask, values, scales, config.lori.values, faults)
            modules |= {module: b} if b else {}
    return modules


def _read_module(
    module: str,
    shape: tuple[int, int],
    mask: torch.Tensor,
    values: torch.Tensor,
    scales: list[torch.Tensor],
    value_type: ValueType,
    faults: list[str],
) -> SparseB | None:
    wanted = {"mask": torch.uint8, "values": stored_dtype(value_type), "scales": torch.bfloat16}
    before = len(faults)
    for part, tensor in zip(wanted, (mask, values, *scales), strict=False):
        if tensor.dtype != wanted[part] or tensor.dim() != 1:
            faults.append(f"{module}.{part}: {tensor.dtype} of {tensor.dim()} dimensions, expected {wanted[part]} of 1")
        elif part == "scales" and len(tensor) != shape[0]:
            faults.append(f"{module}.scales: {len(tensor)} of them, expected {shape[0]}")
    if len(faults) > before:
        return None
    try:
        indices = torch.from_numpy(rice.decode(mask.numpy(), shape[0] * shape[1], values.numel()))
    except ValueError as error:
        faults.append(f"{module}: {error}")
        return None
    b = SparseB(shape, indices, values)
    if scales and not is_canonical(values, scales[0], b.rows):
        faults.append(f"{module}.scales: not those of its values, whose largest in a row is 127, or 0 where the scale is")
        return None
    if scales:
        b = SparseB(shape, indices, dequantize(values, scales[0], b.rows))
    if num_bad := values.numel() - int(b.values.isfinite().sum()):
        faults.append(f"{module}.values: {num_bad} values are not finite")
        return None
    return b
