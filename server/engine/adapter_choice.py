"""The choice of adapters by the server: a request for `auto` gets those of all adapters whose prompts its own is most like.

Plain values and numpy: no tensor, no asyncio. See `lori.auto_weights`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np

from lori.auto_weights import AutoChoice, Choice, Mask, PromptIndex
from lori.names import AUTO
from lori.prompt_statistics import Background, PromptStatistics
from lori.summary import Summary
from server.engine.adapters.registry import MAX_CALLERS, MayUse, Registered, Registry, candidates
from server.engine.admission import Admission, GenerateRequest, RefusedError, TokenPrompt


@dataclass(frozen=True, slots=True)
class _View:
    """The adapters that one caller may use, by their places in the index."""

    adapters: Sequence[Summary | None]
    """Each adapter under a name that the caller may use; None if there is none."""
    allowed: Mask


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The adapters of the registry at one time. An adapter with several names has one place in the index."""

    by_name: Mapping[str, Registered]
    index: PromptIndex
    adapters: Sequence[Sequence[Summary]]
    """For each place the adapter under each of its names."""
    places: Mapping[str, int]
    """The place of each name and of each digest."""
    views: dict[MayUse, _View] = field(default_factory=dict)

    @classmethod
    def of(cls, by_name: Mapping[str, Registered], background: Background) -> "_Snapshot":
        by_digest: dict[str, list[Summary]] = {}
        statistics: list[PromptStatistics] = []
        # An adapter's own name comes before its aliases.
        for adapter in sorted(by_name.values(), key=lambda one: (one.summary.name != one.owner, one.summary.name)):
            own = adapter.summary.prompt_statistics
            if own and own.background_digest == background.digest:
                if adapter.summary.digest not in by_digest:
                    statistics.append(own)
                by_digest.setdefault(adapter.summary.digest, []).append(adapter.summary)
        places = {digest: place for place, digest in enumerate(by_digest)}
        places |= {one.name: place for place, same in enumerate(by_digest.values()) for one in same}
        return cls(by_name, PromptIndex(background, statistics), [*by_digest.values()], places)

    def view(self, may_use: MayUse) -> _View:
        view = self.views.get(may_use)
        if view is None:
            adapters = [next((one for one in same if may_use(one.name)), None) for same in self.adapters]
            view = _View(adapters, np.array([adapter is not None for adapter in adapters], dtype=bool))
            if len(self.views) >= MAX_CALLERS:
                self.views.clear()
            self.views[may_use] = view
        return view

    def allowed(self, view: _View, policy: Sequence[Registered]) -> Mask:
        """Return which adapters may be chosen: those of `view` without those of the operator's `policy`."""
        allowed = view.allowed.copy()
        for adapter in policy:
            for key in (*adapter.names, adapter.summary.digest):
                if key in self.places:
                    allowed[self.places[key]] = False
        return allowed


@dataclass(frozen=True, slots=True)
class Undecided:
    """A request for `auto`, and what its prompt has to decide."""

    request: GenerateRequest
    choice: AutoChoice
    adapters: Sequence[Summary | None]
    """For each place of the index the adapter under a name that the caller may use."""

    def decided(self, choice: Choice, admission: Admission) -> GenerateRequest:
        """Return the request for the chosen adapters, at their shares as weights. The base answers if there are none.

        If messages are to be written in the adapters' common template, an adapter that knows none of those that the better ones
        know is left out.
        """
        is_free = isinstance(self.request.prompt, str | TokenPrompt) or self.request.template is not None
        terms: list[tuple[Summary, float]] = []
        for place, weight in zip(choice.adapters, choice.shares.weights, strict=True):
            adapter = self.adapters[place]
            assert adapter is not None, "only allowed adapters are chosen"
            if is_free or _have_template([*(other for other, _ in terms), adapter], admission):
                terms.append((adapter, weight))
        names = tuple(f"{adapter.name}@{adapter.version}" for adapter, _ in terms)
        weights = tuple(weight for _, weight in terms)
        return replace(self.request, adapters=names, weights=weights or None, base_share=1 - sum(weights))


def _have_template(adapters: Sequence[Summary], admission: Admission) -> bool:
    try:
        admission.template_of(adapters)
    except RefusedError:
        return False
    return True


class AdapterChooser:
    """Prepares choices among the registered adapters that have statistics of the server's background. Thread-safe."""

    def __init__(
        self, registry: Registry, admission: Admission, background: Background, max_adapters: int, threshold: float
    ) -> None:
        self._registry, self._admission, self._background = registry, admission, background
        self._max_adapters, self._threshold = max_adapters, threshold
        self._lock = Lock()
        self._snapshot = _Snapshot.of({}, background)

    def prepare(self, request: GenerateRequest) -> Undecided:
        """Return the choice that a request for `auto` needs. After a change of the adapters their index is made anew first.

        Raises `RefusedError` if the request cannot be for `auto`, or there is no adapter that could be chosen for the caller.
        """
        _check(request)
        snapshot = self._current()
        view = snapshot.view(request.may_use)
        policy = [adapter for reference, _ in request.policy for adapter in candidates(self._registry, reference)]
        allowed = snapshot.allowed(view, policy)
        if not allowed.any():
            raise RefusedError("adapter", f"is {AUTO!r}, and no adapter that you may use has statistics of its prompts")
        max_adapters = min(self._max_adapters, self._admission.max_terms - len(policy))
        prompt = self._admission.probed_prompt(request.prompt, "adapter")
        return Undecided(request, AutoChoice(prompt, snapshot.index, max_adapters, self._threshold, allowed), view.adapters)

    def _current(self) -> _Snapshot:
        with self._lock:
            by_name = self._registry.by_name
            if self._snapshot.by_name is not by_name:
                self._snapshot = _Snapshot.of(by_name, self._background)
            return self._snapshot


def is_auto(request: GenerateRequest) -> bool:
    """Return whether the server is to choose the request's adapters."""
    return AUTO in request.adapters


def _check(request: GenerateRequest) -> None:
    if len(request.adapters) > 1:
        raise RefusedError("adapter", f"names {AUTO!r} beside others, expected it alone: the server chooses")
    if request.weights not in (None, "auto"):
        raise RefusedError("weights", f"is beside the adapter {AUTO!r}, whose weights come from the prompt")
    if request.merge.method != "linear":
        raise RefusedError("merge", f"is {request.merge.method!r} with the adapter {AUTO!r}, expected 'linear'")
