"""Options of a merge: method, density, sign election and seed. Knows no tensors; `lori.merge` computes merges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lori.errors import AdapterError

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude"]
"""Exact sum; TIES (arXiv 2306.01708); DARE (arXiv 2311.03099), summed or as TIES; the sum of each adapter's largest entries."""
MERGE_METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)

DefaultMerge = Literal["auto", "linear"]
"""Weights of several adapters that a request names without any: from the prompt where it can give them, or 1/n each."""

MAX_WEIGHT, MAX_ADAPTERS = 16.0, 64
"""Largest weight of an adapter, and most adapters, in a request or a named merge."""

SignMethod = Literal["total", "frequency"]
"""Sign election of TIES: by the sum of the values, or by the number of values of each sign."""
SIGN_METHODS: tuple[SignMethod, ...] = get_args(SignMethod)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of a merge. Raises `AdapterError` for an unknown method or sign, and for a density out of range."""

    method: MergeMethod = "linear"
    """Only `linear` merges adapters on several bases."""
    density: float = 0.5
    """Share of each adapter's nonzero entries that survive the pruning, 0 < density <= 1; `linear` prunes nothing.

    PEFT's density is a share of all entries of a tensor. For a sparse B that share would often prune nothing.
    """
    sign: SignMethod = "total"
    """Sign election of `ties` and `dare_ties`."""
    seed: int = 0
    """Seed of the draw of the entries that `dare_linear` and `dare_ties` drop."""

    def __post_init__(self) -> None:
        if self.method not in MERGE_METHODS:
            raise AdapterError(f"method is {self.method!r}, expected one of {', '.join(MERGE_METHODS)}")
        if self.sign not in SIGN_METHODS:
            raise AdapterError(f"sign is {self.sign!r}, expected one of {', '.join(SIGN_METHODS)}")
        if not 0 < self.density <= 1:
            raise AdapterError(f"density is {self.density}, expected 0 < density <= 1")

    @property
    def is_random(self) -> bool:
        """Whether the entries that survive are drawn at random."""
        return self.method in ("dare_linear", "dare_ties")

    @property
    def elects_sign(self) -> bool:
        """Whether values without the elected sign are dropped."""
        return self.method in ("ties", "dare_ties")

    @property
    def used(self) -> Mapping[str, str | float]:
        """The options that have an effect with this method, by name."""
        used: dict[str, str | float] = {"method": self.method}
        if self.method != "linear":
            used["density"] = self.density
        if self.elects_sign:
            used["sign"] = self.sign
        if self.is_random:
            used["seed"] = self.seed
        return used


DEFAULTS = MergeOptions()
