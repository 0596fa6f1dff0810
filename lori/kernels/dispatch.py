"""Dispatch of `add_delta` to a kernel, and `lori::add_delta`, the custom torch operator for `torch.compile`."""

import importlib
from collections.abc import Callable
from functools import cache

import torch

from lori.kernels.cpu import add_delta as cpu_add_delta
from lori.kernels.layout import Layout
from lori.kernels.operands import Operands
from lori.kernels.reference import add_delta as reference_add_delta
from lori.kernels.route import Route
from lori.kernels.shapes import fits, mismatch
from lori.kernels.stacked import add_delta as stacked_add_delta
from lori.native import MODULE

Kernel = Callable[[torch.Tensor, torch.Tensor, Operands, Route], None]


@cache
def load_gpu() -> Kernel:
    """Return the Triton kernel. Imports triton on first use. Raises `RuntimeError` if triton is not installed."""
    try:
        kernel: Kernel = importlib.import_module("lori.kernels.gpu").add_delta
    except ImportError as error:
        raise RuntimeError(f"the GPU kernel needs triton ({error}): pip install '.[gpu]'") from error
    return kernel


KERNELS: dict[str, Callable[[], Kernel]] = {
    "reference": lambda: reference_add_delta,
    "stacked": lambda: stacked_add_delta,
    "cpu": lambda: cpu_add_delta,
    "gpu": load_gpu,
}


def default_kernel(device: torch.device) -> str:
    """Return the name of the kernel for a device: on a CPU the fastest that is installed."""
    if device.type == "cuda":
        return "gpu"
    return "cpu" if MODULE else "stacked"


def add_delta(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route, kernel: str | None = None) -> None:
    """Add the step's deltas to y in place, see the package. `kernel` is a key of `KERNELS`, by default the one for y's device.

    Raises `ValueError` for an unknown kernel, `RuntimeError` if the kernel is not installed. `cpu` and `gpu` also raise
    `ValueError` if shapes or dtypes do not match the operands and the route.
    """
    if torch.compiler.is_compiling():
        if not fits(y, s, operands, route):
            raise mismatch(y, s, operands, route)
        arrays = (operands.pool, operands.starts, operands.basis_of)
        torch.ops.lori.add_delta(y, s, *arrays, operands.num_bases, route.segments, route.slots, route.weights, kernel)
    elif kernel is None and y.is_cpu and MODULE:  # a shortcut: the look-up below takes longer
        cpu_add_delta(y, s, operands, route)
    else:
        _kernel(default_kernel(y.device) if kernel is None else kernel)(y, s, operands, route)


def _kernel(name: str) -> Kernel:
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name!r}, expected one of {sorted(KERNELS)}")
    return KERNELS[name]()


@torch.library.custom_op("lori::add_delta", mutates_args=("y",))
def _op(
    y: torch.Tensor,
    s: torch.Tensor,
    pool: torch.Tensor,
    starts: torch.Tensor,
    basis_of: torch.Tensor,
    num_bases: int,
    segments: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    kernel: str | None,
) -> None:
    operands = Operands.from_arrays(Layout(y.shape[1], s.shape[2], y.dtype), pool, starts, basis_of, num_bases)
    _kernel(default_kernel(y.device) if kernel is None else kernel)(y, s, operands, Route(segments, slots, weights, len(y)))


_op.register_fake(lambda *_: None)
