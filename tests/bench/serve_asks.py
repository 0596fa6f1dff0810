"""What the users of the benchmark of the server ask: prompts that share nothing, and who asks for which adapter, and when."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program", "question",
    "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month",
]  # fmt: skip
"""A token each in SmolLM2's vocabulary."""

Names = tuple[str, ...]
Choice = Callable[[int], Names]
"""Which adapters the request of this number names."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt, the names of its adapters, and how many tokens it generates, neither more nor fewer."""

    prompt: str
    adapters: Names
    num_tokens: int


def prompt(seed: str, num_words: int) -> str:
    """Returns random words; another seed shares no beginning with it."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def make_ask(seed: str, number: int, num_words: int, num_tokens: int, choose: Choice) -> Ask:
    """Returns a request of `num_words` give or take a tenth: one of a number is as long whatever the seed."""
    spread = num_words // 10
    length = num_words + random.Random(number).randint(-spread, spread)
    return Ask(prompt(f"{seed} {number}", length), choose(number), num_tokens)


def make_asks(seed: str, count: int, num_words: int, num_tokens: int, choose: Choice) -> list[Ask]:
    """Returns the first requests, see `make_ask`."""
    return [make_ask(seed, number, num_words, num_tokens, choose) for number in range(count)]


def no_adapter(_: int) -> Names:
    """Names none: the base model."""
    return ()


def distinct(names: Sequence[str], num_terms: int = 1) -> Choice:
    """Returns a choice in turn; of several terms, that no other of as many requests as there are names merges the same."""
    offsets = [0, *accumulate(range(1, num_terms))]
    return lambda i: tuple(dict.fromkeys(names[(i + offset) % len(names)] for offset in offsets))


def zipf(names: Sequence[str], seed: str, exponent: float = 1.0) -> Choice:
    """Returns a choice at random, in which the name of rank k, from 1, is asked for in proportion to k**-exponent."""
    rng, weights = random.Random(seed), list(accumulate(k**-exponent for k in range(1, len(names) + 1)))
    return lambda _: (rng.choices(names, cum_weights=weights)[0],)


def poisson(rate: float, count: int, seed: str) -> list[float]:
    """Returns when each of `count` requests arrives, in seconds from the start, at `rate` requests a second."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))
