"""Requests of the server benchmark: prompts without common prefixes, the adapters of each request, and arrival times."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program", "question",
    "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month",
]  # fmt: skip
"""Words of one token each in SmolLM2's vocabulary."""

Names = tuple[str, ...]
Choice = Callable[[int], Names]
"""Function from the number of a request to the names of its adapters."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt, the names of its adapters, and the exact number of tokens to generate."""

    prompt: str
    adapters: Names
    num_tokens: int


def prompt(seed: str, num_words: int) -> str:
    """Return random words. Prompts of different seeds share no prefix."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def make_ask(seed: str, number: int, num_words: int, num_tokens: int, choose: Choice) -> Ask:
    """Return the request `number`, of `num_words` plus or minus a tenth. Its length does not depend on the seed."""
    spread = num_words // 10
    length = num_words + random.Random(number).randint(-spread, spread)
    return Ask(prompt(f"{seed} {number}", length), choose(number), num_tokens)


def make_asks(seed: str, count: int, num_words: int, num_tokens: int, choose: Choice) -> list[Ask]:
    """Return the first `count` requests, see `make_ask`."""
    return [make_ask(seed, number, num_words, num_tokens, choose) for number in range(count)]


def no_adapter(_: int) -> Names:
    """Return no names, for the base model."""
    return ()


def distinct(names: Sequence[str], num_terms: int = 1) -> Choice:
    """Return a choice that cycles through `names`. With several terms, no two of `len(names)` successive merges are the same."""
    offsets = [0, *accumulate(range(1, num_terms))]
    return lambda i: tuple(dict.fromkeys(names[(i + offset) % len(names)] for offset in offsets))


def zipf(names: Sequence[str], seed: str, exponent: float = 1.0) -> Choice:
    """Return a random choice of one name. The probability of the k-th name is proportional to k**-exponent, from k = 1."""
    rng, weights = random.Random(seed), list(accumulate(k**-exponent for k in range(1, len(names) + 1)))
    return lambda _: (rng.choices(names, cum_weights=weights)[0],)


def poisson(rate: float, count: int, seed: str) -> list[float]:
    """Return the arrival times of `count` requests in seconds from the start, a Poisson process of `rate` requests/s."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))
