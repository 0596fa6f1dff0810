"""Adapters packed for serving: B in the layout of the kernels' operands, read straight from an adapter's files.

The compiled module packs a sound file, as `lori.format` writes it, in one call and without the GIL. This takes a third of the
time of reading and packing separately. Any other file goes through `lori.format`, which reports every fault.
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
from lori.format import (
    CARD_FILE,
    WEIGHTS_FILE,
    Files,
    base_faults,
    checked_basis,
    content_digest,
    name_of,
    parse_adapter,
    read_files,
)
from lori.identity import BaseIdentity
from lori.kernels.layout import Layout, pack
from lori.kernels.packed_modules import PackedModules
from lori.names import NUM_VERSION_DIGITS
from lori.native import MODULE
from lori.sparse import ValueType
from lori.store.bases import load_basis
from lori.store.entry import Entry

MAX_PLANS = 256
"""Maximum number of plans that a reader caches; the adapters of a store share a few."""

Layouts = Mapping[str, Layout]
"""Layout of the operands of every module that can take a delta, by full name."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter, ready for a slot. Each module's B is multiplied by (its alpha / r) / `config.scale`.

    A term's weight includes `config.scale`.
    """

    name: str
    config: AdapterConfig
    basis: Basis
    modules: PackedModules

    @property
    def version(self) -> str:
        """The version, as `Adapter.version`."""
        return self.config.lori.content_digest[:NUM_VERSION_DIGITS]

    @property
    def num_bytes(self) -> int:
        """Bytes that the packed B takes in memory."""
        return self.modules.num_bytes


def pack_adapter(adapter: Adapter, layouts: Layouts) -> PackedAdapter:
    """Pack an adapter that is in memory. Raises `AdapterError` if `layouts` has no place for one of its modules or ranks."""
    faults = layout_faults({name: b.shape[1] for name, b in adapter.modules.items()}, layouts)
    if faults:
        raise AdapterError(f"{adapter.name!r} does not fit what is served: {'; '.join(faults)}")
    packed = {name: pack(layouts[name], b, _factor(adapter.config, name)) for name, b in adapter.modules.items()}
    return PackedAdapter(adapter.name, adapter.config, adapter.basis, PackedModules.from_modules(packed))


def layout_faults(ranks: Mapping[str, int], layouts: Layouts) -> list[str]:
    """Return a fault for each module in `ranks` that is missing in `layouts`, or whose rank is too high there."""
    faults = [f"{name}: no adapters of this module are" for name in ranks if name not in layouts]
    too_high = {name: rank for name, rank in ranks.items() if name in layouts and rank > layouts[name].rank}
    return faults + [f"{name}: rank {rank}, expected at most {layouts[name].rank}" for name, rank in too_high.items()]


def _factor(config: AdapterConfig, module: str) -> float:
    # A term's weight includes `config.scale` for all modules, so B makes up for a module with another alpha / r.
    return config.scale_of(module) / config.scale


@dataclass(frozen=True, slots=True)
class _Plan:
    """Arguments of the compiled packer, shared by adapters with the same ranks, alphas, targets and shapes."""

    layouts: Layouts
    names: str
    """Names of the modules, each followed by a newline."""
    table: npt.NDArray[np.int64]
    """One row for each module, (modules, 4): outputs, rank, whether values are fp32, bytes of a column index."""
    factors: npt.NDArray[np.float32]
    """Factor of each module's B, (modules,), see `_factor`."""

    @classmethod
    def from_config(cls, config: AdapterConfig, base: BaseIdentity, layouts: Layouts) -> "_Plan | None":
        """Return the plan for `config`, or None if its adapter belongs to another base or does not fit `layouts`."""
        ranks = {module: config.rank_of(module) for module in base.shapes if config.is_target(module)}
        if not ranks or not all(map(config.shape_of, ranks)) or base_faults(config, base) or layout_faults(ranks, layouts):
            return None
        targets = {module: layouts[module] for module in ranks}
        rows = [(at.num_outputs, ranks[m], at.dtype is torch.float32, at.column_dtype().itemsize) for m, at in targets.items()]
        factors = np.array([_factor(config, module) for module in ranks], dtype=np.float32)
        return cls(targets, "".join(f"{module}\n" for module in ranks), np.array(rows, dtype=np.int64), factors)

    def pack(self, weights: bytes, values: ValueType) -> PackedModules | None:
        """Pack the content of a weights file. Returns None if it is not sound, or not in the form that `lori.weights` writes."""
        assert MODULE
        packed = MODULE.pack_file(weights, self.names, self.table, self.factors, values)
        if packed is None:
            return None
        blocks, starts, ends = packed
        return PackedModules(self.layouts, torch.from_numpy(blocks), torch.from_numpy(starts), tuple(ends.tolist()))


class PackedReader:
    """Reader of adapters of `base` for operands of `layouts`. Thread-safe."""

    def __init__(self, base: BaseIdentity, layouts: Layouts) -> None:
        self.base, self.layouts = base, layouts
        self._plans: dict[object, _Plan | None] = {}

    def read(self, folder: Path) -> PackedAdapter:
        """Read, check and pack the adapter in `folder`. Equal to `pack_adapter(lori.format.load_adapter(folder))`, but faster.

        Raises as these two.
        """
        faults: list[str] = []
        files = read_files(folder, faults, extras=[CARD_FILE])
        packed = None if faults or not MODULE else self._pack(folder, files)
        if packed:
            return packed
        basis_of = partial(load_basis, folder.parent)
        adapter = parse_adapter(name_of(folder), files, basis_of, self.base, source=str(folder), faults=faults)
        return pack_adapter(adapter, self.layouts)

    def read_entry(self, entry: Entry) -> PackedAdapter:
        """Read the version of a store's `entry`, under the entry's name. Raises as `read` and as `Entry.load`."""
        with entry.acquire() as folder:
            packed = self.read(folder)
        entry.check_version(packed.version)
        return replace(packed, name=entry.name)

    def _pack(self, folder: Path, files: Files) -> PackedAdapter | None:
        """Return the adapter packed by the compiled module; None if it has any fault or the module cannot pack it."""
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
        key = (config.r, config.lora_alpha, config.target_modules, *(tuple(pattern.items()) for pattern in patterns))
        if key in (plans := self._plans):
            return plans[key]
        plan = _Plan.from_config(config, self.base, self.layouts)
        # The dict is replaced and never changed, since other threads may be reading it.
        self._plans = {key: plan} if len(plans) >= MAX_PLANS else plans | {key: plan}
        return plan
