"""Automatic weights at admission: which weights of a request come from its prompt, and what they are computed from."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lori.auto_weights import WeightQuery
from lori.errors import TemplateError
from lori.prompt_statistics import Background, ProbedPrompt, probed_prompt
from lori.summary import Summary
from lori.template import Message
from server.engine.generate_request import GenerateRequest, Prompt, RefusedError, TokenPrompt

NO_BACKGROUND = (
    "the base has no background: make one with python -m training.background, and start the server with --background FILE"
)


class AutomaticWeights:
    """The rules of automatic weights on one base."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, background: Background | None, *, is_default: bool) -> None:
        """Without a background no weight is automatic. With `is_default` several adapters without weights get them."""
        self._tokenizer, self._background, self._is_default = tokenizer, background, is_default

    def can_weigh(self, adapter: Summary) -> bool:
        """Return whether the adapter's weight can be automatic: its statistics are of this server's background."""
        statistics, background = adapter.prompt_statistics, self._background
        return statistics is not None and background is not None and statistics.background_digest == background.digest

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
            raise RefusedError(field, f"is 'auto', and {error}") from error

    def query(self, request: GenerateRequest, adapters: Sequence[Summary]) -> WeightQuery | None:
        """Return what the automatic weights of a request are computed from; None if none of its weights is automatic.

        Raises `RefusedError` if the client asks for automatic weights that are not possible.
        """
        if request.weights == "auto":
            self._check(request, adapters)
        elif request.weights is not None or not self._is_default_of(request, adapters):
            return None
        assert self._background is not None
        statistics = tuple(one.prompt_statistics for one in adapters if one.prompt_statistics)
        try:
            return WeightQuery(self.probed_prompt(request.prompt, "weights"), self._background, statistics)
        except RefusedError:
            if request.weights == "auto":
                raise
            return None  # the client has not asked for automatic weights, so a prompt that cannot be probed is no error

    def _is_default_of(self, request: GenerateRequest, adapters: Sequence[Summary]) -> bool:
        # A prompt that is scored holds the answers, which would be compared under different weights.
        can_default = self._is_default and request.merge.method == "linear" and not request.sampling.echo
        return can_default and len(adapters) > 1 and all(map(self.can_weigh, adapters))

    def _check(self, request: GenerateRequest, adapters: Sequence[Summary]) -> None:
        if not adapters:
            raise RefusedError("weights", "is 'auto' without adapters, among which it would choose")
        if request.merge.method != "linear":
            raise RefusedError("weights", f"is 'auto' with merge {request.merge.method!r}, expected 'linear'")
        if self._background is None:
            raise RefusedError("weights", f"is 'auto', and {NO_BACKGROUND}")
        for adapter in adapters:
            if not self.can_weigh(adapter):
                state = "statistics of another background" if adapter.prompt_statistics else "no statistics"
                remedy = "python -m training.calibrate FOLDER --data ROWS makes them"
                raise RefusedError("weights", f"is 'auto', and {adapter.name!r} has {state} of its prompts: {remedy}")
