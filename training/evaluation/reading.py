"""What an answer says: its number, whether it refuses."""

import re
from decimal import Decimal

MARK = "####"
"""Before the result in GSM8K's answers."""
NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
REFUSAL = re.compile(r"\b(can't|cannot|can not|won't|unable to|not able to|must decline|sorry)\b", re.IGNORECASE)
REFUSAL_SPAN = 120
"""A refusal says so in its first characters; later ones may quote anything."""


def number_in(text: str) -> Decimal | None:
    """Returns the first number after `####`, or the last one of a text without it; None where there is none.

    Commas and a dollar sign are no part of a number, nor is a dot that ends a sentence: "$1,080." is 1080.
    """
    _, mark, result = text.partition(MARK)
    found = list(NUMBER.finditer(result if mark else text))
    if not found:
        return None
    match = found[0 if mark else -1]
    value = Decimal(match[1].replace(",", ""))
    return -value if match[0][0] in "-−" else value


def is_refusal(text: str) -> bool:
    """Says whether an answer begins as a refusal does."""
    return bool(REFUSAL.search(text.replace("’", "'")[:REFUSAL_SPAN]))
