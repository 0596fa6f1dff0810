"""The account of one admitted request, from its events: the source of its metrics, log line and span."""

import time
from dataclasses import dataclass, field

from server.engine.request import DoneEvent, ErrorEvent, Event, Request, TextEvent, Timings
from server.telemetry.metrics import Metrics


@dataclass(slots=True)
class _Tokens:
    # Times of one choice's tokens.
    last: float
    count: int = 1
    gap: float | None = None


@dataclass(slots=True)
class Account:
    """The account of one admitted request. It begins with the request; `close` ends it, however the request ended."""

    request: Request
    metrics: Metrics
    keeps_text: bool = False
    """Whether the answer's text is kept for the log."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    reason: str = "cancelled"
    """The finish reason of the last choice that ended, or the reason why none did."""
    first_token_s: float | None = None
    total_s: float = 0.0
    timings: Timings | None = None
    """The timings of the first choice that ended."""
    texts: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _choices: dict[int, _Tokens] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The adapters of the request, and those that the operator adds to it."""
        return [term.name for term in (*self.request.terms, *self.request.policy)]

    def record(self, event: Event) -> None:
        """Record an event of the engine."""
        match event:
            case TextEvent():
                if self.keeps_text:
                    self.texts.append(event.text)
                if not event.is_prompt:
                    self._note_token(event.choice, time.monotonic())
            case DoneEvent():
                self._end_choice(event)
            case ErrorEvent():
                self.reason = "error"

    def close(self) -> None:
        """Update the metrics. Choices that did not end count with the tokens that came."""
        self.total_s = time.monotonic() - self._started
        if self._choices:
            self.num_prompt_tokens = len(self.request.prompt_ids)
            self.num_completion_tokens += sum(tokens.count for tokens in self._choices.values())
        self.metrics.count_tokens(self.names, self.num_prompt_tokens, self.num_completion_tokens)
        self.metrics.count_ended(self.reason, self.total_s)

    def _note_token(self, choice: int, now: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now - self._started
            self.metrics.first_token.observe(self.first_token_s)
        tokens = self._choices.get(choice)
        if tokens is None:
            self._choices[choice] = _Tokens(now)
            return
        if tokens.gap is not None:
            self.metrics.token_gap.observe(tokens.gap)
        tokens.last, tokens.count, tokens.gap = now, tokens.count + 1, now - tokens.last

    def _end_choice(self, event: DoneEvent) -> None:
        # The last text may be held-back text and no token. So each gap is only observed with the next text.
        tokens = self._choices.pop(event.choice, None)
        if tokens and tokens.gap is not None and tokens.count <= event.num_completion_tokens:
            self.metrics.token_gap.observe(tokens.gap)
        self.reason = event.finish_reason
        self.num_prompt_tokens = event.num_prompt_tokens  # all choices share one prompt
        self.num_completion_tokens += event.num_completion_tokens
        self.timings = self.timings or event.timings
        self.metrics.observe_timings(event.timings)
