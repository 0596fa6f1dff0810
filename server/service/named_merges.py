"""The named merges of a server (`lori.named_merge`): requests that name one get its adapters with its weights."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lori.errors import AdapterError
from lori.merge_options import MAX_ADAPTERS, MAX_WEIGHT
from lori.named_merge import NamedMerge, read_named_merges, repeated
from server.engine.adapters.registry import MayUse
from server.engine.generate_request import GenerateRequest, RefusedError
from server.engine.request import RequestedWeight
from server.errors import IncompleteMergeError

logger = logging.getLogger(__name__)


def read_merges(folder: Path, base_digest: str, base_names: Collection[str]) -> Mapping[str, NamedMerge]:
    """Return the named merges in a server's folder.

    Raises `AdapterError` if a file is unsound, or if a merge has one of the base's names; `OSError` if the folder cannot be read.
    """
    merges = read_named_merges(folder, base_digest)
    if taken := sorted(merges.keys() & base_names):
        raise AdapterError(f"--merges has {', '.join(taken)}, which is also the name of the base: rename the file")
    return merges


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter of a request whose merges were replaced by their adapters."""

    reference: str
    weight: RequestedWeight
    block_weights: tuple[float, ...] = ()
    merge: str = ""
    """Name of the merge that it comes from; empty if the request named the adapter itself."""


