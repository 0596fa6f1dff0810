"""Escaping of text from files and clients for terminals and logs: the text cannot move the cursor or forge a log line."""

MARGIN = "    "
"""Indent of every line of a message but the first, so that no text can pass for a log line."""


def printable(text: str) -> str:
    """Return `text` in one line, with all non-printable characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return `text` with all lines after the first indented, and each line escaped as `printable` does."""
    if text.isprintable():
        return text
    return f"\n{MARGIN}".join(map(printable, text.split("\n")))
