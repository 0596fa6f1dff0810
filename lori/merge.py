"""Merges: several weighted adapters as one adapter that adds the same to a base. In memory, in float64.

T_i = (alpha_i / r_i) B_i is what adapter i adds on its basis. On one basis the T_i add, at the greatest of the ranks. On
several, `linear` stacks the A's and sets the B's side by side: every A is drawn, and the rank is the sum. The other methods
prune each T_i first or not, then sum, or average where the signs agree. A server that applies several adapters in one request
needs none of this for `linear`: the terms add as they are.

Shapes: D outputs, N inputs, R rank, K entries in row-major order, n adapters, U positions of an entry in any of them.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from pydantic import ValidationError

from lori.adapter import Adapter, common_shapes
from lori.basis import Basis, Explicit
from lori.config import AdapterConfig, new_config
from lori.errors import AdapterError, MergeCancelledError
from lori.format import seal
from lori.identity import BaseIdentity
from lori.mask import largest
from lori.merge_options import DEFAULTS, MergeMethod, MergeOptions, SignMethod
from lori.names import NUM_VERSION_DIGITS
from lori.sparse import SparseB, ValueType, rounded
from lori.template import Template


def prune(b: SparseB, options: MergeOptions, drawn_from: str) -> SparseB:
    """Return those entries of `b` that the method combines; `drawn_from` names the adapter and the module to a random one."""
    if options.method == "linear":
        return b
    if options.is_random:
        return drop_and_rescale(b, options.density, f"{options.seed}|{drawn_from}")
    return keep_largest(b, options.density)


def combine(deltas: Sequence[SparseB], weights: Sequence[float], options: MergeOptions) -> SparseB:
    """Return the combination of `deltas`, (D, R) each, where any of them keeps an entry; it may hold zeros."""
    if options.elects_sign:
        return disjoint_merge(deltas, weights, options.sign)
    return weighted_sum(deltas, weights)


def placed(b: SparseB, rank: int, first: int) -> SparseB:
    """Return `b` (D, r) as the columns from `first` on of a (D, rank) that keeps nothing else."""
    indices = b.rows * rank + first + b.indices.long() % b.shape[1]
    return SparseB((b.shape[0], rank), indices.int(), b.values)


def nonzero(b: SparseB) -> SparseB:
    """Return `b` without the entries that are kept and zero."""
    kept = b.values != 0
    return SparseB(b.shape, b.indices[kept], b.values[kept])


def keep_largest(b: SparseB, density: float) -> SparseB:
    """Return the round(density K) largest entries of `b`, at least one of any; the first win where some are equal."""
    count = max(1, round(density * b.values.numel()))
    positions = largest(b.values.abs(), count).sort().values
    return SparseB(b.shape, b.indices[positions], b.values[positions])


def drop_and_rescale(b: SparseB, density: float, key: str) -> SparseB:
    """Return `b` with each entry kept with probability `density` and divided by it (DARE, arXiv 2311.03099, section 3.2).

    The draw is Philox's raw words, mapped to [0, 1) here: it depends on `key` and K, on no library's version and no order.
    """
    philox = np.random.Philox(key=int.from_bytes(hashlib.sha256(f"dare|{key}".encode()).digest()[:16], "little"))
    uniform = (philox.random_raw(b.values.numel()) >> np.uint64(11)) * 2.0**-53
    kept = torch.from_numpy(uniform < density)
    return SparseB(b.shape, b.indices[kept], b.values[kept] / density)


def weighted_sum(deltas: Sequence[SparseB], weights: Sequence[float]) -> SparseB:
    """Return sum_i weights_i deltas_i over the union of the masks, added in the order given."""
    indices, values = _aligned(deltas)
    return SparseB(deltas[0].shape, indices, _in_order(values * _column(weights)))


def disjoint_merge(deltas: Sequence[SparseB], weights: Sequence[float], sign: SignMethod) -> SparseB:
    """Return, at each position, the sum of the weighted values that have the elected sign, divided by their number.

    TIES (arXiv 2306.01708, algorithm 1). As in PEFT (`peft/utils/merge_utils.py`) the election does not see the weights, a draw
    elects plus, and an entry that is zero or pruned has no sign.
    """
    indices, values = _aligned(deltas)
    signs = values.sign()
    votes = _in_order(values if sign == "total" else signs)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    total = _in_order(values * agree * _column(weights))
    return SparseB(deltas[0].shape, indices, total / agree.sum(0).clamp(min=1))


def _aligned(deltas: Sequence[SparseB]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions (U,) that any of `deltas` keeps, ascending, and everyone's values there, (n, U) float64."""
    indices = torch.cat([b.indices for b in deltas]).unique()
    values = torch.zeros(len(deltas), len(indices), dtype=torch.float64)
    for row, b in zip(values, deltas, strict=True):
        row[torch.searchsorted(indices, b.indices)] = b.values.double()
    return indices, values


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """Return the sum (U,) of the rows of `values` (n, U), one after another: torch's own order is not promised."""
    total = torch.zeros_like(values[0])
    for row in values:
        total += row
    return total


