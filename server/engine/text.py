"""Turns a sequence's tokens into text as they come: never half a character, never past a stop string."""

from tokenizers import Tokenizer

HALF_CHARACTER = "\ufffd"
NUM_CONTEXT = 8
"""Prompt tokens that the first output token's text may depend on."""


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """Returns how many last characters of `text` could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


class TextStream:
    """The text of one sequence's output. `is_stopped` once a stop string was met; text from it on is never given out."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: tuple[int, ...], stops: tuple[str, ...]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        # A token's text may depend on those before it: [prefix, read) is known text, decoded again beside what is new.
        self._ids = list(prompt_ids[-NUM_CONTEXT:])
        self._prefix, self._read = 0, len(self._ids)
        while self._text(self._prefix, self._read).startswith(HALF_CHARACTER):
            self._prefix += 1  # The context began inside a character.
        self._waiting = ""
        self.num_characters = 0
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that is now sure."""
        piece = self._decode(token)
        self.num_characters += len(piece)
        text = self._waiting + piece
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, self._waiting = True, ""
            return text[: min(ends)]
        keep = held_back(text, self._stops)
        self._waiting = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Returns the text that waited for a stop string, at the end."""
        text, self._waiting = self._waiting, ""
        return text

    def _decode(self, token: int) -> str:
        self._ids.append(token)
        known, text = self._text(self._prefix, self._read), self._text(self._prefix, len(self._ids))
        if len(text) <= len(known) or text.endswith(HALF_CHARACTER):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _text(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)
