"""Size of an adapter on disk and its load time, compared with the same adapter in PEFT's format in bf16.

`python -m tests.bench.format`: random masks at 90% sparsity and r = 32 over all seven projections, one thread. The files are in
the page cache. A's digest is cached, as for every adapter after the first.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.basis import Seeded
from lori.cli.output import folder_bytes, print_table
from lori.config import new_config, target_names
from lori.format import load_adapter, save_adapter, seal, stored_as
from lori.identity import BaseIdentity
from lori.peft.exporter import export_peft
from lori.sparse import VALUE_TYPES, SparseB, rounding_error

RANK, SPARSITY = 32, 0.9
MODELS = {"SmolLM2-135M": (30, 576, 192, 1536), "Llama-3-8B": (32, 4096, 1024, 14336)}
"""Number of layers, hidden size, size of keys and values, size of the MLP."""


def shapes_of(model: str) -> dict[str, tuple[int, int]]:
    """Return the shapes (D, N) of a model's seven projections in every layer."""
    num_layers, hidden, kv, mlp = MODELS[model]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()}


def random_modules(shapes: dict[str, tuple[int, int]]) -> dict[str, SparseB]:
    """Return a random B for every module, with fp32 values and 10% nonzero entries."""
    g = torch.Generator().manual_seed(0)
    modules = {}
    for name, (num_outputs, _) in shapes.items():
        mask = torch.rand(num_outputs, RANK, generator=g) < 1 - SPARSITY
        modules[name] = SparseB.from_dense(0.02 * torch.randn(num_outputs, RANK, generator=g), mask)
    return modules


def measure(model: str, folder: Path, repeats: int) -> list[dict[str, float | str]]:
    """Return a row for each type of stored values."""
    shapes = shapes_of(model)
    modules = random_modules(shapes)
    basis, base = Seeded(), BaseIdentity(model, "0" * 64, shapes)
    config = new_config(
        modules,
        basis,
        base,
        alphas=dict.fromkeys(modules, 64.0),
        target_modules=target_names(modules, shapes),
        values="float32",
        templates=["chat"],
        training={},
    )
    exact = seal(Adapter(model, config, modules, basis)).adapter
    peft_bytes = folder_bytes(export_peft(exact, folder / "peft", torch.bfloat16))
    rows: list[dict[str, float | str]] = []
    for values in VALUE_TYPES:
        save_adapter(stored_as(exact, values).adapter, folder / values)
        load_adapter(folder / values)
        seconds = [timed(folder / values) for _ in range(repeats)]
        num_bytes = folder_bytes(folder / values)
        rows.append(
            {"model": model, "values": values, "bytes": num_bytes, "peft_bytes": peft_bytes}
            | {"ratio": peft_bytes / num_bytes, "error": rounding_error(modules.values(), values)}
            | {"load_s": statistics.median(seconds), "load_s_min": min(seconds), "load_s_max": max(seconds)}
            | {"dense_gb_per_s": peft_bytes / statistics.median(seconds) / 1e9}
        )
    return rows


def timed(folder: Path) -> float:
    """Return the seconds of one load."""
    started = time.perf_counter()
    load_adapter(folder)
    return time.perf_counter() - started


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(model, Path(folder), arguments.repeats)
    columns = ["model", "values", "MB", "PEFT bf16, MB", "smaller", "error", "load, ms (min–max)", "dense-equivalent GB/s"]
    print_table(columns, [cells(row) for row in rows])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def cells(row: dict[str, float | str]) -> list[str]:
    """Return a row as text."""
    number = {key: value for key, value in row.items() if isinstance(value, float | int)}
    load = [f"{1000 * number[key]:.1f}" for key in ("load_s", "load_s_min", "load_s_max")]
    return [
        str(row["model"]), str(row["values"]), f"{number['bytes'] / 1e6:.3f}", f"{number['peft_bytes'] / 1e6:.2f}",
        f"{number['ratio']:.2f}x", "0" if not number["error"] else f"{number['error']:.1e}",
        f"{load[0]} ({load[1]}–{load[2]})", f"{number['dense_gb_per_s']:.2f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