def _column(weights: Sequence[float]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64).unsqueeze(1)


Columns = Mapping[Basis, range]
"""Which columns of a merged B stand on the A of which basis."""


@dataclass(frozen=True, slots=True)
class _Parent:
    adapter: Adapter
    digest: str
    weight: float


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
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Adapter:
    """Return a new adapter that adds the combination of `adapters` at `weights`, in memory; see `MergeOptions` for the options.

    Its B is computed in float64 and rounded to `values`. Adapters on several bases give one on an explicit basis.

    The order of the adapters makes no difference to a bit. The weights of an adapter that is named twice add; one of weight 0
    counts for nothing but that it must be of the same base: not its modules, nor its basis, nor its vote. Where all weights are 0
    the result has the modules of one of them and keeps no entry. What comes out zero is left out, except that one adapter of
    weight 1 gives itself in `linear`. Where the adapters agree on alpha / r in all modules they share, the result has it too;
    else its alpha / r is 1.

    `templates` are how its prompts are written: None is what all the adapters were trained on.

    `is_cancelled` is called in this thread before each module and before the result is sealed; once it returns True the merge
    is given up.

    Raises `AdapterError` for options, weights and adapters that do not go together, and values that `values` cannot hold;
    `MergeCancelledError` where it was given up.
    """
    options = MergeOptions(method, density, sign, seed)
    parents = _parents(adapters, weights)
    _check_one_basis(parents, options)
    shapes = common_shapes([parent.adapter for parent in parents])
    columns = {module: _columns(_having(parents, module), module) for module in shapes}
    is_folded = _is_folded(parents, shapes)
    if options.method == "linear" and [parent.weight for parent in parents] == [1.0]:
        modules = {module: rounded(b, values) for module, b in parents[0].adapter.modules.items()}
    else:
        modules = {}
        for module in shapes:
            _check_wanted(is_cancelled)
            modules[module] = nonzero(rounded(_combined(parents, module, columns[module], is_folded, options), values))
    _check_wanted(is_cancelled)
    _check_finite(modules, values)
    basis = _basis(parents, columns, shapes)
    alphas = {module: _alpha(parents, module, b.shape[1], is_folded) for module, b in modules.items()}
    return seal(
        Adapter(name, _config(parents, modules, basis, shapes, alphas, values, options, templates), modules, basis)
    ).adapter


