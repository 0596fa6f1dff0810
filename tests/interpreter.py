"""Corrections of Triton's interpreter where it differs from a device, and a speed-up."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

INTERPRETED = (
    pytest.mark.interpreter,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton does not interpret"),
)
"""Marks of a test that runs Triton's kernels in its interpreter."""


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the interpreter (3.9): it truncates fp32 to bf16 where a device rounds, and reads bf16 matrices as integers.

    The interpreter also patches the language again at each function call within a kernel, which took a third of the time.
    """
    cast, dot = InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot

    def rounded(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        bits: npt.NDArray[np.int16] = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view(np.uint16), tl.bfloat16)

    def widened(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *more: object) -> TensorHandle:
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *more)

    monkeypatch.setattr(interpreter, "_patch_lang", once_a_launch(interpreter._patch_lang))
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a `patch` that patches each module once a launch. The end of the launch restores the modules."""
    replaced: set[str] = set()

    def patch_once(fn: Any) -> Any:
        modules = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
        if modules and modules <= replaced:
            return SimpleNamespace(restore=lambda: None)
        is_launch, scope = not replaced, patch(fn)
        replaced.update(modules)

        def restore() -> None:
            replaced.clear()
            scope.restore()

        return SimpleNamespace(restore=restore) if is_launch else scope

    return patch_once
