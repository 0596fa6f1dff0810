"""Attention of decoding tokens, in Triton: the splits of the keys, and compilation for GPUs.

`test_attention` compares it with loops in fp64, with heads of every size and number, windows and caps. Shapes: B sequences, H
heads, G key-value heads, E head size.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from server.engine.model import triton_ops
from server.engine.model.cuda_graphs import DecodeKeys
from server.engine.model.decoder import Heads
from tests.compiled import compiled_elsewhere, properties
from tests.interpreter import INTERPRETED, mend

ROOT = Path(__file__).parents[4]
HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=INTERPRETED),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
HEADS = Heads(num_heads=6, num_kv_heads=2, head_size=24, scale=0.2)
BLOCK = 16
LENGTHS = [1, 64, 65, 130, 300]


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    mend(monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return the device of the tensors."""
    return str(request.param)


def case(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DecodeKeys]:
    """Return queries (B, H, E), keys and values (P, G, E), and their places. Memory of no sequence is NaN."""
    g = torch.Generator().manual_seed(0)
    counts = [-(-length // BLOCK) for length in LENGTHS]
    table = torch.randperm(sum(counts) + 3, generator=g)[: sum(counts)].int()
    query = torch.randn(len(LENGTHS), HEADS.num_heads, HEADS.head_size, generator=g)
    keys, values = (torch.full(((len(table) + 3) * BLOCK, HEADS.num_kv_heads, HEADS.head_size), torch.nan) for _ in range(2))
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1].int()
    for start, length in zip(starts, LENGTHS, strict=True):
        places = (table[start:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:length]
        for memory in (keys, values):
            memory[places] = torch.randn(length, *memory.shape[1:], generator=g)
    decoding = DecodeKeys(torch.zeros(0), *(x.to(device) for x in (starts, torch.tensor(LENGTHS, dtype=torch.int32), table)))
    return query.to(device, dtype), keys.to(device, dtype), values.to(device, dtype), decoding


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decoding: DecodeKeys, heads: Heads) -> torch.Tensor:
    """Return the attention of each row, in fp64, (B, H, E)."""
    out = []
    for row, start, length in zip(query, decoding.starts, decoding.lengths, strict=True):
        places = (decoding.table[start:, None].long() * BLOCK + torch.arange(BLOCK, device=keys.device)).flatten()[:length]
        seen = places[-heads.window :] if heads.window else places
        k, v = (memory[seen].double().repeat_interleave(heads.num_heads // heads.num_kv_heads, 1) for memory in (keys, values))
        scores = torch.einsum("he,lhe->hl", row.double(), k) * heads.scale
        scores = heads.softcap * torch.tanh(scores / heads.softcap) if heads.softcap else scores
        out.append(torch.einsum("hl,lhe->he", scores.softmax(-1), v))
    return torch.stack(out)


@pytest.mark.parametrize("num_programs", [10, 20, 80, 10_000])
@pytest.mark.parametrize("changes", [{}, {"window": 1}, {"window": 100}, {"softcap": 2.0}])
def test_the_attention_is_the_same_for_any_number_of_splits(
    num_programs: int, changes: dict[str, float], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1, 2, 8 and 16 splits, most of which have no key of a short sequence."""
    monkeypatch.setattr(triton_ops, "PROGRAMS", num_programs)
    assert triton_ops.num_splits_for(len(LENGTHS) * HEADS.num_kv_heads) == {10: 1, 20: 2, 80: 8, 10_000: 16}[num_programs]
    heads = replace(HEADS, **changes)
    arrays = case(device)
    out = triton_ops.attend(*arrays, heads, BLOCK)
    torch.testing.assert_close(out.double(), exact(*arrays, heads), rtol=1e-5, atol=1e-5)


def test_the_output_in_bf16_is_rounded_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "PROGRAMS", 40)
    arrays = case(device, torch.bfloat16)
    out = triton_ops.attend(*arrays, HEADS, BLOCK)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), exact(*arrays, HEADS), rtol=2**-8, atol=2**-7)


def test_splits_fill_a_device_but_are_limited_in_number() -> None:
    splits = [triton_ops.num_splits_for(count) for count in (1, 8, 24, 64, 128, 129, 256, 4096)]
    assert splits == [16, 16, 16, 4, 2, 1, 1, 1]


def compile_ahead() -> dict[str, object]:
    """Compile both kernels for the shapes of real models, and return the properties of their code. Needs compiling triton.

    Covers two devices: every model and dtype on both, and every number of splits.
    """
    codes: dict[str, object] = {}
    models = {"SmolLM2-135M": (3, 3, 64, 0.0, 0), "Llama-3-8B": (8, 4, 128, 0.0, 0), "Gemma-2-9B": (8, 2, 256, 50.0, 4096)}
    cases = [*product(models, [torch.bfloat16]), ("SmolLM2-135M", torch.float32)]
    for place, ((model, dtype), num_splits) in enumerate(product(cases, (1, 16))):
        num_kv_heads, group, size, softcap, window = models[model]
        capability = (80, 90, 90, 80)[place % 4]
        value = "*bf16" if dtype is torch.bfloat16 else "*fp32"
        sizes: dict[str, float] = {
            "scale": size**-0.5, "softcap": softcap, "num_kv_heads": num_kv_heads, "group": group, "size": size, "window": window,
            "block_size": BLOCK, "num_splits": num_splits, "rows": 16, "width": size, "num_keys": triton_ops.KEYS,
        }  # fmt: skip
        types = {"p_table": "*i32", "p_starts": "*i32", "p_lengths": "*i32", "p_weight": "*fp32"}
        types["p_part"] = value if num_splits == 1 else "*fp32"
        for kernel in (triton_ops.attend_split, *([triton_ops.join] if num_splits > 1 else [])):
            code = properties(kernel, sizes, types, value, capability, triton_ops.OPTIONS)
            codes[f"{kernel.__name__} {model} {dtype} {num_splits} {capability}"] = code
    return codes


@pytest.mark.slow
def test_the_kernels_compile_for_real_devices(tmp_path: Path) -> None:
    codes = compiled_elsewhere("tests.server.engine.model.test_paged_attention", "compile_ahead()", tmp_path)
    assert len(codes) == 12
    for name, code in codes.items():
        assert code["is_elf"], name
        assert code["shared"] <= 160 << 10, (name, code)  # an A100 has 164 KiB
        assert code["multiplies_matrices"] == ("attend_split" in name and "bfloat16" in name), name
