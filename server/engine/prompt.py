"""A prompt as the engine takes it: its text, its tokens, and where each begins."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from lori.template import Message
from server.engine.text import TextStream


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt whose tokens the client names."""

    ids: tuple[int, ...]


Prompt = str | Sequence[Message] | TokenPrompt
"""Text as it stands, a conversation, or tokens."""


def size_of(prompt: Prompt) -> int:
    """Return how much there is of a prompt, in characters or tokens."""
    if isinstance(prompt, str | TokenPrompt):
        return len(prompt if isinstance(prompt, str) else prompt.ids)
    return sum(len(message.content) for message in prompt)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Returns the text of tokens, special ones left out, and where in it each of them begins, in characters."""
    stream, offsets, pieces = TextStream(tokenizer, ()), [], []
    for token in ids:
        offsets.append(stream.num_characters)
        pieces.append(stream.push(token))
    # The last may be half a character, which waits for what never comes.
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    sure = "".join(pieces)
    return sure + text[len(sure) :] if text.startswith(sure) else sure, tuple(offsets)
