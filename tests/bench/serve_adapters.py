"""Adapters for the server benchmark: as large on disk and as unevenly sparse as trained ones, and quick to create.

Their effect on the model does not matter, so B is random, and small enough that the model still writes text. Every adapter has a
content digest of its own, but there are only `NUM_FILES` different weights files, which are hard-linked. Adapters with the same
file differ in alpha. A server reads, checks and packs each adapter as if it were the only one. The page cache holds all files, as
it would hold the popular ones of a store.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lori.adapter import Adapter
from lori.basis import Seeded
from lori.config import CONFIG_FILE, AdapterConfig, new_config, seal_config, target_names
from lori.format import WEIGHTS_FILE, content_digest, load_adapter, seal
from lori.identity import BaseIdentity
from lori.named_merge import SUFFIX, MergedAdapter, NamedMerge
from lori.names import NUM_VERSION_DIGITS
from lori.peft.exporter import export_peft
from lori.sparse import SparseB
from tests.bench.serve_asks import distinct

RANK, DENSITY = 32, 0.1
ALPHA = 2.0 * RANK
NUM_FILES = 32
"""Number of different weights files."""
NUM_BLOCKS = 30
"""Blocks of layers of the benchmark's merges: one for each layer of the embedded model."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Drawn:
    """The content of a weights file, and the config of an adapter with it."""

    weights: bytes
    config: AdapterConfig


def adapter_name(index: int) -> str:
    """Return the name of the adapter number `index`."""
    return f"tenant-{index:05}"


def write_adapters(folder: Path, base: BaseIdentity, count: int, num_files: int = NUM_FILES) -> Path:
    """Write `count` adapters of `base` with different contents into the new `folder`. Returns the folder."""
    folder.mkdir(parents=True)
    drawn: list[Drawn] = []
    for i in tqdm(range(count), desc="adapters", unit="", disable=None, leave=False):
        if i < num_files:
            drawn.append(_drawn(base, seed=i))
        adapter, copy = drawn[i % num_files], i // num_files
        target = folder / adapter_name(i)
        target.mkdir()
        (target / CONFIG_FILE).write_bytes(_config_bytes(adapter, ALPHA * (1 + copy / 1024)))
        if copy:
            (target / WEIGHTS_FILE).hardlink_to(folder / adapter_name(i % num_files) / WEIGHTS_FILE)
        else:
            (target / WEIGHTS_FILE).write_bytes(adapter.weights)
    return folder


def merge_name(num_terms: int, index: int) -> str:
    """Return the name of the named merge number `index` of `num_terms` adapters."""
    return f"merge-{num_terms}-{index:02}"


def write_merges(folder: Path, store: Path, base: BaseIdentity, num_terms: int, count: int) -> None:
    """Write `count` merges of `num_terms` of the first `count` adapters of `store`, with weights in blocks of layers."""
    folder.mkdir(exist_ok=True)
    files = [store / adapter_name(i) / CONFIG_FILE for i in range(count)]
    configs = [AdapterConfig.model_validate_json(file.read_bytes()) for file in files]
    references = [f"{adapter_name(i)}@{config.lori.content_digest[:NUM_VERSION_DIGITS]}" for i, config in enumerate(configs)]
    choose, rng = distinct(references, num_terms), random.Random(num_terms)
    for i in range(count):
        merged = [
            MergedAdapter(
                reference=reference,
                weight=1 / num_terms,
                block_weights=[round(rng.uniform(0, 2), 2) for _ in range(NUM_BLOCKS)],
            )
            for reference in choose(i)
        ]
        merge = NamedMerge(base_digest=base.digest, adapters=merged)
        (folder / f"{merge_name(num_terms, i)}{SUFFIX}").write_bytes(merge.to_bytes())


def export_adapters(folder: Path, store: Path, count: int) -> None:
    """Write the first `count` adapters of `store` into `folder` in PEFT's format in bf16. Existing ones are not written again."""
    for i in range(count):
        if not (folder / adapter_name(i)).exists():
            export_peft(load_adapter(store / adapter_name(i)), folder / adapter_name(i), torch.bfloat16)


def random_modules(base: BaseIdentity, seed: int) -> dict[str, SparseB]:
    """Return a random B in bf16 for each projection of `base`, with the largest tenth of all entries.

    Modules and rows differ in scale, as trained ones do, so the global threshold leaves them unevenly dense.
    """
    g = torch.Generator().manual_seed(seed)
    dense = {name: _dense(num_outputs, g) for name, num_outputs in _projections(base).items()}
    magnitudes = torch.cat([b.flatten() for b in dense.values()]).abs()
    threshold = magnitudes.kthvalue(round(len(magnitudes) * (1 - DENSITY))).values
    # A module without entries would not be measured, so every module keeps its first entry; this matters for tiny models.
    return {name: SparseB.from_dense(b.bfloat16(), (b.abs() > threshold) | _first(b)) for name, b in dense.items()}


def _projections(base: BaseIdentity) -> Mapping[str, int]:
    return {name: shape[0] for name, shape in base.shapes.items() if name.rpartition(".")[2] in PROJECTIONS}


def _dense(num_outputs: int, g: torch.Generator) -> torch.Tensor:
    module_scale = 1e-4 * torch.randn((), generator=g).mul(0.3).exp()
    row_scales = torch.randn(num_outputs, 1, generator=g).mul(0.5).exp()
    return module_scale * row_scales * torch.randn(num_outputs, RANK, generator=g)


def _first(b: torch.Tensor) -> torch.Tensor:
    is_first = torch.zeros_like(b, dtype=torch.bool)
    is_first[0, 0] = True
    return is_first


def _drawn(base: BaseIdentity, seed: int) -> Drawn:
    modules, basis = random_modules(base, seed), Seeded()
    config = new_config(
        modules,
        basis,
        base,
        alphas=dict.fromkeys(modules, ALPHA),
        target_modules=target_names(modules, base.shapes),
        templates=("plain",),
        training={},
    )
    sealed = seal(Adapter(adapter_name(seed), config, modules, basis))
    return Drawn(sealed.files[WEIGHTS_FILE], sealed.adapter.config)


def _config_bytes(drawn: Drawn, alpha: float) -> bytes:
    config = drawn.config.model_copy(update={"lora_alpha": alpha})
    section = config.lori.model_copy(update={"content_digest": content_digest(drawn.weights, config)})
    return seal_config("an adapter of the benchmark", config.model_copy(update={"lori": section}))[1]
