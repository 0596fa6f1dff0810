"""Sizes of a base model, its keys and values, and its adapters, in bytes: from the model's config, without reading weights.

An adapter's size depends on the positions of its mask's entries. So a B is drawn for each size of module, packed as the server
packs it and written as training writes it, and the result is measured. Shapes: D outputs, N inputs, R rank.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError  # type: ignore[attr-defined]  # httpx's, some of which pass through
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lori.base_identity import module_shapes
from lori.embedded import embedded_model
from lori.errors import ModelError
from lori.identity import projection_of
from lori.kernels.layout import Layout, pack
from lori.names import EMBEDDED_NAME, short_name
from lori.projection import Quantization
from lori.sparse import SparseB
from lori.weights import weight_bytes
from server.engine.model.families import check_family
from server.engine.model.runner import bytes_per_token

GIB = 2**30
ROW_SPREAD = 0.4
"""Spread of the row sizes of a drawn B (sigma of a lognormal): it takes a few percent more than those of the demo adapters."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A base model: its sizes in a server, in bytes, without adapters."""

    name: str
    weights: int
    kv_token: int
    """Bytes of the keys and values of a token."""
    max_context: int
    num_ids: int
    """Size of the vocabulary."""
    shapes: Mapping[str, tuple[int, int]]
    """(D, N) of each linear layer that an adapter may change, by full name."""


@dataclass(frozen=True, slots=True)
class AdapterSizes:
    """One adapter of a model, in bytes."""

    num_kept: int
    """Nonzero entries of its B, not bytes."""
    resident: int
    """Bytes in the kernels' memory, or loaded."""
    on_disk: int
    """Bytes of its weights file, with values in bf16."""
    dense: int
    """Bytes of a LoRA of the same rank with A and B in bf16, on disk or in memory."""


def model_sizes(name: str | None, dtype: torch.dtype, quantization: Quantization | None = None) -> ModelSizes:
    """Return the sizes of the base called `name` (a local folder or a hub id; `None` is the embedded model).

    Raises `ModelError` if there is no such model, or the server does not support it.
    """
    model = _empty_model(name, dtype)
    check_family(model)
    config = model.config.get_text_config()
    shapes = module_shapes(model)
    return ModelSizes(
        name=EMBEDDED_NAME if name is None else short_name(name),
        weights=_weight_bytes(model, shapes if quantization else ()),
        kv_token=bytes_per_token(model),
        max_context=int(config.max_position_embeddings),
        num_ids=int(config.vocab_size),
        shapes=shapes,
    )


def basis_bytes(shapes: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype, num_bases: int = 1) -> int:
    """Return the bytes of the rows of A below the weights of all `shapes`, whether adapters change them or not."""
    return num_bases * rank * sum(n for _, n in shapes.values()) * dtype.itemsize


def adapter_sizes(
    shapes: Mapping[str, tuple[int, int]], rank: int, sparsity: float, dtype: torch.dtype, targets: Collection[str] = ()
) -> AdapterSizes:
    """Return the sizes of an adapter that changes the modules of `shapes` whose names end with one of `targets`, or all without
    targets.

    Raises `ModelError` if a target is none of the model's modules.
    """
    names = {projection_of(name) for name in shapes}
    if unknown := sorted(set(targets) - names):
        raise ModelError(f"--targets: the model has no {', '.join(unknown)}: known are {', '.join(sorted(names))}")
    changed = {name: shape for name, shape in shapes.items() if not targets or projection_of(name) in targets}
    drawn = {d: _drawn_b(d, rank, sparsity) for d in sorted({d for d, _ in changed.values()})}
    packed = {d: pack(Layout(d, rank, dtype), b) for d, b in drawn.items()}
    return AdapterSizes(
        num_kept=sum(len(drawn[d].values) for d, _ in changed.values()),
        resident=sum(packed[d].blocks.nbytes + packed[d].starts.nbytes for d, _ in changed.values()),
        on_disk=sum(len(weight_bytes({name: drawn[d]}, "bfloat16")) for name, (d, _) in changed.items()),
        dense=sum(rank * (d + n) * torch.bfloat16.itemsize for d, n in changed.values()),
    )


def _empty_model(name: str | None, dtype: torch.dtype) -> PreTrainedModel:
    folder = str(embedded_model()) if name is None else name
    if (folder.startswith((".", "/")) or Path(folder).exists()) and not (Path(folder) / "config.json").is_file():
        raise ModelError(f"cannot read the base model {folder!r}: there is no {Path(folder) / 'config.json'}")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    except (OSError, ValueError, ArithmeticError, ImportError, HTTPError, StrictDataclassError) as error:
        raise ModelError(f"cannot read the config of {folder!r}: {' '.join(str(error).split())}") from error
    return model


def _weight_bytes(model: PreTrainedModel, quantized: Collection[str]) -> int:
    """Return the bytes of the weights in the server.

    Vectors are in fp32, tied embeddings are stored twice, and layers in `quantized` are int8 with a scale in fp32 for each
    output.
    """
    head = model.get_output_embeddings().weight
    parameters = dict(model.named_parameters())
    is_tied = not any(parameter is head for name, parameter in parameters.items() if "embed" not in name)
    total = head.numel() * head.dtype.itemsize if is_tied else 0
    for name, parameter in parameters.items():
        if name.removesuffix(".weight") in quantized:
            total += parameter.numel() + 4 * len(parameter)
        else:
            total += parameter.numel() * (4 if parameter.dim() == 1 else parameter.dtype.itemsize)
    return total


def _drawn_b(num_outputs: int, rank: int, sparsity: float) -> SparseB:
    g = torch.Generator().manual_seed(num_outputs)
    b = (ROW_SPREAD * torch.randn(num_outputs, 1, generator=g)).exp() * torch.randn(num_outputs, rank, generator=g)
    nnz = max(1, round((1 - sparsity) * b.numel()))
    mask = torch.zeros(b.numel(), dtype=torch.bool)
    mask[b.flatten().abs().topk(nnz).indices] = True
    return SparseB.from_dense(b.bfloat16(), mask.view_as(b))


def gib(num_bytes: float) -> float:
    """Return bytes in GiB, rounded up to hundredths, as in a flag."""
    return math.ceil(num_bytes / GIB * 100) / 100
