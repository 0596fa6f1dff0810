"""What an answer says: its number, whether it refuses."""

import re
from decimal import Decimal

MARK = "####"
"""Before the result in GSM8K's answers."""
NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
REFUSAL = re.compile(
    r"""
      \b(?:I|we)\ (?:really\ |simply\ |just\ |also\ )?
        (?:can't|cannot|can\ not|won't|will\ not|must\ (?:decline|refuse)|(?:have|need)\ to\ decline|refuse|decline)\b
        (?!\ (?:wait|believe|imagine|stress|emphasi[sz]e|help\ but)\b)
    | \b(?:I|we)(?:'m|'re|\ am|\ are)\ (?:\w+\ )?(?:unable|not\ able|not\ allowed|not\ comfortable)\b
    | \bsorry,?\ (?:but|no)\b
    | ^\W*(?:unable|not\ able)\ to\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Somebody who says "I" or "we" declines, or is sorry *but*: what cannot be done by others, or be helped, is no refusal."""
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
    """Says whether an answer begins as a refusal does, in English."""
    return bool(REFUSAL.search(" ".join(text.replace("’", "'").split())[:REFUSAL_SPAN]))
