"""Turns a sequence's tokens into text as they come: never half a character, never past a stop string."""

from functools import lru_cache

from tokenizers import Tokenizer

from server.engine.stop_strings import StopStrings

HALF_CHARACTER = "\ufffd"
NUM_CONTEXT = 8
"""Tokens before a new one that its text may depend on."""
MAX_WAITING = 64
"""Tokens that wait at most for the end of a character. None has more than four bytes, so then they are no character; it is so
many for tokenizers that decode bytes in a row all or none."""


@lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the tokens that are no text."""
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of a token by itself, also of one that is no text."""
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
        """Takes the next token and returns the text that is now sure."""
        self._num_missing -= 1
        piece = self._decode(token)
        self.num_characters += len(piece)
        return self._stops.push(piece, can_stop=self._num_missing <= 0)

    def flush(self) -> str:
        """Returns the text that waited for a stop string, at the end."""
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
