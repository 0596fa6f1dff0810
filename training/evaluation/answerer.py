"""Who is measured: whatever continues prompts and scores texts. A running server and a loaded model are two of that kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lori.errors import LoriError
from lori.template import Message, Template

Prompt = str | Sequence[Message]


class AnswerError(LoriError):
    """A prompt cannot be answered, or nobody answers."""


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """What a text is worth: the sum of its tokens' natural log-probabilities, and how many tokens it has."""

    total: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's text, and whether the model ended it itself."""

    text: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are made."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    """An answer goes up to the first of these, without it."""
    num_answers: int = 1
    """To each prompt."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0


class Answerer(Protocol):
    """Continues prompts and scores texts. Results are in the order of what was asked; raises `AnswerError`."""

    @property
    def template(self) -> Template:
        """How prompts and completions are written."""

    def complete(self, prompts: Sequence[Prompt], how: Sampling) -> list[list[str]]:
        """Return the answers to each prompt. The same seed gives the same ones to the same prompts, from the same answerer."""

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """Return how likely each completion is after its prompt, which must not be empty, written as in training.

        The tokens that end in the completion count: those of the text as a whole, which may differ from the completion's own. One
        may begin in the prompt, where that ends in a space.
        """