def _parents(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[_Parent]:
    """Return the adapters that count, each once, in an order that does not depend on the caller's."""
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(f"{len(weights)} weights for {len(adapters)} adapters, expected one for each of at least one adapter")
    named: dict[tuple[str, str], tuple[Adapter, list[float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        named.setdefault((adapter.config.lori.content_digest, adapter.name), (adapter, []))[1].append(float(weight))
    parents = [_Parent(named[key][0], key[0], sum(sorted(named[key][1]))) for key in sorted(named)]
    if faults := [f"of {t.adapter.name!r} is {t.weight}" for t in parents if not math.isfinite(t.weight)]:
        raise AdapterError(f"the weight {', '.join(faults)}, expected finite numbers")
    common_shapes([parent.adapter for parent in parents])
    return [parent for parent in parents if parent.weight] or parents[:1]


def _check_one_basis(parents: Sequence[_Parent], options: MergeOptions) -> None:
    names: dict[Basis, list[str]] = {}
    for parent in parents:
        names.setdefault(parent.adapter.basis, []).append(parent.adapter.name)
    if options.method != "linear" and len(names) > 1:
        found = "; ".join(f"{basis} of {', '.join(map(repr, of))}" for basis, of in names.items())
        raise AdapterError(f"{options.method} merges adapters on one basis, found {found}: only linear merges these")


def _check_wanted(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise MergeCancelledError("the merge was given up before it was done")


def _having(parents: Sequence[_Parent], module: str) -> list[_Parent]:
    return [parent for parent in parents if module in parent.adapter.modules]


def _columns(parents: Sequence[_Parent], module: str) -> Columns:
    """Return the columns of each basis: as many as the greatest rank on it, for A of a lower rank is its first rows."""
    ranks: dict[Basis, int] = {}
    for parent in parents:
        ranks[parent.adapter.basis] = max(ranks.get(parent.adapter.basis, 0), parent.adapter.modules[module].shape[1])
    ends = accumulate(ranks.values())
    return {basis: range(end - rank, end) for (basis, rank), end in zip(ranks.items(), ends, strict=True)}


def _is_folded(parents: Sequence[_Parent], modules: Iterable[str]) -> bool:
    """Return whether the adapters' alpha / r must go into B: they differ in some module, or there are several bases."""
    scales = (len({parent.adapter.config.scale_of(module) for parent in _having(parents, module)}) for module in modules)
    return len({parent.adapter.basis for parent in parents}) > 1 or max(scales) > 1


def _combined(parents: Sequence[_Parent], module: str, columns: Columns, is_folded: bool, options: MergeOptions) -> SparseB:
    """Return the merged B of `module`, (D, R) float64."""
    having = _having(parents, module)
    rank = sum(map(len, columns.values()))
    deltas = []
    for parent in having:
        b = parent.adapter.modules[module]
        scale = parent.adapter.config.scale_of(module) if is_folded else 1.0
        delta = prune(SparseB(b.shape, b.indices, b.values.double() * scale), options, f"{parent.digest}|{module}")
        deltas.append(placed(delta, rank, columns[parent.adapter.basis].start))
    return combine(deltas, [parent.weight for parent in having], options)


def _check_finite(modules: Mapping[str, SparseB], values: ValueType) -> None:
    if bad := [module for module, b in modules.items() if not b.values.isfinite().all()]:
        raise AdapterError(f"the merge has values that are not finite in {values}, in {', '.join(bad)}: expected lower weights")


def _basis(parents: Sequence[_Parent], columns: Mapping[str, Columns], shapes: Mapping[str, tuple[int, int]]) -> Basis:
    """Return the basis of the merge: the adapters' own, or an explicit one with the A's of all of theirs."""
    bases = dict.fromkeys(parent.adapter.basis for parent in parents)
    if len(bases) == 1:
        return parents[0].adapter.basis
    drawn = {
        module: [basis.draw(module, len(own), shapes[module][1]) for basis, own in columns[module].items()] for module in shapes
    }
    return Explicit.of({module: torch.cat(parts) for module, parts in drawn.items()})


def _alpha(parents: Sequence[_Parent], module: str, rank: int, is_folded: bool) -> float:
    """Return alpha of `module` in the merge: of an adapter that has its rank, so that alpha / r is the same to a bit."""
    if is_folded:
        return float(rank)
    config = next(t.adapter.config for t in _having(parents, module) if t.adapter.modules[module].shape[1] == rank)
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
    record = [{"name": t.adapter.name, "version": t.digest[:NUM_VERSION_DIGITS], "weight": t.weight} for t in parents]
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
    """Return the templates that all were trained on, as the first prefers them."""
    first, *rest = (parent.adapter.config.lori.templates for parent in parents)
    if common := [template for template in first if all(template in other for other in rest)]:
        return common
    found = "; ".join(f"{parent.adapter.name}: {', '.join(parent.adapter.config.lori.templates)}" for parent in parents)
    raise AdapterError(f"these adapters were trained on no common template ({found}): say which the merge is for")
