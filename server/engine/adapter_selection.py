"""Selection of adapters by the server, for requests that name `auto`: those whose prompts the request's prompt is most like.

Plain values and numpy: no tensor, no asyncio. See `lori.auto_weights`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np

from lori.auto_weights import Selection, SelectionIndex, SelectionQuery
from lori.flat_index import BoolArray
from lori.names import AUTO
from lori.prompt_statistics import Background, PromptStatistics
from lori.summary import Summary
from server.engine.adapters.registry import MAX_CALLERS, MayUse, Registered, Registry, candidates, clashes
from server.engine.admission import Admission
from server.engine.generate_request import GenerateRequest, RefusedError, TokenPrompt, checked_timeout_s
from server.engine.weight_resolver import NO_BACKGROUND

NONE_SELECTABLE = (
    f"is {AUTO!r}, and none of your adapters that could be selected has statistics of its prompts on this server's background"
)


@dataclass(frozen=True, slots=True)
class _View:
    """The adapters that one caller may use, by their places in the index."""

    adapters: Sequence[Summary | None]
    """Each adapter under a name that the caller may use; None if there is none."""
    allowed: BoolArray


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The adapters of the registry at one time. An adapter with several names has one place in the index."""

    by_name: Mapping[str, Registered]
    index: SelectionIndex
    adapters: Sequence[Sequence[Registered]]
    """For each place the adapter under each of its names, its own name first. Aliases come after all own names."""
    views: dict[MayUse, _View] = field(default_factory=dict)

    def view(self, may_use: MayUse) -> _View:
        """Return the adapters that may be selected for a caller: one version of each."""
        view = self.views.get(may_use)
        if view is None:
            adapters: list[Summary | None] = []
            owners: set[str] = set()
            for named in self.adapters:
                adapter = next((a for a in named if a.owner not in owners and may_use(a.summary.name)), None)
                owners |= {adapter.owner} if adapter else set()
                adapters.append(adapter.summary if adapter else None)
            view = _View(adapters, np.array([adapter is not None for adapter in adapters], dtype=bool))
            if len(self.views) >= MAX_CALLERS:
                self.views.clear()
            self.views[may_use] = view
        return view

    def allowed(self, view: _View, policy: Sequence[Registered]) -> BoolArray:
        """Return which adapters may be selected: those of `view` without any version of those of the operator's `policy`."""
        if not policy:
            return view.allowed
        is_free = [not any(clashes(one, policy) for one in same) for same in self.adapters]
        allowed: BoolArray = view.allowed & np.array(is_free, dtype=bool)
        return allowed


def _snapshot(
    by_name: Mapping[str, Registered], background: Background, statistics_of: Callable[[Summary], PromptStatistics | None]
) -> _Snapshot:
    """Return a snapshot of the adapters that have statistics of this background."""
    by_digest: dict[str, list[Registered]] = {}
    statistics: dict[str, PromptStatistics] = {}
    for adapter in sorted(by_name.values(), key=lambda one: (one.summary.name != one.owner, one.summary.name)):
        if own := statistics_of(adapter.summary):
            by_digest.setdefault(adapter.summary.digest, []).append(adapter)
            statistics.setdefault(adapter.summary.digest, own)
    return _Snapshot(by_name, SelectionIndex(background, [*statistics.values()]), [*by_digest.values()])


@dataclass(frozen=True, slots=True)
class PendingSelection:
    """A request for `auto`, and the query that its prompt has to answer."""

    request: GenerateRequest
    query: SelectionQuery
    adapters: Sequence[Summary | None]
    """For each place of the index the adapter under a name that the caller may use."""
    policy: Sequence[tuple[Summary, float]]
    """The operator's adapters, with their weights."""
    timeout_s: float | None


