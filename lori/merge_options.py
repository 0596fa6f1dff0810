"""How adapters are merged: what can be asked for. Knows no tensor; `lori.merge` does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lori.errors import AdapterError

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude"]
"""The exact sum; TIES (arXiv 2306.01708); DARE (arXiv 2311.03099), summed or as TIES; the sum of each one's largest entries."""
MERGE_METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)

SignMethod = Literal["total", "frequency"]
"""How TIES elects a sign: by the sum of the values, or by the number of values of each sign."""
SIGN_METHODS: tuple[SignMethod, ...] = get_args(SignMethod)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How adapters are merged. Raises `AdapterError` for what is no method, and a density out of range."""

    method: MergeMethod = "linear"
    """Only `linear` merges adapters on several bases."""
    density: float = 0.5
    """The share of each adapter's kept entries that survive the pruning, 0 < density <= 1; `linear` prunes nothing.

    PEFT's is the share of all entries of a tensor, most of which a sparse B has not: it would often prune nothing.
    """
    sign: SignMethod = "total"
    """How `ties` and `dare_ties` elect a sign."""
    seed: int = 0
    """Of the entries that `dare_linear` and `dare_ties` drop."""

    def __post_init__(self) -> None:
        if self.method not in MERGE_METHODS:
            raise AdapterError(f"method is {self.method!r}, expected one of {', '.join(MERGE_METHODS)}")
        if self.sign not in SIGN_METHODS:
            raise AdapterError(f"sign is {self.sign!r}, expected one of {', '.join(SIGN_METHODS)}")
        if not 0 < self.density <= 1:
            raise AdapterError(f"density is {self.density}, expected 0 < density <= 1")

    @property
    def is_random(self) -> bool:
        """Return whether the entries that survive are drawn."""
        return self.method in ("dare_linear", "dare_ties")

    @property
    def elects_sign(self) -> bool:
        """Return whether values of the lesser sign are left out."""
        return self.method in ("ties", "dare_ties")

    @property
    def used(self) -> Mapping[str, str | float]:
        """Those of the options that have an effect, by name."""
        used: dict[str, str | float] = {"method": self.method}
        if self.method != "linear":
            used["density"] = self.density
        if self.elects_sign:
            used["sign"] = self.sign
        if self.is_random:
            used["seed"] = self.seed
        return used


DEFAULTS = MergeOptions()
