"""What the engine keeps of a sequence to tell its client: text, log-probabilities, and when the answer is over."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from server.engine.request import DoneEvent, Event, FinishReason, Sequence, TextEvent, TokenLogprob
from server.engine.stopwatch import Stopwatch
from server.engine.text import TextStream, token_text

Emit = Callable[[Event], None]
Score = tuple[float, Mapping[int, float]]
"""A token's log-probability, and those of the likeliest ones."""


@dataclass(slots=True)
class Reply:
    """One sequence's answer as it comes. It hears of every token and says what to tell."""

    sequence: Sequence
    emit: Emit
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    stopwatch: Stopwatch
    text: TextStream = field(init=False)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _num_scored: int = 0
    _has_begun: bool = False

    def __post_init__(self) -> None:
        request = self.sequence.request
        self.text = TextStream(
            self.tokenizer,
            request.prompt_ids,
            request.stop,
            request.sampling.min_tokens,
            include_stop=request.include_stop,
        )

    def prompt_logprobs(self, start: int, scores: Items[Score]) -> list[TokenLogprob]:
        """Returns what is told of the prompt's tokens from `start` on, but of those that were noted before."""
        request = self.sequence.request
        found: list[tuple[int, float | None, Mapping[int, float]]] = [(0, None, {})]  # which nothing predicts
        found += [(place, value, top) for place, (value, top) in enumerate(scores, start)]
        ids, offsets, num_known = request.prompt_ids, request.prompt_offsets, self._num_scored
        return [self._logprob(ids[place], offsets[place], value, top) for place, value, top in found if place >= num_known]

    def note_prompt(self, logprobs: Items[TokenLogprob]) -> None:
        """Notes what comes next of the prompt's tokens; all choices of a request share it."""
        self._logprobs += logprobs
        self._num_scored += len(logprobs)

    def begin(self) -> None:
        """Tells the prompt, where it is to be echoed, and the scores of what was computed of it; the prompt once."""
        text = self.sequence.request.prompt_text if self.sequence.request.echo and not self._has_begun else ""
        self._has_begun = True
        if text or self._logprobs:
            self._tell(text, is_prompt=True)

    def take(self, token: int, score: Score | None) -> FinishReason | None:
        """Tells the text that the sequence's next token, already among its own, makes sure; returns why it is over, if it is."""
        request = self.sequence.request
        self.stopwatch.note_token()
        if score is not None:
            offset = (len(request.prompt_text) if request.echo else 0) + self.text.num_characters
            few = dict([*score[1].items()][: request.num_logprobs])
            self._logprobs.append(self._logprob(token, offset, score[0], few))
        if token in self.stop_ids and not request.ignore_eos:
            return "stop"
        # Told even where no text is sure yet: a client sees that it goes on.
        self._tell(self.text.push(token), is_prompt=False)
        if self.text.is_stopped:
            return "stop_sequence"
        return "length" if len(self.sequence.output_ids) == request.max_tokens else None

    def end(self, reason: FinishReason) -> None:
        """Tells what is left, and that the answer is over."""
        sequence = self.sequence
        text = "" if reason == "cancelled" else self.text.flush()
        if text or self._logprobs:
            self._tell(text, is_prompt=not sequence.output_ids)
        num_prompt = len(sequence.request.prompt_ids)
        num_output, timings = len(sequence.output_ids), self.stopwatch.stop()
        self.emit(DoneEvent(reason, num_prompt, num_output, sequence.choice, sequence.num_cached, timings))

    def _tell(self, text: str, is_prompt: bool) -> None:
        self.emit(TextEvent(text, tuple(self._logprobs), is_prompt, self.sequence.choice))
        self._logprobs.clear()

    def _logprob(self, token: int, offset: int, value: float | None, top: Mapping[int, float]) -> TokenLogprob:
        alike: dict[str, float] = {}
        for other, score in top.items():  # the likeliest first: of tokens that look the same it stays
            alike.setdefault(token_text(self.tokenizer, other), score)
        return TokenLogprob(token_text(self.tokenizer, token), offset, value, alike)
