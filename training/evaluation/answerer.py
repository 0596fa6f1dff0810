"""The interface of a model under evaluation: it completes prompts and scores texts.

It has two implementations: a running server and a loaded model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lori.errors import LoriError
from lori.template import Message, Template

Prompt = str | Sequence[Message]


class AnswerError(LoriError):
    """A prompt that cannot be answered, or a server that does not answer."""


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """The log-likelihood of a text: the sum of its tokens' natural log-probabilities, and the number of tokens."""

    total: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer. `is_whole`: the model ended it by itself, before `max_tokens`."""

    text: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling options of a completion."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    """Stop strings. An answer ends before the first of them."""
    num_answers: int = 1
    """Number of answers to each prompt."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0


class Answerer(Protocol):
    """A model that completes prompts and scores texts. Results are in the order of the inputs. Methods raise `AnswerError`."""

    @property
    def template(self) -> Template:
        """The template that formats prompts and completions."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[str]]:
        """Return the answers to each prompt. The same prompts and seed give the same answers from the same answerer."""

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """Return the log-likelihood of each completion after its prompt, formatted as in training. A prompt must not be empty.

        Prompt and completion are tokenized as one text, and the tokens that end in the completion count. They may differ from the
        tokens of the completion alone. The first of them may begin in the prompt if the prompt ends in a space.
        """
