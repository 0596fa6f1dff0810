"""A dense LoRA expand in Triton, as in batched LoRA servers: each token gathers the rows of its own adapter's B.

The reference of the kernel benchmark on a GPU. Shapes: T tokens, M terms a token, R rank, D outputs, S slots.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128
"""Number of outputs of one Triton program."""


def bgmv(y: torch.Tensor, s: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, weight: float) -> None:
    """Compute y[t] += weight * sum over m of B_slots[t, m] s[t]; y (T, D), s (T, R), pool (S, R, D) dense, slots (T, M) int32."""
    num_tokens, num_outputs = y.shape
    grid = (num_tokens, triton.cdiv(num_outputs, BLOCK))
    _bgmv[grid](y, s, pool, slots, weight, y.stride(0), s.stride(0), num_outputs, s.shape[1], slots.shape[1], BLOCK)


@triton.jit
def _bgmv(
    p_y: tl.tensor,
    p_s: tl.tensor,
    p_pool: tl.tensor,
    p_slots: tl.tensor,
    weight: tl.tensor,
    y_stride: tl.tensor,
    s_stride: tl.tensor,
    num_outputs: tl.constexpr,
    rank: tl.constexpr,
    num_terms: tl.constexpr,
    block: tl.constexpr,
) -> None:
    i_t = tl.program_id(0).to(tl.int64)
    o_r, o_d = tl.arange(0, rank), tl.program_id(1) * block + tl.arange(0, block)
    b_s = tl.load(p_s + i_t * s_stride + o_r).to(tl.float32)
    b_total = tl.zeros((block,), tl.float32)
    for i_m in range(num_terms):
        slot = tl.load(p_slots + i_t * num_terms + i_m).to(tl.int64)
        p_b = p_pool + slot * rank * num_outputs + o_r[:, None] * num_outputs + o_d[None, :]
        b_b = tl.load(p_b, mask=(o_d < num_outputs)[None, :], other=0.0).to(tl.float32)
        b_total += tl.sum(b_b * b_s[:, None], axis=0)
    p_out = p_y + i_t * y_stride + o_d
    b_y = tl.load(p_out, mask=o_d < num_outputs).to(tl.float32) + weight * b_total
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=o_d < num_outputs)
