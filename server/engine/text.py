"""Text from tokens: incremental detokenization, stop strings, and a bound on the size of a prompt's text.

The bound is checked before the whole text is tokenized, since tokenizing 1 MiB takes seconds. The check is thread-safe. It
tokenizes piece by piece and releases the GIL during each piece.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE


def find_partial(text: str, stop: str, start: int) -> int:
    """Return the first position from `start` on where `text` contains `stop` or ends within it; else the text's length."""
    while 0 <= start < len(text):
        if stop.startswith(text[start : start + len(stop)]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)


class StopStrings:
    """A filter that passes text on, except for a tail that may be the beginning of a stop string.

    `is_met` is true once a whole stop string was found. Each position is tried once per stop string, however long the text and
    the stop strings are.
    """

    def __init__(self, stops: tuple[str, ...], is_included: bool = False) -> None:
        """With `is_included` the text ends after the stop string, else before it."""
        self._stops, self._is_included = stops, is_included
        self._initials = frozenset(stop[0] for stop in stops)
        self._pending = ""
        self._starts = [0] * len(stops)
        """For each stop string, the position in `_pending` before which no match begins."""
        self.is_met = False

    def push(self, piece: str, can_stop: bool = True) -> str:
        """Take the next piece and return the text that is now certain: up to the first stop string that ends in the piece.

        Without `can_stop`, a stop string that ends in this piece is ordinary text.
        """
        if not self._pending and self._initials.isdisjoint(piece):
            return piece
        text = self._pending + piece
        self._starts = [self._find_next(text, i, can_stop) for i in range(len(self._stops))]
        candidates = zip(self._stops, self._starts, strict=True)
        if matches := [(start, start + len(stop)) for stop, start in candidates if start + len(stop) <= len(text)]:
            self.is_met, self._pending = True, ""
            return text[: min(matches)[self._is_included]]
        safe_end = min(self._starts)
        self._pending, self._starts = text[safe_end:], [start - safe_end for start in self._starts]
        return text[:safe_end]

    def flush(self) -> str:
        """Return the text that is still held back, at the end of the output."""
        text, self._pending = self._pending, ""
        self._starts = [0] * len(self._stops)
        return text

    def _find_next(self, text: str, index: int, can_stop: bool) -> int:
        stop = self._stops[index]
        start = find_partial(text, stop, self._starts[index])
        while not can_stop and start + len(stop) <= len(text):
            start = find_partial(text, stop, start + 1)
        return start


REPLACEMENT_CHARACTER = "\ufffd"
NUM_CONTEXT = 8
"""Number of tokens before a new one that its text may depend on."""
MAX_PENDING_TOKENS = 64
"""Maximum number of tokens that wait for the end of a character. A character has at most four bytes, so longer runs are not
characters. The number is high because some tokenizers decode a run of byte tokens all or not at all."""


@lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the special tokens, which are not part of the text."""
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a single token, even of a special one."""
    return tokenizer.decode([token], skip_special_tokens=False)


class TextStream:
    """The text of one sequence's output.

    `is_stopped` is true once a stop string was met. Text after the stop string is never returned, and the stop string itself only
    with `include_stop`. A stop string that is complete before there are `min_tokens` tokens is ordinary text.
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
        self._tokenizer, self._special_ids = tokenizer, special_ids(tokenizer)
        self._stops, self._num_until_stop = StopStrings(stops, include_stop), min_tokens
        # A token's text may depend on the tokens before it, so these are decoded again with it. Their text is `_emitted_text`.
        self._window = list(prompt_ids[-NUM_CONTEXT:])
        while self._text().startswith(REPLACEMENT_CHARACTER):
            del self._window[0]  # the context began inside a character
        self._emitted_text, self._num_emitted = self._text(), len(self._window)
        self.num_characters = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.is_met

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain."""
        self._num_until_stop -= 1
        piece = self._decode(token)
        self.num_characters += len(piece)
        return self._stops.push(piece, can_stop=self._num_until_stop <= 0)

    def flush(self) -> str:
        """Return the text that a possible stop string still holds back, at the end of the output."""
        return self._stops.flush()

    def _decode(self, token: int) -> str:
        if token in self._special_ids:
            return ""
        self._window.append(token)
        text = self._text()
        is_half, is_late = text.endswith(REPLACEMENT_CHARACTER), len(self._window) - self._num_emitted >= MAX_PENDING_TOKENS
        # Of several replacement characters at the end, only the last can still become a character.
        complete = text[:-1] if is_half and is_late else text.rstrip(REPLACEMENT_CHARACTER)
        piece = complete[len(self._emitted_text) :]
        if piece:
            self._emitted_text = complete
        if piece and not is_half:
            self._trim_window(self._num_emitted, is_half)
        elif is_late:
            self._trim_window(len(self._window) - NUM_CONTEXT, is_half)
        return piece

    def _trim_window(self, num_tokens: int, is_half: bool) -> None:
        del self._window[:num_tokens]
        text = self._text()
        self._emitted_text, self._num_emitted = text[: len(text) - is_half], len(self._window)

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)


