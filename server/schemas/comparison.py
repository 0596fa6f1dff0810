"""What is on the wire of GET /adapters/compare."""

from pydantic import BaseModel, ConfigDict

Matrix = list[list[float | None]]


class AdapterComparison(BaseModel):
    """The reply of GET /adapters/compare: every matrix has a row and a column for each of `names`, in their order."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    names: list[str]
    cosine: Matrix
    """<ΔW_a, ΔW_b> / (|ΔW_a| |ΔW_b|) over all modules: 1 is the same direction, -1 the opposite. null where a delta is zero."""
    overlap: Matrix
    """The share of the smaller mask that the other one has too. null on two bases, where an entry of B means two things."""
    sign_conflict: Matrix
    """The share of common entries, both not zero, whose signs differ: half by chance. null as there, or where there are none."""
    chance_overlap: Matrix
    """What `overlap` would be if each mask were spread at random. null as there."""
