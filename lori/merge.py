"""Merges: several weighted adapters combined into one adapter. Computed in memory, in float64.

Adapter i adds T_i A with T_i = (alpha_i / r_i) B_i. On one basis the T_i are summed, at the largest of the ranks. On several
bases, `linear` stacks the A's and concatenates the B's: every A is drawn, and the rank is the sum of the ranks. The other methods
prune each T_i or leave it whole, then sum, or average the values whose signs agree. A server that applies several adapters in one
request needs no merge for `linear`, since the kernel sums the terms.

Shapes: D outputs, N inputs, R rank, K nonzero entries in row-major order, n adapters, U positions in the union of their masks.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from types import MappingProxyType

import numpy as np
import torch
from pydantic import ValidationError

from lori.adapter import Adapter, common_shapes
from lori.basis import Basis, Explicit
from lori.config import UNSEALED, AdapterConfig, new_config
from lori.errors import AdapterError, MergeCancelledError, TemplateError
from lori.format import seal
from lori.identity import BaseIdentity, layer_of, natural_key
from lori.mask import largest
from lori.merge_options import DEFAULTS, MergeMethod, MergeOptions, SignMethod
from lori.names import NUM_VERSION_DIGITS
from lori.sparse import SparseB, ValueType, rounded
from lori.template import Template, common_templates


def prune(b: SparseB, options: MergeOptions, drawn_from: str) -> SparseB:
    """Return the entries of `b` that the method combines. `drawn_from` (adapter and module) is the key of a random draw."""
    if options.method == "linear":
        return b
    if options.is_random:
        return drop_and_rescale(b, options.density, f"{options.seed}|{drawn_from}")
    return keep_largest(b, options.density)


def combine(deltas: Sequence[SparseB], weights: Sequence[float], options: MergeOptions) -> SparseB:
    """Return the combination of `deltas`, (D, R) each. The result may hold explicit zeros."""
    if options.elects_sign:
        return disjoint_merge(deltas, weights, options.sign)
    return weighted_sum(deltas, weights)


def pad_columns(b: SparseB, rank: int, first: int) -> SparseB:
    """Return `b` (D, r) padded with zero columns to (D, rank); the columns of `b` begin at column `first`."""
    if rank == b.shape[1]:
        return b
    indices = b.rows * rank + first + b.indices.long() % b.shape[1]
    return SparseB((b.shape[0], rank), indices.int(), b.values)


def drop_zeros(b: SparseB) -> SparseB:
    """Return `b` without its explicit zeros."""
    is_nonzero = b.values != 0
    if is_nonzero.all():
        return b
    return SparseB(b.shape, b.indices[is_nonzero], b.values[is_nonzero])


def keep_largest(b: SparseB, density: float) -> SparseB:
    """Return the round(density K) largest entries of `b`, at least one if there are any. Of equal magnitudes the first wins."""
    count = max(1, round(density * b.values.numel()))
    positions = largest(b.values.abs(), count).sort().values
    return SparseB(b.shape, b.indices[positions], b.values[positions])


def drop_and_rescale(b: SparseB, density: float, key: str) -> SparseB:
    """Return `b` with each entry kept with probability `density` and divided by `density` (DARE, arXiv 2311.03099, section 3.2).

    The draw uses Philox's raw words, mapped to [0, 1) here. It depends on `key` and K only, not on a library's version.
    """
    philox = np.random.Philox(key=int.from_bytes(hashlib.sha256(f"dare|{key}".encode()).digest()[:16], "little"))
    uniform = (philox.random_raw(b.values.numel()) >> np.uint64(11)) * 2.0**-53
    survives = torch.from_numpy(uniform < density)
    return SparseB(b.shape, b.indices[survives], b.values[survives] / density)


def weighted_sum(deltas: Sequence[SparseB], weights: Sequence[float]) -> SparseB:
    """Return the nonzero entries of sum_i weights_i deltas_i, added in the order given."""
    total = torch.zeros(deltas[0].num_entries, dtype=torch.float64)
    for b, weight in zip(deltas, weights, strict=True):
        total.index_add_(0, b.indices, b.values.double() * weight)
    indices = _nonzero(total != 0)
    return SparseB(deltas[0].shape, indices.int(), total[indices])


def disjoint_merge(deltas: Sequence[SparseB], weights: Sequence[float], sign: SignMethod) -> SparseB:
    """Return, at each position, the sum of the weighted values with the elected sign, divided by their number.

    TIES (arXiv 2306.01708, algorithm 1). As in PEFT (`peft/utils/merge_utils.py`), the election ignores the weights, a tie elects
    plus, and an entry that is zero or pruned has no sign.
    """
    indices, values = _align(deltas)
    signs = values.sign()
    votes = _ordered_sum(values if sign == "total" else signs)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    total = _ordered_sum(values * agree * _column(weights))
    return SparseB(deltas[0].shape, indices.int(), total / agree.sum(0).clamp(min=1))


def _align(deltas: Sequence[SparseB]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the union (U,) of the indices of `deltas`, ascending, and the values of each delta there, (n, U) float64."""
    mask = torch.zeros(deltas[0].num_entries, dtype=torch.bool)
    for b in deltas:
        mask[b.indices.long()] = True
    indices = _nonzero(mask)
    places = torch.empty(len(mask), dtype=torch.int32)
    places[indices] = torch.arange(len(indices), dtype=torch.int32)
    values = torch.zeros(len(deltas), len(indices), dtype=torch.float64)
    for row, b in zip(values, deltas, strict=True):
        row[places[b.indices.long()].long()] = b.values.double()
    return indices, values


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # half the time of torch's nonzero