@dataclass(slots=True)
class NamedMerges:
    """The named merges of a server. An adapter of the same name takes precedence.

    A merge is visible only to callers who may use all of its adapters. Thread-safe.
    """

    by_name: Mapping[str, NamedMerge] = field(default_factory=dict)
    """Replaced, never mutated: other threads read it."""
    is_adapter: Callable[[str], bool] = lambda _: False
    """Whether an adapter has this name."""
    is_registered: Callable[[str], bool] = lambda _: True
    """Whether there is an adapter of this reference `name@version` that is not damaged."""
    _hidden: set[str] = field(default_factory=set, init=False)
    """Merges of which the log has said that an adapter has their name."""

    def usable(self, may_use: MayUse) -> Mapping[str, NamedMerge]:
        """Return the merges that a caller may use, sorted by name."""
        return {name: merge for name in sorted(self.by_name) if (merge := self.find(name, may_use))}

    def complete(self, may_use: MayUse) -> Mapping[str, NamedMerge]:
        """Return the merges that a caller may use and whose adapters are all there, sorted by name."""
        return {name: merge for name, merge in self.usable(may_use).items() if not self.missing(merge)}

    def find(self, name: str, may_use: MayUse) -> NamedMerge | None:
        """Return the merge that a name means for a caller, or None."""
        merge = self.by_name.get(name)
        if merge is None or not all(may_use(adapter.name) for adapter in merge.adapters):
            return None
        if not self.is_adapter(name):
            return merge
        if name not in self._hidden:
            logger.warning("the merge %r cannot be requested: an adapter has its name", name)
            self._hidden.add(name)
        return None

    def missing(self, merge: NamedMerge) -> list[str]:
        """Return the references of a merge's adapters that are not there, or damaged."""
        return [adapter.reference for adapter in merge.adapters if not self.is_registered(adapter.reference)]

    def check_complete(self, name: str, merge: NamedMerge) -> None:
        """Raise `IncompleteMergeError` if an adapter of the merge `name` is not there."""
        if missing := self.missing(merge):
            raise IncompleteMergeError(name, missing)

    def references(self, names: Sequence[str], may_use: MayUse) -> list[str]:
        """Return the references of the adapters that `names` mean, each merge replaced by its adapters.

        Raises `IncompleteMergeError`.
        """
        merges = self._merges_among(names, may_use)
        return [part.reference for name in names for part in _parts(name, 1.0, merges.get(name))]

    def resolve_all(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """Return the requests as `resolve` does. One body's prompts, of which there may be hundreds, have the same adapters."""
        first = self.resolve(requests[0])
        same = (requests[0].adapters, requests[0].weights, requests[0].merge)
        return [
            replace(
                request,
                adapters=first.adapters,
                weights=first.weights,
                block_weights=first.block_weights,
                merge_of_adapter=first.merge_of_adapter,
            )
            if (request.adapters, request.weights, request.merge) == same
            else self.resolve(request)
            for request in requests
        ]

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request with each merge replaced by its adapters.

        Their weights are the merge's times the request's weight for the merge. Raises `IncompleteMergeError`; `RefusedError` if
        the request names a merge and has another method than `linear`, an automatic weight for a merge, no weights beside other
        adapters, too many adapters in all, or too large a weight.
        """
        merges = self._merges_among(request.adapters, request.may_use)
        if not merges:
            return request
        factors = _checked_factors(request, merges)
        named = zip(request.adapters, factors, strict=True)
        parts = [part for name, factor in named for part in _parts(name, factor, merges.get(name))]
        _check_parts(request, parts)
        block_weights = tuple(part.block_weights for part in parts)
        return replace(
            request,
            adapters=tuple(part.reference for part in parts),
            weights=tuple(part.weight for part in parts),
            block_weights=block_weights if any(block_weights) else (),
            merge_of_adapter=tuple(part.merge for part in parts),
        )

    def _merges_among(self, names: Sequence[str], may_use: MayUse) -> dict[str, NamedMerge]:
        """Return the merges among `names`. Raises `IncompleteMergeError`."""
        merges = {name: merge for name in names if (merge := self.find(name, may_use))}
        for name, merge in merges.items():
            self.check_complete(name, merge)
        return merges


def _checked_factors(request: GenerateRequest, merges: Mapping[str, NamedMerge]) -> Sequence[RequestedWeight]:
    """Return the weight of each name of a request that names `merges`. Raises `RefusedError`."""
    names, weights, name = request.adapters, request.weights, next(iter(merges))
    if request.merge.method != "linear":
        raise RefusedError("merge", f"is {request.merge.method!r} with {name!r}, which is a sum; expected 'linear'")
    expected = "none, or a number" if len(names) == 1 else f"a number for {name!r}, and a number or 'auto' for each other"
    if weights == "auto":
        raise RefusedError(
            request.weights_field, f"asks for 'auto' with {name!r}, which has weights of its own; expected {expected}"
        )
    if weights is None and len(names) > 1:
        message = f"{name!r} is a merge beside other adapters, and needs a weight: expected {expected}"
        raise RefusedError(request.weights_field, message)
    if duplicates := repeated(names):
        raise RefusedError("adapter", f"names {duplicates[0]!r} twice, expected each adapter once")
    factors: Sequence[RequestedWeight] = (1.0,) if weights is None else weights
    if len(factors) != len(names):
        raise RefusedError(request.weights_field, f"has {len(factors)} weights, expected {len(names)}, one for each name")
    for name, factor in zip(names, factors, strict=True):
        if factor == "auto" and name in merges:
            message = f"asks for 'auto' for {name!r}, which has weights of its own; expected a number"
            raise RefusedError(request.weights_field, message)
    return factors


def _parts(name: str, factor: RequestedWeight, merge: NamedMerge | None) -> Sequence[_Part]:
    """Return the adapters that `name` means, with `factor` times their weights: itself if it is no merge."""
    if merge is None or factor == "auto":
        return [_Part(name, factor)]
    parts = []
    for adapter in merge.adapters:
        weight = factor * adapter.weight
        parts.append(_Part(adapter.reference, weight, tuple(adapter.block_weights) if weight else (), name))
    return parts


def _check_parts(request: GenerateRequest, parts: Sequence[_Part]) -> None:
    if len(parts) > MAX_ADAPTERS:
        raise RefusedError("adapter", f"names {len(parts)} adapters with those of merges, expected at most {MAX_ADAPTERS}")
    for part in parts:
        largest = 0.0 if part.weight == "auto" else max((part.weight * block for block in part.block_weights or (1.0,)), key=abs)
        if abs(largest) > MAX_WEIGHT:
            limits = f"expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            scope = " in a block of layers" if part.block_weights else ""
            raise RefusedError(request.weights_field, f"gives {part.reference} the weight {largest:g}{scope}, {limits}")