class AdapterSelector:
    """Selects among the registered adapters that have statistics of the server's background. Thread-safe."""

    def __init__(
        self, registry: Registry, admission: Admission, background: Background, max_adapters: int, threshold: float
    ) -> None:
        """The base answers alone if the selected adapters have less than `threshold` of the shares together."""
        self._registry, self._admission, self._background = registry, admission, background
        self._max_adapters, self._threshold = max_adapters, threshold
        self._lock = Lock()
        self._snapshot = _snapshot({}, background, admission.weights.statistics_of)

    def can_select(self, may_use: MayUse, policy: Sequence[tuple[str, float]]) -> bool:
        """Return whether there is an adapter that could be selected for a caller, beside the operator's `policy`."""
        added = [adapter for reference, _ in policy for adapter in candidates(self._registry, reference)]
        return any(
            may_use(name) and self._admission.weights.can_weigh(adapter.summary) and not clashes(adapter, added)
            for name, adapter in self._registry.by_name.items()
        )

    def check(self, request: GenerateRequest) -> None:
        """Raise `RefusedError` if every request for `auto` with these adapters, weights and merge would be refused."""
        _check_fields(request)
        if not self.can_select(request.may_use, request.policy):
            raise RefusedError("adapter", NONE_SELECTABLE)

    def prepare(self, request: GenerateRequest, *, must_be_current: bool = False) -> PendingSelection:
        """Return the query of a request for `auto`. After a change of the adapters their index is built again first.

        While another thread builds it, the old one is used, unless it `must_be_current` or has no adapter for the caller. Raises
        `RefusedError` if the request cannot be for `auto`, or no adapter could be selected for the caller.
        """
        _check_fields(request)
        timeout_s = checked_timeout_s(request)
        self._admission.check_text(request)
        snapshot = self._current(must_be_current)
        view = snapshot.view(request.may_use)
        policy = [(one, weight) for reference, weight in request.policy for one in candidates(self._registry, reference)]
        allowed = snapshot.allowed(view, [adapter for adapter, _ in policy])
        if not allowed.any():
            if not must_be_current and self.can_select(request.may_use, request.policy):  # one that the old index does not have
                return self.prepare(request, must_be_current=True)
            raise RefusedError("adapter", NONE_SELECTABLE)
        prompt = self._admission.weights.probed_prompt(request.prompt, "adapter")
        query = SelectionQuery(prompt, snapshot.index, self._max_adapters, allowed)
        return PendingSelection(request, query, view.adapters, [(one.summary, weight) for one, weight in policy], timeout_s)

    def resolve(self, pending: PendingSelection, selection: Selection) -> GenerateRequest:
        """Return the request for the selected adapters, with their shares as weights, or for the base alone.

        An adapter that cannot be in a request beside better ones is left out: there is no template for the messages that all of
        them know, or no memory for all of them. Its share is divided among the others.
        """
        kept: dict[int, Summary] = {}
        for place, index in enumerate(selection.adapters):
            adapter = pending.adapters[index]
            assert adapter is not None, "only allowed adapters are selected"
            if self._fit_together(pending, [*kept.values(), adapter]):
                kept[place] = adapter
        if not kept or 1 - selection.shares.base < self._threshold:
            return replace(pending.request, adapters=(), weights=None, base_share=1.0)
        shares = selection.shares.kept([*kept])
        names = tuple(f"{adapter.name}@{adapter.version}" for adapter in kept.values())
        return replace(pending.request, adapters=names, weights=shares.weights, base_share=shares.base)

    def _fit_together(self, pending: PendingSelection, adapters: Sequence[Summary]) -> bool:
        request = pending.request
        try:
            if request.template is None and not isinstance(request.prompt, str | TokenPrompt):
                self._admission.template_of(adapters)
            self._admission.check_merge(request, adapters, [1.0] * len(adapters), pending.policy)
        except RefusedError:
            return False
        return True

    def _current(self, must_be_current: bool) -> _Snapshot:
        # With thousands of adapters a build takes a second, in which other requests need their threads.
        if self._snapshot.by_name is self._registry.by_name:
            return self._snapshot
        if self._lock.acquire(blocking=must_be_current or not self._snapshot.by_name):
            try:
                by_name = self._registry.by_name
                if self._snapshot.by_name is not by_name:
                    self._snapshot = _snapshot(by_name, self._background, self._admission.weights.statistics_of)
            finally:
                self._lock.release()
        return self._snapshot


def is_auto(request: GenerateRequest) -> bool:
    """Return whether the server is to select the request's adapters."""
    return AUTO in request.adapters


def checked_selector(selector: AdapterSelector | None) -> AdapterSelector:
    """Return `selector`. Raises `RefusedError` if there is none, since the base has no background."""
    if selector is None:
        raise RefusedError("adapter", f"is {AUTO!r}, and {NO_BACKGROUND}")
    return selector


def _check_fields(request: GenerateRequest) -> None:
    if len(request.adapters) > 1:
        raise RefusedError("adapter", f"names {AUTO!r} and other adapters, expected {AUTO!r} alone")
    if request.weights not in (None, "auto", ("auto",)):
        expected = "expected none or 'auto': the server chooses them"
        raise RefusedError(request.weights_field, f"has the weights {[*request.weights]} for the adapter {AUTO!r}, {expected}")
    if request.merge.method != "linear":
        raise RefusedError("merge", f"is {request.merge.method!r} with the adapter {AUTO!r}, expected 'linear'")
