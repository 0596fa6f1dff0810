"""Text from tokens: incremental detokenization, stop strings, and a bound on a prompt's text.

The bound is checked before the whole text is tokenized: tokenizing 1 MiB takes seconds. It runs in any thread. Other threads run
Python while a piece is tokenized.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE


def beginning(text: str, stop: str, start: int) -> int:
    """Return the first place from `start` on where `text` has all of `stop`, or ends inside it; else the text's length."""
    while 0 <= start < len(text):
        if stop.startswith(text[start : start + len(stop)]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)


class StopStrings:
    """Gives a text on, but for what may be the beginning of a stop string. `is_met` once a whole one was found.

    A place is tried once a stop string, however long the text and the stop strings are.
    """

    def __init__(self, stops: tuple[str, ...], is_included: bool = False) -> None:
        """With `is_included` the text ends after the stop string that was found, else before it."""
        self._stops, self._is_included = stops, is_included
        self._initials = frozenset(stop[0] for stop in stops)
        self._waiting = ""
        self._starts = [0] * len(stops)
        """Before these places of `_waiting` the stop strings were tried, and are not."""
        self.is_met = False

    def push(self, piece: str, can_stop: bool = True) -> str:
        """Take the next piece and return the text that is now sure: up to the first stop string that ends in the piece.

        Without `can_stop`, what ends in this piece is text like any other.
        """
        if not self._waiting and self._initials.isdisjoint(piece):
            return piece
        text = self._waiting + piece
        self._starts = [self._next(text, i, can_stop) for i in range(len(self._stops))]
        places = zip(self._stops, self._starts, strict=True)
        if met := [(start, start + len(stop)) for stop, start in places if start + len(stop) <= len(text)]:
            self.is_met, self._waiting = True, ""
            return text[: min(met)[self._is_included]]
        sure = min(self._starts)
        self._waiting, self._starts = text[sure:], [start - sure for start in self._starts]
        return text[:sure]

    def flush(self) -> str:
        """Return the text that waited, at the end."""
        text, self._waiting = self._waiting, ""
        self._starts = [0] * len(self._stops)
        return text

    def _next(self, text: str, place: int, can_stop: bool) -> int:
        stop = self._stops[place]
        start = beginning(text, stop, self._starts[place])
        while not can_stop and start + len(stop) <= len(text):
            start = beginning(text, stop, start + 1)
        return start


HALF_CHARACTER = "\ufffd"
NUM_CONTEXT = 8
"""Tokens before a new one that its text may depend on."""
MAX_WAITING = 64
"""Tokens that wait at most for the end of a character. None has more than four bytes, so then they are no character; it is so
many for tokenizers that decode bytes in a row all or none."""


@lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that are no text."""
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token by itself, also of one that is no text."""
    return tokenizer.decode([token], skip_special_tokens=False)


class TextStream:
    """The text of one sequence's output. `is_stopped` once a stop string was met; text from it on is never given out, nor the
    stop string, but with `include_stop`.

    A stop string that is complete before there are `min_tokens` tokens is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: tuple[int, ...],
        stops: tuple[str, ...] = (),
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
    ) -> None:
        self._tokenizer, self._special = tokenizer, special_ids(tokenizer)
        self._stops, self._num_missing = StopStrings(stops, include_stop), min_tokens
        # A token's text may depend on those before it, so these are decoded again beside it; their text is `_known`.
        self._window = list(prompt_ids[-NUM_CONTEXT:])
        while self._text().startswith(HALF_CHARACTER):
            del self._window[0]  # The context began inside a character.
        self._known, self._num_old = self._text(), len(self._window)
        self.num_characters = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.is_met

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now sure."""
        self._num_missing -= 1
        piece = self._decode(token)
        self.num_characters += len(piece)
        return self._stops.push(piece, can_stop=self._num_missing <= 0)

    def flush(self) -> str:
        """Return the text that waited for a stop string, at the end."""
        return self._stops.flush()

    def _decode(self, token: int) -> str:
        if token in self._special:
            return ""
        self._window.append(token)
        text = self._text()
        is_half, is_late = text.endswith(HALF_CHARACTER), len(self._window) - self._num_old >= MAX_WAITING
        # Of what is no character only the last may yet become one.
        sure = text[:-1] if is_half and is_late else text.rstrip(HALF_CHARACTER)
        piece = sure[len(self._known) :]
        if piece:
            self._known = sure
        if piece and not is_half:
            self._forget(self._num_old, is_half)
        elif is_late:
            self._forget(len(self._window) - NUM_CONTEXT, is_half)
        return piece

    def _forget(self, num_tokens: int, is_half: bool) -> None:
        del self._window[:num_tokens]
        text = self._text()
        self._known, self._num_old = text[: len(text) - is_half], len(self._window)

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)


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
