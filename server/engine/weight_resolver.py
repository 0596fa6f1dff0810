"""The weights of a request's adapters at admission: given, automatic or 1/n each. No tensor, no asyncio."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lori.auto_weights import WeightQuery
from lori.errors import TemplateError
from lori.merge_options import DefaultMerge
from lori.prompt_statistics import Background, ProbedPrompt, PromptStatistics, probed_prompt
from lori.summary import Summary
from lori.template import Message
from server.engine.generate_request import GenerateRequest, Prompt, RefusedError, TokenPrompt
from server.engine.request import RequestedWeight

NO_BACKGROUND = (
    "the base has no background: make one with python -m training.background, and start the server with --background FILE"
)


class WeightResolver:
    """Resolves the weights of requests on one base. Automatic ones are not computed here: it says from what they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, background: Background | None, default_merge: DefaultMerge) -> None:
        """Without a background no weight can be automatic, so that the default is `linear`."""
        self._tokenizer, self.background = tokenizer, background
        self.default_merge: DefaultMerge = default_merge if background else "linear"

    def statistics_of(self, adapter: Summary) -> PromptStatistics | None:
        """Return the statistics by which the adapter's weight can be automatic: those of this server's background."""
        statistics, background = adapter.prompt_statistics, self.background
        return statistics if statistics and background and statistics.background_digest == background.original_digest else None

    def can_weigh(self, adapter: Summary) -> bool:
        """Return whether the adapter's weight can be automatic."""
        return self.statistics_of(adapter) is not None

    def probed_prompt(self, prompt: Prompt, field: str) -> ProbedPrompt:
        """Return the tokens of `prompt` that the probe reads. Raises `RefusedError` about `field`, which asked for 'auto'."""
        read: str | Sequence[Message] = (
            self._tokenizer.backend_tokenizer.decode(list(prompt.ids), skip_special_tokens=True)
            if isinstance(prompt, TokenPrompt)
            else prompt
        )
        try:
            return probed_prompt(self._tokenizer, read)
        except TemplateError as error:
            raise RefusedError(field, f"asks for 'auto', and {error}") from error

    def resolve(
        self, request: GenerateRequest, adapters: Sequence[Summary]
    ) -> tuple[tuple[RequestedWeight, ...], WeightQuery | None]:
        """Return the weight of each of a request's adapters, and what the automatic ones are computed from, if there are any.

        Raises `RefusedError` if the weights do not fit the adapters, or if automatic ones are asked for and are not possible.
        """
        weights = self.check(request, adapters)
        if weights is None:
            query = self._default_query(request, adapters)
            return tuple("auto" if query else 1 / len(adapters) for _ in adapters), query
        automatic = _automatic(adapters, weights)
        return weights, self._query(request, automatic) if automatic else None

    def check(self, request: GenerateRequest, adapters: Sequence[Summary]) -> tuple[RequestedWeight, ...] | None:
        """Return a request's own weights, which fit its adapters; None if it has none. Raises `RefusedError` as `resolve`."""
        requested, field = request.weights, request.weights_field
        if requested is None:
            return None
        if requested == "auto" and not adapters:
            raise RefusedError(field, "asks for 'auto' without adapters, among which it would choose")
        weights: tuple[RequestedWeight, ...] = tuple("auto" for _ in adapters) if requested == "auto" else requested
        if len(weights) != len(adapters):
            raise RefusedError(field, f"has {len(weights)} weights, expected {len(adapters)}, one for each adapter")
        if automatic := _automatic(adapters, weights):
            self._check_automatic(request, automatic)
        return weights

    def _check_automatic(self, request: GenerateRequest, adapters: Sequence[Summary]) -> None:
        field = request.weights_field
        if request.merge.method != "linear":
            raise RefusedError(field, f"asks for 'auto' with merge {request.merge.method!r}, expected 'linear'")
        if self.background is None:
            raise RefusedError(field, f"asks for 'auto', and {NO_BACKGROUND}")
        for adapter in adapters:
            if not self.can_weigh(adapter):
                state = "statistics of another background" if adapter.prompt_statistics else "no statistics"
                remedy = "python -m training.calibrate FOLDER --data ROWS makes them"
                raise RefusedError(field, f"asks for 'auto', and {adapter.name!r} has {state} of its prompts: {remedy}")

    def _default_query(self, request: GenerateRequest, adapters: Sequence[Summary]) -> WeightQuery | None:
        # A prompt that is scored holds the answers, which would be compared under different weights.
        can_default = self.default_merge == "auto" and request.merge.method == "linear" and not request.sampling.echo
        if not can_default or len(adapters) < 2 or not all(map(self.can_weigh, adapters)):
            return None
        try:
            return self._query(request, adapters)
        except RefusedError:
            return None  # the client has not asked for automatic weights, so a prompt that cannot be probed is no error

    def _query(self, request: GenerateRequest, adapters: Sequence[Summary]) -> WeightQuery:
        assert self.background is not None
        statistics = tuple(own for adapter in adapters if (own := self.statistics_of(adapter)))
        assert len(statistics) == len(adapters), "each can be weighed"
        return WeightQuery(self.probed_prompt(request.prompt, request.weights_field), self.background, statistics)


def _automatic(adapters: Sequence[Summary], weights: Sequence[RequestedWeight]) -> list[Summary]:
    return [adapter for adapter, weight in zip(adapters, weights, strict=True) if weight == "auto"]
