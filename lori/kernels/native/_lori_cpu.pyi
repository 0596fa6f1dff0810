# `python -m tests.native_stub` writes this file.
"""
The CPU kernel of lori; see lori/kernels.

An int in place of an array is its address: the caller has checked the array's shape and keeps it alive. Its stride is in entries.
"""

from collections.abc import Sequence
from typing import Annotated, overload

import numpy
from numpy.typing import NDArray

VERSION: int = ...

COMPILER: str = ...

HAS_THREADS: bool = ...

def instruction_sets() -> list[str]:
    """What this processor runs, the fastest first."""

def pack(
    indices: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    num_outputs: int,
    rank: int,
    dtype: str,
    column_bytes: int,
) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None,))], Annotated[NDArray[numpy.int32], dict(shape=(None,))]]: ...
def decode_mask(
    code: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    num_entries: int,
    nnz: int,
) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))] | None:
    """The indices of a mask; None where the code is not one of such a mask."""

def pack_file(
    file: bytes,
    names: str,
    modules: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    value_type: str,
) -> (
    tuple[
        Annotated[NDArray[numpy.uint8], dict(shape=(None,))],
        Annotated[NDArray[numpy.int32], dict(shape=(None,))],
        Annotated[NDArray[numpy.int64], dict(shape=(None,))],
    ]
    | None
):
    """None where the file is not one that lori.weights writes, or not sound."""

def put_adapter(
    blocks: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
    starts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    rows: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    basis: int,
) -> None: ...

class Operands:
    def __init__(
        self,
        pool: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
        starts: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        basis_of: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        num_outputs: int,
        rank: int,
        dtype: str,
        instruction_set: str,
    ) -> None: ...
    def add_delta(
        self,
        route: Route,
        y: int,
        y_shape: tuple[int, ...],
        y_strides: tuple[int, ...],
        s: int,
        s_shape: tuple[int, ...],
        s_strides: tuple[int, ...],
        num_threads: int,
    ) -> bool:
        """Return false, having done nothing, where a shape or a stride is wrong."""

class Route:
    def __init__(
        self,
        segments: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        slots: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        weights: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        num_tokens: int,
    ) -> None: ...

class Gaussians:
    def __init__(
        self,
        means: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        axes: Annotated[NDArray[numpy.int8], dict(shape=(None, None, None), order="C", device="cpu", writable=False)],
        scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        variances: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        log_determinants: Annotated[NDArray[numpy.float64], dict(shape=(None,), order="C", device="cpu", writable=False)],
    ) -> None: ...

def log_likelihoods(
    gaussians: Sequence[Gaussians],
    indices: Sequence[int],
    z: Annotated[NDArray[numpy.float64], dict(shape=(None,), order="C", device="cpu", writable=False)],
) -> Annotated[NDArray[numpy.float64], dict(shape=(None,))]:
    """
    The log-likelihood of z under each component: the Gaussian of this index of these Gaussians.
    """

class Spans:
    def __init__(
        self,
        spans: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        table: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        num_heads: int,
        num_kv_heads: int,
    ) -> None: ...

class Heads:
    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        window: int,
        softcap: float,
        epsilon: float,
        query_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        key_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    ) -> None: ...

class Layers:
    def __init__(self, instruction_set: str, dtype: str) -> None: ...
    def norm(
        self,
        stream: int,
        stream_stride: int,
        added: int,
        added_stride: int,
        out: int,
        out_stride: int,
        num_rows: int,
        weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        epsilon: float,
        num_threads: int,
    ) -> None: ...
    def gate(
        self, x: int, x_stride: int, out: int, out_stride: int, num_rows: int, size: int, activation: int, num_threads: int
    ) -> None: ...
    def attend(
        self,
        heads: Heads,
        spans: Spans,
        qkv: int,
        qkv_stride: int,
        out: int,
        out_stride: int,
        cosine: int,
        sine: int,
        memory: int,
        num_blocks: int,
        num_threads: int,
    ) -> None: ...
    def block_bytes(self, heads: Heads) -> int: ...

def nearest(
    points: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    constants: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    groups: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    allowed: Annotated[NDArray[numpy.bool_], dict(shape=(None,), order="C", device="cpu", writable=False)],
    query: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    count: int,
    max_per_group: int,
) -> Annotated[NDArray[numpy.int64], dict(shape=(None,))]:
    """
    The indices, in any order, of the allowed points with the greatest scale * p^T x + constant, at most max_per_group of
    each group. None whose score is NaN.
    """

def part_size(num_outputs: int, num_inputs: int) -> int: ...
@overload
def pack_weights(
    weight: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    panels: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...
@overload
def pack_weights(
    weight: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    panels: Annotated[NDArray[numpy.int8], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...

class Projection:
    def __init__(
        self,
        panels: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order="C", device="cpu", writable=False)],
        sizes: Sequence[int],
        reduced: Sequence[int],
        num_inputs: int,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        narrow: Annotated[NDArray[numpy.int8], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        instruction_set: str,
    ) -> None: ...
    def multiply(self, x: int, x_stride: int, num_tokens: int, y: int, y_stride: int, num_threads: int) -> None: ...
    def project(
        self,
        x: int,
        x_stride: int,
        num_tokens: int,
        y: int,
        y_stride: int,
        s: int,
        s_stride: int,
        operands: Sequence[Operands],
        route: Route,
        num_threads: int,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        attention_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        qkv: Projection,
        heads: Heads,
        rope: int,
        output: Projection,
        attention_output_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
        mlp_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        gate_up: Projection,
        activation: int,
        down: Projection,
        mlp_output_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
        epsilon: float,
        memory: int,
    ) -> None: ...

class Stack:
    def __init__(self, functions: Layers, layers: Sequence[Layer], num_blocks: int) -> None: ...
    def forward(
        self,
        stream: int,
        added: int,
        spans: Spans,
        ropes: Sequence[tuple[int, int]],
        routes: Sequence[Route],
        operands: Sequence[Operands],
        num_threads: int,
        rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None = ...,
        last_route: Route | None = ...,
    ) -> None: ...