MAX_PIECE = 65536
"""Maximum number of characters to tokenize at a time, for counting their tokens."""
PIECE_PER_TOKEN = 5
"""Characters to tokenize at a time, per token of the bound: slightly more than a token of English has."""
MAX_ADDED = 64
"""Maximum number of tokens that a cut between two pieces adds: a token of that many characters becomes about ten."""
LOSSLESS = frozenset({"ByteLevel", "Digits", "Split"})
"""Pre-tokenizers that keep every byte, except for a Split that removes its matches."""


class TextBound:
    """A bound of `max_tokens` on the number of tokens of a text."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer, self.max_tokens = tokenizer, max_tokens
        longest, self._dropped_bytes = longest_token(tokenizer), dropped_bytes(tokenizer)
        self.max_bytes = None if longest is None else longest * max_tokens
        """Maximum number of bytes of a text; None if a token can stand for any number of bytes."""
        self._piece_size = min(PIECE_PER_TOKEN * max_tokens, MAX_PIECE)

    def fault(self, text: str) -> str | None:
        """Return the fault of a text that certainly exceeds the bound; None if the text may fit, or barely exceeds the bound."""
        if self.max_bytes is not None and (num_bytes := self._num_bytes(text)) > self.max_bytes:
            return f"has {num_bytes} bytes, which are more than {self.max_tokens} tokens hold"
        if len(text) <= self._piece_size:
            return None
        num_tokens = 0
        for start in range(0, len(text), self._piece_size):
            num_tokens += self._count_tokens(text[start : start + self._piece_size]) - MAX_ADDED
            if num_tokens > self.max_tokens:
                return f"has more than {self.max_tokens} tokens"
        return None

    def _num_bytes(self, text: str) -> int:
        content = text.encode()
        return len(content.translate(None, self._dropped_bytes)) if self._dropped_bytes else len(content)

    def _count_tokens(self, piece: str) -> int:
        # A batch of one, see `lori.template.encode`.
        [encoding] = self._tokenizer.encode_batch([piece], add_special_tokens=False)
        return len(encoding)


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Return the maximum number of bytes that one token stands for; None if that is not known.

    It is known for byte-level BPE, where every byte of a text is in exactly one token, except for `dropped_bytes`: no normalizer,
    no unknown token, no stripped whitespace.
    """
    added = [*tokenizer.get_added_tokens_decoder().values()]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    is_lossless = (
        isinstance(tokenizer.model, BPE)
        and tokenizer.normalizer is None
        and _keeps_bytes(tokenizer.pre_tokenizer)
        and not any(token.lstrip or token.rstrip for token in added)
    )
    # Each character of a vocabulary entry stands for one byte.
    return max([*map(len, vocabulary), *(len(token.content.encode()) for token in added)]) if is_lossless else None


def dropped_bytes(tokenizer: Tokenizer) -> bytes:
    """Return the bytes that byte-level BPE drops because its vocabulary lacks them, such as rare control characters."""
    # As in GPT-2: a printable byte stands for itself; each other byte, in order, for a character from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return bytes(byte for byte, character in enumerate(characters) if character not in vocabulary)


def _keeps_bytes(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = [*_pre_tokenizer_parts(json.loads(pre_tokenizer.__getstate__()))]
    kinds = {part["type"] for part in parts}
    return "ByteLevel" in kinds and kinds <= LOSSLESS and all(part.get("behavior") != "Removed" for part in parts)


def _pre_tokenizer_parts(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if description["type"] != "Sequence":
        yield description
    for part in description.get("pretokenizers", ()):
        yield from _pre_tokenizer_parts(part)
