"""Triton's interpreter, mended where it does not do as a device does, and fewer cases for it, since it is slow."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

A, B, C = TypeVar("A"), TypeVar("B"), TypeVar("C")


def in_turn(first: Sequence[A], second: Sequence[B], third: Sequence[C]) -> list[tuple[A, B, C]]:
    """Returns every pair of the first two; those of `third` take turns, so that each meets each of both.

    For that the first two must be as many as the third, at least.
    """
    assert len(third) <= min(len(first), len(second))
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (3.9) cuts fp32 off to bf16 where a device rounds, and takes the bits of bf16 matrices for numbers."""
    cast, dot = InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_dot

    def rounded(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        bits: npt.NDArray[np.int16] = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view(np.uint16), tl.bfloat16)

    def widened(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *more: object) -> TensorHandle:
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *more)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)
