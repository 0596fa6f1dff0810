"""What this project has measured, with where: the planner knows no other numbers, and asks for the rest."""

from dataclasses import dataclass

MODEL = "SmolLM2-135M in bfloat16 on one core of an AMD EPYC with AVX-512"
KEPT_A_ROW = 3.2
"""Entries that a row of B keeps in what was measured: rank 32, a tenth."""
ROWS_OF_A = 32
"""That a token is multiplied by there: one A of rank 32."""
TOKENS_PER_S, SINGLE_TOKENS_PER_S = 587.0, 121.0
"""Of that model without adapters, with 32 users and with one."""
MEASURED = {
    "model": None, "dtype": "bfloat16", "quantization": None, "device": "cpu", "prompt_tokens": 100, "completion_tokens": 64,
    "users": 32,
}  # fmt: skip
"""What they are of, as `PlanConfig` has it."""
OVERHEAD_GIB = 0.9
"""Of a process on a CPU, beside all that is counted: a server of the embedded model had 0.84 more in RAM than is."""
RESERVED, HELD = 1.15, 1.35
"""Times the adapters' bytes: what their memory should be told to have, and what it then holds when it is full, for its parts are
laid out before it is known which modules keep more, and what outgrows its part leaves that behind. Measured with the demo
adapters; told 1.0, it held 1.62."""
LOAD_S_PER_BYTE = 5.6e-3 / 1.34e6
"""Of reading, checking, packing and placing an adapter whose file the system has in memory: 5 and 0.6 ms of 1.34 MB."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens a second with adapters to those without, and where it is from."""

    value: float
    source: str


def _of(value: float, case: str) -> Ratio:
    return Ratio(value, f"README, How fast: {case}, 32 users, {MODEL}")


BY_ADAPTERS = {
    1: _of(0.86, "1 adapter"),
    8: _of(0.84, "8 adapters"),
    32: _of(0.82, "32 adapters"),
    10_000: _of(0.80, "zipf of 10,000 adapters"),
}
"""Of requests for one adapter, by how many adapters there are at most; more than the last are taken for as many."""
BY_TERMS = {2: _of(0.78, "32 merges of 2"), 4: _of(0.72, "32 merges of 4")}
"""Of merges, by how many adapters a request names at most."""


def measured_ratio(num_adapters: int, num_terms: int, kept_a_row: float, rows_of_a: int) -> Ratio | None:
    """Returns the ratio of the measured case that is nearest and no easier; `None` where none was.

    `rows_of_a` are those of all A's together.
    """
    if kept_a_row > KEPT_A_ROW * (1 + 1e-9) or rows_of_a > ROWS_OF_A:
        return None
    if num_terms > 1:
        return next((of for most, of in BY_TERMS.items() if num_terms <= most), None)
    return next((of for most, of in BY_ADAPTERS.items() if num_adapters <= most), BY_ADAPTERS[10_000])
