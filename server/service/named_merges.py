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

logger = logging.getLogger(__name__)


def read_merges(folder: Path, base_digest: str, base_names: Collection[str]) -> Mapping[str, NamedMerge]:
    """Return the named merges in a server's folder.

    Raises `AdapterError` if a file is unsound, or if a merge has one of the base's names; `OSError` if the folder cannot be read.
    """
    merges = read_named_merges(folder, base_digest)
    if taken := sorted(merges.keys() & base_names):
        raise AdapterError(f"--merges has {', '.join(taken)}, which is also the name of the base: rename the file")
    return merges


@dataclass(slots=True)
class NamedMerges:
    """The named merges of a server. An adapter of the same name takes precedence.

    A merge is visible only to callers who may use all of its adapters. Thread-safe.
    """

    by_name: Mapping[str, NamedMerge] = field(default_factory=dict)
    """Replaced, never mutated: other threads read it."""
    is_adapter: Callable[[str], bool] = lambda _: False
    """Whether an adapter has this name."""
    _hidden: set[str] = field(default_factory=set, init=False)
    """Merges of which the log has said that an adapter has their name."""

    def usable(self, may_use: MayUse) -> Mapping[str, NamedMerge]:
        """Return the merges that a caller may use, sorted by name."""
        return {name: merge for name in sorted(self.by_name) if (merge := self.find(name, may_use))}

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

    def references(self, names: Sequence[str], may_use: MayUse) -> list[str]:
        """Return the references of the adapters that `names` mean, each merge replaced by its adapters."""
        return [reference for name in names for reference, *_ in self._terms(name, may_use)]

    def resolve_all(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """Return the requests as `resolve` does. One body's prompts, of which there may be hundreds, have the same adapters."""
        first = self.resolve(requests[0])
        same = (requests[0].adapters, requests[0].weights, requests[0].merge)
        return [
            replace(request, adapters=first.adapters, weights=first.weights, block_weights=first.block_weights)
            if (request.adapters, request.weights, request.merge) == same
            else self.resolve(request)
            for request in requests
        ]

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request with each merge replaced by its adapters.

        Their weights are the merge's times the request's weight for the merge. Raises `RefusedError` if the request names a merge
        and has another method than `linear`, an automatic weight for a merge, no weights beside other adapters, too many adapters
        in all, or too large a weight.
        """
        may_use, names = request.may_use, request.adapters
        name = next((name for name in names if self.find(name, may_use)), None)
        if name is None:
            return request
        if request.merge.method != "linear":
            raise RefusedError("merge", f"is {request.merge.method!r} with {name!r}, which is a sum; expected 'linear'")
        expected = "none, or a number" if len(names) == 1 else f"a number for {name!r}, and a number or 'auto' for each other"
        if request.weights == "auto":
            raise RefusedError(
                request.weights_field, f"asks for 'auto' with {name!r}, which has weights of its own; expected {expected}"
            )
        if request.weights is None and len(names) > 1:
            raise RefusedError("weights", f"{name!r} is a merge beside other adapters, and needs a weight: expected {expected}")
        if duplicates := repeated(names):
            raise RefusedError("adapter", f"names {duplicates[0]!r} twice, expected each adapter once")
        factors = (1.0,) if request.weights is None else request.weights
        if len(factors) != len(names):
            raise RefusedError(request.weights_field, f"has {len(factors)} weights, expected {len(names)}, one for each name")
        terms: list[tuple[str, RequestedWeight, tuple[float, ...]]] = []
        for name, factor in zip(names, factors, strict=True):
            if factor != "auto":
                for reference, weight, blocks in self._terms(name, may_use):
                    terms.append((reference, factor * weight, blocks if factor * weight else ()))
            elif self.find(name, may_use):
                raise RefusedError(
                    request.weights_field, f"asks for 'auto' for {name!r}, which has weights of its own; expected a number"
                )
            else:
                terms.append((name, factor, ()))
        if len(terms) > MAX_ADAPTERS:
            raise RefusedError("adapter", f"names {len(terms)} adapters with those of merges, expected at most {MAX_ADAPTERS}")
        for reference, requested, blocks in terms:
            largest = 0.0 if requested == "auto" else max((requested * block for block in blocks or (1.0,)), key=abs)
            if abs(largest) > MAX_WEIGHT:
                limits = f"expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
                scope = " in a block of layers" if blocks else ""
                raise RefusedError(request.weights_field, f"gives {reference} the weight {largest:g}{scope}, {limits}")
        adapters, weights, block_weights = zip(*terms, strict=True)
        return replace(request, adapters=adapters, weights=weights, block_weights=block_weights if any(block_weights) else ())

    def _terms(self, name: str, may_use: MayUse) -> Sequence[tuple[str, float, tuple[float, ...]]]:
        """Return the adapters that `name` means, with their weights and block weights: itself at 1 if it is no merge."""
        if merge := self.find(name, may_use):
            return [(adapter.reference, adapter.weight, tuple(adapter.block_weights)) for adapter in merge.adapters]
        return [(name, 1.0, ())]
