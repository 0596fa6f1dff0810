"""The GPU's runner on a CPU: Triton's interpreter runs the kernels, and a tape stands in for CUDA graphs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

import lori.projection
from lori.kernels import Operands, Route, add_delta
from server.engine.model import runner, triton_ops
from server.engine.model.decoder import Decoder
from server.engine.model.triton_ops import GpuOps
from tests.interpreter import mend

WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2}
INDEXES = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
"""Operations that copy numbers from the device, which no graph can. Those of `INDEXES` do so only if an index is a mask."""


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """A recording of every operation and launch with its own tensors, as in a CUDA graph.

    When it is played, each reads the present contents of these tensors and writes to the same tensors as before. Python code
    does not run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func.overloadpacket in INDEXES and any(index.dtype is torch.bool for index in tensors(args[1]))
        does_wait = by_mask or func.overloadpacket in WAITS
        assert not does_wait, f"{func} waits for the device"
        out = func(*args, **kwargs)
        held = {storage(tensor) for tensor in tensors((args, kwargs))}
        if func._schema.is_mutable:
            self.steps.append(partial(func, *args, **kwargs))
        elif any(storage(tensor) not in held for tensor in tensors(out)):  # else it is a view
            self.steps.append(partial(self._again, partial(func, *args, **kwargs), tensors(out)))
        return out

    @staticmethod
    def _again(function: Callable[[], object], places: list[torch.Tensor]) -> None:
        for place, tensor in zip(places, tensors(function()), strict=True):
            place.copy_(tensor)

    def play(self) -> None:
        for step in self.steps:
            step()


@dataclass
class Recorder:
    """A stand-in for CUDA graphs."""

    num_starts: int = 0
    num_recorded: int = 0
    num_replayed: int = 0
    tape: Tape | None = field(default=None, repr=False)
    """The tape being recorded, if any."""

    def start(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        self.num_starts += 1
        return self.record

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        with Tape() as tape:
            self.tape = tape
            function()
        self.tape = None

        def replay() -> None:
            self.num_replayed += 1
            tape.play()

        return replay

    def launch(self, run: Callable[..., None], kernel: object, *args: Any, **options: Any) -> None:
        """Run a Triton kernel, and record it."""
        if self.tape is not None:
            self.tape.steps.append(partial(run, kernel, *args, **options))
        with _disable_current_modes():
            run(kernel, *args, **options)


def add_by_token(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
    """Add the deltas of a `Route.by_token` in torch, from its arrays alone, so that a tape can replay it."""
    with _disable_current_modes():
        b = operands.dense  # (S, R, D)
    token = torch.searchsorted(route.segments[:, 3].contiguous(), torch.arange(len(route.slots)), right=True)
    weights = torch.zeros(len(y) + 1, len(b)).index_put_((token, route.slots.long()), route.weights, accumulate=True)
    y += torch.einsum("ts,tsr,srd->td", weights[: len(y)], s[:, operands.basis_of.long()], b)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, kernel: str | None = None) -> Recorder:
    """Make runners that are built from now on behave as on a GPU, in fp32.

    Their attention is Triton's. If `kernel` is "gpu", so are the deltas of replayed steps, which is slow.
    """
    mend(monkeypatch)
    recorder, run = Recorder(), InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: recorder.launch(run, *args, **options))
    monkeypatch.setattr(triton_ops, "PROGRAMS", 8)  # each program takes the interpreter some milliseconds

    def add(y: torch.Tensor, s: torch.Tensor, operands: Operands, route: Route) -> None:
        if route.is_by_token and kernel is None:
            add_by_token(y, s, operands, route)
        else:
            add_delta(y, s, operands, route, kernel if route.is_by_token else None)

    def make_ops(decoder: Decoder, *sizes: Any) -> GpuOps:
        return GpuOps([layer.heads for layer in decoder.layers], *sizes)

    monkeypatch.setattr(lori.projection, "add_delta", add)
    monkeypatch.setattr(runner, "make_ops", make_ops)
    monkeypatch.setattr(runner.Runner, "_can_replay", True)  # without recording every size beforehand
    monkeypatch.setattr(runner, "CudaGraphs", lambda _: recorder.start())
    return recorder
