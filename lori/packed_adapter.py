"""An adapter as it is served: packed as the kernels' operands want it, straight from its file.

A sound file as `lori.format` writes it goes through the compiled module in one piece, without Python's lock, in a third of the
time that reading and packing take. Whatever else a file is, `lori.format` reads it, and says what is wrong with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lori.adapter import Adapter
from lori.basis import Basis
from lori.config import CONFIG_FILE, AdapterConfig, parse_config
from lori.errors import AdapterError
from lori.format import WEIGHTS_FILE, Files, base_faults, checked_basis, content_digest, name_of, parse_adapter, read_files
from lori.identity import BaseIdentity
from lori.kernels.layout import Layout
from lori.kernels.native import MODULE, pack
from lori.kernels.packed_modules import PackedModules
from lori.names import NUM_VERSION_DIGITS
from lori.sparse import ValueType
from lori.store.bases import load_basis
from lori.store.entry import Entry

MAX_PLANS = 256
"""Recipes that a reader remembers; the adapters of a store share a few."""

Layouts = Mapping[str, Layout]
"""Of the operands of every module that can take a delta, by full name."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter, ready to be put in a slot: scale * B of its modules, where a term's weight has `config.scale` in it."""

    name: str
    config: AdapterConfig
    basis: Basis
    modules: PackedModules

    @property
    def version(self) -> str:
        """As `Adapter.version`."""
        return self.config.lori.content_digest[:NUM_VERSION_DIGITS]

    @property
    def num_bytes(self) -> int:
        """What its B holds in memory, in bytes."""
        return self.modules.num_bytes


def pack_adapter(adapter: Adapter, layouts: Layouts) -> PackedAdapter:
    """Pack an adapter that is in memory. Raises `AdapterError` where a module or a rank of it is not one of `layouts`."""
    faults = layout_faults({name: b.shape[1] for name, b in adapter.modules.items()}, layouts)
    if faults:
        raise AdapterError(f"{adapter.name!r} does not fit what is served: {'; '.join(faults)}")
    packed = {name: pack(layouts[name], b, _factor(adapter.config, name)) for name, b in adapter.modules.items()}
    return PackedAdapter(adapter.name, adapter.config, adapter.basis, PackedModules.of(packed))


def layout_faults(ranks: Mapping[str, int], layouts: Layouts) -> list[str]:
    """Return which modules of these ranks have no place in `layouts`."""
    faults = [f"{name}: no adapters of this module are" for name in ranks if name not in layouts]
    too_high = {name: rank for name, rank in ranks.items() if name in layouts and rank > layouts[name].rank}
    return faults + [f"{name}: rank {rank}, expected at most {layouts[name].rank}" for name, rank in too_high.items()]


def _factor(config: AdapterConfig, module: str) -> float:
    # A term's weight has alpha / r of most modules in it; where a module's own differs, its B makes up for it.
    return config.scale_of(module) / config.scale


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the weights of one recipe are read: adapters of the same ranks, alphas, targets and shapes share it."""

    layouts: Layouts
    names: str
    """A newline after each."""
    table: npt.NDArray[np.int64]
    """(modules, 4): outputs, rank, whether values are fp32, bytes of a column."""
    factors: npt.NDArray[np.float32]

    @classmethod
    def of(cls, config: AdapterConfig, base: BaseIdentity, layouts: Layouts) -> "_Plan | None":
        """Return the plan for `config`, or None where its adapter is not of `base` or has no place in `layouts`."""
        ranks = {module: config.rank_of(module) for module in base.shapes if config.is_target(module)}
        if not ranks or not all(map(config.shape_of, ranks)) or base_faults(config, base) or layout_faults(ranks, layouts):
            return None
        of = {module: layouts[module] for module in ranks}
        rows = [(at.num_outputs, ranks[m], at.dtype is torch.float32, at.column_dtype().itemsize) for m, at in of.items()]
        factors = np.array([_factor(config, module) for module in ranks], dtype=np.float32)
        return cls(of, "".join(f"{module}\n" for module in ranks), np.array(rows, dtype=np.int64), factors)

    def pack(self, weights: bytes, values: ValueType) -> PackedModules | None:
        """Pack the content of a weights file; None where it is not sound, or not as `lori.weights` writes it."""
        assert MODULE
        packed = MODULE.pack_file(weights, self.names, self.table, self.factors, values)
        if packed is None:
            return None
        blocks, starts, ends = packed
        return PackedModules(self.layouts, torch.from_numpy(blocks), torch.from_numpy(starts), tuple(ends.tolist()))


class PackedReader:
    """Reads adapters of `base` for operands of `layouts`. Any threads may, at once."""

    def __init__(self, base: BaseIdentity, layouts: Layouts) -> None:
        self.base, self.layouts = base, layouts
        self._plans: dict[object, _Plan | None] = {}

    def read(self, folder: Path) -> PackedAdapter:
        """Read, checks and packs the adapter in `folder`: what `pack_adapter` makes of what `lori.format.load_adapter` reads.

        Raises as these two.
        """
        faults: list[str] = []
        files = read_files(folder, faults)
        packed = None if faults or MODULE is None else self._pack(folder, files)
        if packed:
            return packed
        basis_of = partial(load_basis, folder.parent)
        adapter = parse_adapter(name_of(folder), files, basis_of, self.base, source=str(folder), faults=faults)
        return pack_adapter(adapter, self.layouts)

    def read_entry(self, entry: Entry) -> PackedAdapter:
        """Read a version in a store; its name is the entry's. Raises as `read`, and as `Entry.load`."""
        with entry.held() as folder:
            packed = self.read(folder)
        entry.check_version(packed.version)
        return replace(packed, name=entry.name)

    def _pack(self, folder: Path, files: Files) -> PackedAdapter | None:
        """Return the adapter; None where anything is wrong with it, or it takes the long way."""
        faults: list[str] = []
        config = parse_config(files[CONFIG_FILE], faults)
        if config is None or faults or config.lori.base_digest != self.base.digest:
            return None
        plan, weights = self._plan(config), files[WEIGHTS_FILE]
        if plan is None or content_digest(weights, config) != config.lori.content_digest:
            return None
        modules = plan.pack(weights, config.lori.values)
        if modules is None:
            return None
        basis = checked_basis(config, plan.layouts, partial(load_basis, folder.parent), faults)
        return PackedAdapter(name_of(folder), config, basis, modules) if basis and not faults else None

    def _plan(self, config: AdapterConfig) -> _Plan | None:
        patterns = (config.rank_pattern, config.alpha_pattern, config.lori.shapes)
        recipe = (config.r, config.lora_alpha, config.target_modules, *(tuple(of.items()) for of in patterns))
        if recipe in (plans := self._plans):
            return plans[recipe]
        plan = _Plan.of(config, self.base, self.layouts)
        # Another table, not this one cleared: another thread may be looking something up.
        self._plans = {recipe: plan} if len(plans) >= MAX_PLANS else plans | {recipe: plan}
        return plan
