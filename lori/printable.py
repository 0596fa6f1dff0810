"""Text from files and clients as a terminal and a log may show it: nothing in it moves the cursor or begins a line."""

MARGIN = "    "
"""Before every line of a message but the first: no text can pass for a line of its own."""


def printable(text: str) -> str:
    """Return `text` in one line, with everything in it that is not printed escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return `text` with its lines as they are, those after the first set in, and everything else escaped as `printable` does."""
    if text.isprintable():
        return text
    return f"\n{MARGIN}".join(map(printable, text.split("\n")))