def _ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum (U,) of the rows of `values` (n, U), added in order. torch's `sum` does not promise an order."""
    total = torch.zeros_like(values[0])
    for row in values:
        total += row
    return total


def _column(weights: Sequence[float]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).unsqueeze(1)


Columns = Mapping[Basis, range]
"""The columns of a merged B that belong to each basis's A."""


@dataclass(frozen=True)
class _Parent:
    adapter: Adapter
    digest: str
    weight: float
    block_weights: tuple[float, ...] = ()

    @property
    def has_weight(self) -> bool:
        """Whether the adapter counts in some layer."""
        return self.weight != 0 and (not self.block_weights or any(self.block_weights))

    @cached_property
    def weights_by_layer(self) -> Mapping[str, float]:
        """The weight in each layer that the adapter changes."""
        blocks = self.block_weights or (1.0,)
        layers = blocks_of_layers(tuple(self.adapter.modules), len(blocks))
        return {layer: self.weight * blocks[block] for layer, block in layers.items()}


@lru_cache(maxsize=256)
def blocks_of_layers(modules: tuple[str, ...], num_blocks: int) -> Mapping[str, int]:
    """Return the block, from 0, of each layer of an adapter's `modules`: `num_blocks` of about equal length, first to last."""
    layers = sorted({layer_of(module) for module in modules}, key=natural_key)
    return MappingProxyType({layer: i * num_blocks // len(layers) for i, layer in enumerate(layers)})


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: MergeMethod = DEFAULTS.method,
    *,
    name: str = "merged",
    values: ValueType = "float32",
    density: float = DEFAULTS.density,
    sign: SignMethod = DEFAULTS.sign,
    seed: int = DEFAULTS.seed,
    templates: Sequence[Template] | None = None,
    block_weights: Sequence[Sequence[float]] = (),
    is_sealed: bool = True,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Adapter:
    """Return a new adapter, in memory, that combines `adapters` with `weights`; see `MergeOptions` for the options.

    The merged B is computed in float64 and rounded to `values`. A merge of adapters on several bases has an explicit basis.

    The result does not depend on the order of the adapters, bit for bit. Weights of an adapter that is named twice are added. An
    adapter of weight 0 must have the same base model, but contributes no modules, no basis and no vote. If all weights are 0, the
    result has the modules of one of the adapters and no nonzero entry. Entries that come out zero are dropped, except when
    `linear` has a single adapter of weight 1, whose entries stay as they are. If the adapters agree on alpha / r in all modules
    they share, the result has the same alpha / r; else its alpha / r is 1.

    `templates` are the prompt templates of the result; None takes those that all adapters were trained on.

    `block_weights`, only for `linear`, has a sequence for each adapter: factors of its weight in blocks of layers. The layers
    that the adapter changes are divided into as many blocks of about equal length, from the first to the last. An empty sequence
    is 1 in all layers.

    `is_sealed`: whether the result has its digests, as an adapter that is saved, inspected or merged again must. They take about
    as long as the rest of the merge.

    `is_cancelled` is called in this thread before each module and once after the last. If it returns True, the merge stops.

    Raises `AdapterError` for options, weights and adapters that do not go together, and for results that `values` cannot hold;
    `MergeCancelledError` if the merge was cancelled.
    """
    options = MergeOptions(method, density, sign, seed)
    if method != "linear" and any(block_weights):
        raise AdapterError(f"block weights are for linear merges, found {method}")
    parents = _parents(adapters, weights, block_weights or [()] * len(adapters))
    _check_one_basis(parents, options)
    shapes = common_shapes([parent.adapter for parent in parents])
    columns = {module: _columns(_parents_with(parents, module), module) for module in shapes}
    is_folded = _is_folded(parents, shapes)
    if options.method == "linear" and [(parent.weight, parent.block_weights) for parent in parents] == [(1.0, ())]:
        modules = {module: rounded(b, values) for module, b in parents[0].adapter.modules.items()}
    else:
        modules = {}
        for module in shapes:
            _check_cancelled(is_cancelled)
            modules[module] = drop_zeros(rounded(_combine_module(parents, module, columns[module], is_folded, options), values))
    _check_cancelled(is_cancelled)
    _check_finite(modules, values)
    basis = _basis(parents, columns, shapes)
    alphas = {module: _alpha(parents, module, b.shape[1], is_folded) for module, b in modules.items()}
    merged = Adapter(name, _config(parents, modules, basis, shapes, alphas, values, options, templates), modules, basis)
    return seal(merged).adapter if is_sealed else merged


def _parents(adapters: Sequence[Adapter], weights: Sequence[float], block_weights: Sequence[Sequence[float]]) -> list[_Parent]:
    """Return the adapters that contribute, each once, in an order that does not depend on the caller's order.

    An adapter that is named twice with different block weights gives two parents.
    """
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(f"{len(weights)} weights for {len(adapters)} adapters, expected one for each of at least one adapter")
    if len(block_weights) != len(adapters):
        raise AdapterError(f"{len(block_weights)} lists of block weights for {len(adapters)} adapters, expected one for each")
    if not all(math.isfinite(weight) for blocks in block_weights for weight in blocks):
        raise AdapterError("a block weight is not finite")
    assert all(adapter.config.lori.content_digest != UNSEALED for adapter in adapters), "they are told apart by their digests"
    named: dict[tuple[str, str, tuple[float, ...]], tuple[Adapter, list[float]]] = {}
    for adapter, weight, blocks in zip(adapters, weights, block_weights, strict=True):
        key = (adapter.config.lori.content_digest, adapter.name, tuple(map(float, blocks)))
        named.setdefault(key, (adapter, []))[1].append(float(weight))
    parents = [_Parent(named[key][0], key[0], sum(sorted(named[key][1])), key[2]) for key in sorted(named)]
    if faults := [f"of {parent.adapter.name!r} is {parent.weight}" for parent in parents if not math.isfinite(parent.weight)]:
        raise AdapterError(f"the weight {', '.join(faults)}, expected finite numbers")
    common_shapes([parent.adapter for parent in parents])
    return [parent for parent in parents if parent.has_weight] or parents[:1]


def _check_one_basis(parents: Sequence[_Parent], options: MergeOptions) -> None:
    names: dict[Basis, list[str]] = {}
    for parent in parents:
        names.setdefault(parent.adapter.basis, []).append(parent.adapter.name)
    if options.method != "linear" and len(names) > 1:
        bases = "; ".join(f"{basis} of {', '.join(map(repr, adapters))}" for basis, adapters in names.items())
        raise AdapterError(f"{options.method} merges adapters on one basis, found {bases}: only linear merges these")


def _check_cancelled(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise MergeCancelledError("the merge was given up before it was done")


def _parents_with(parents: Sequence[_Parent], module: str) -> list[_Parent]:
    return [parent for parent in parents if module in parent.adapter.modules]


def _columns(parents: Sequence[_Parent], module: str) -> Columns:
    """Return the columns of each basis: as many as its largest rank, since A of a lower rank is the first rows of that A."""
    ranks: dict[Basis, int] = {}
    for parent in parents:
        ranks[parent.adapter.basis] = max(ranks.get(parent.adapter.basis, 0), parent.adapter.modules[module].shape[1])
    ends = accumulate(ranks.values())
    return {basis: range(end - rank, end) for (basis, rank), end in zip(ranks.items(), ends, strict=True)}


def _is_folded(parents: Sequence[_Parent], modules: Iterable[str]) -> bool:
    """Return whether alpha / r must be folded into B: the adapters differ in alpha / r in some module, or in their bases."""
    scales = (len({parent.adapter.config.scale_of(module) for parent in _parents_with(parents, module)}) for module in modules)
    return len({parent.adapter.basis for parent in parents}) > 1 or max(scales) > 1


def _combine_module(parents: Sequence[_Parent], module: str, columns: Columns, is_folded: bool, options: MergeOptions) -> SparseB:
    """Return the merged B of `module`, (D, R) float64."""
    parents = _parents_with(parents, module)
    rank = sum(map(len, columns.values()))
    deltas = []
    for parent in parents:
        b = parent.adapter.modules[module]
        scale = parent.adapter.config.scale_of(module) if is_folded else 1.0
        delta = prune(SparseB(b.shape, b.indices, b.values.double() * scale), options, f"{parent.digest}|{module}")
        deltas.append(pad_columns(delta, rank, columns[parent.adapter.basis].start))
    return combine(deltas, [parent.weights_by_layer[layer_of(module)] for parent in parents], options)


def _check_finite(modules: Mapping[str, SparseB], values: ValueType) -> None:
    if overflowed := [module for module, b in modules.items() if not b.values.isfinite().all()]:
        names = ", ".join(overflowed)
        raise AdapterError(f"the merge has values that are not finite in {values}, in {names}: expected lower weights")


def _basis(parents: Sequence[_Parent], columns: Mapping[str, Columns], shapes: Mapping[str, tuple[int, int]]) -> Basis:
    """Return the basis of the merge: the common basis of the adapters, or an explicit basis with the A's of all their bases."""
    bases = dict.fromkeys(parent.adapter.basis for parent in parents)
    if len(bases) == 1:
        return parents[0].adapter.basis
    drawn = {
        module: [basis.draw(module, len(ranks), shapes[module][1]) for basis, ranks in columns[module].items()]
        for module in shapes
    }
    return Explicit.from_tensors({module: torch.cat(parts) for module, parts in drawn.items()})


def _alpha(parents: Sequence[_Parent], module: str, rank: int, is_folded: bool) -> float:
    """Return alpha of `module` in the merge: that of an adapter with the merged rank, so that alpha / r is bitwise the same."""
    if is_folded:
        return float(rank)
    config = next(
        parent.adapter.config for parent in _parents_with(parents, module) if parent.adapter.modules[module].shape[1] == rank
    )
    return config.alpha_pattern.get(module, config.lora_alpha)


def _config(
    parents: Sequence[_Parent],
    modules: Mapping[str, SparseB],
    basis: Basis,
    shapes: Mapping[str, tuple[int, int]],
    alphas: Mapping[str, float],
    values: ValueType,
    options: MergeOptions,
    templates: Sequence[Template] | None,
) -> AdapterConfig:
    configs = [parent.adapter.config for parent in parents]
    record: list[dict[str, object]] = [
        {"name": parent.adapter.name, "version": parent.digest[:NUM_VERSION_DIGITS], "weight": parent.weight}
        | ({"block_weights": [*parent.block_weights]} if parent.block_weights else {})
        for parent in parents
    ]
    try:
        return new_config(
            modules,
            basis,
            BaseIdentity(configs[0].base_model_name_or_path, configs[0].lori.base_digest, shapes),
            alphas=alphas,
            target_modules=list(dict.fromkeys(target for config in configs for target in config.target_modules)),
            values=values,
            templates=_common_templates(parents) if templates is None else templates,
            training={"merge": {**options.used, "adapters": record}},
        )
    except ValidationError as error:
        faults = "; ".join(fault["msg"] for fault in error.errors())
        raise AdapterError(f"the merge would be no adapter that can be read: {faults}") from error


def _common_templates(parents: Sequence[_Parent]) -> Sequence[Template]:
    """Return the templates that all adapters were trained on, in the first adapter's order of preference."""
    try:
        return common_templates([(parent.adapter.name, parent.adapter.config.lori.templates) for parent in parents])
    except TemplateError as error:
        raise AdapterError(f"{error}: say which the merge is for") from error
