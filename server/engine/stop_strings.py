"""Finds stop strings in a text that comes in pieces. Knows nothing of tokens."""


def beginning(text: str, stop: str, start: int) -> int:
    """Returns the first place from `start` on where `text` has all of `stop`, or ends inside it; else the text's length."""
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
        """Takes the next piece and returns the text that is now sure: up to the first stop string that ends in the piece.

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
        """Returns the text that waited, at the end."""
        text, self._waiting = self._waiting, ""
        self._starts = [0] * len(self._stops)
        return text

    def _next(self, text: str, place: int, can_stop: bool) -> int:
        stop = self._stops[place]
        start = beginning(text, stop, self._starts[place])
        while not can_stop and start + len(stop) <= len(text):
            start = beginning(text, stop, start + 1)
        return start
