"""A bound on a prompt's text that is checked before all of it is tokenized: 1 MiB takes seconds, to be found too long.

Runs in any thread. While a piece is tokenized other threads run Python; freeing what was found takes 0.1 ms for 1000 tokens.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

MAX_PIECE = 65536
"""Characters that are tokenized at a time, to count their tokens."""
PIECE_PER_TOKEN = 5
"""The same, for each token of the bound: a little more than English has."""
MAX_ADDED = 64
"""Tokens that a text has more, at most, where it was cut into two pieces: a token of so many characters becomes some ten."""
LOSSLESS = frozenset({"ByteLevel", "Digits", "Split"})
"""Pre-tokenizers that keep every byte, but for a Split that removes what it finds."""


class TextBound:
    """Texts that may have at most `max_tokens` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer, self.max_tokens = tokenizer, max_tokens
        longest, self._dropped = longest_token(tokenizer), dropped_bytes(tokenizer)
        self.max_bytes = None if longest is None else longest * max_tokens
        """None where a token can stand for any number of bytes."""
        self._num_at_once = min(PIECE_PER_TOKEN * max_tokens, MAX_PIECE)

    def fault(self, text: str) -> str | None:
        """Return what is wrong with a text that surely has more tokens; None where it may have fewer, or not many more."""
        if self.max_bytes is not None and (num_bytes := self._num_bytes(text)) > self.max_bytes:
            return f"has {num_bytes} bytes, which are more than {self.max_tokens} tokens hold"
        if len(text) <= self._num_at_once:
            return None
        num_tokens = 0
        for start in range(0, len(text), self._num_at_once):
            num_tokens += self._count(text[start : start + self._num_at_once]) - MAX_ADDED
            if num_tokens > self.max_tokens:
                return f"has more than {self.max_tokens} tokens"
        return None

    def _num_bytes(self, text: str) -> int:
        content = text.encode()
        return len(content.translate(None, self._dropped)) if self._dropped else len(content)

    def _count(self, piece: str) -> int:
        # As a batch of one: see `lori.template.encode`.
        [encoding] = self._tokenizer.encode_batch([piece], add_special_tokens=False)
        return len(encoding)


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Return the most bytes of text that one token stands for; None where that cannot be known.

    It is known of byte-level BPE, where every byte of a text is in one token, but for `dropped_bytes`: no normalizer, nothing
    unknown, nothing left out.
    """
    added = [*tokenizer.get_added_tokens_decoder().values()]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    is_lossless = (
        isinstance(tokenizer.model, BPE)
        and tokenizer.normalizer is None
        and _keeps_bytes(tokenizer.pre_tokenizer)
        and not any(token.lstrip or token.rstrip for token in added)
    )
    # In the vocabulary a byte is a character.
    return max([*map(len, vocabulary), *(len(token.content.encode()) for token in added)]) if is_lossless else None


def dropped_bytes(tokenizer: Tokenizer) -> bytes:
    """Return the bytes that byte-level BPE leaves out, since its vocabulary lacks them: rare control characters, for one."""
    # As in GPT-2: a printable byte stands for itself, and each other one, in order, for a character from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return bytes(byte for byte, character in enumerate(characters) if character not in vocabulary)


def _keeps_bytes(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = [*_parts(json.loads(pre_tokenizer.__getstate__()))]
    kinds = {part["type"] for part in parts}
    return "ByteLevel" in kinds and kinds <= LOSSLESS and all(part.get("behavior") != "Removed" for part in parts)


def _parts(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if description["type"] != "Sequence":
        yield description
    for part in description.get("pretokenizers", ()):
        yield from _parts(part)
