"""What is on the wire about adapters."""

from pydantic import BaseModel

from lori.template import Template


class AdapterInfo(BaseModel):
    """An adapter that can be asked for."""

    name: str
    version: str
    rank: int
    alpha: float
    sparsity: float
    templates: list[Template]
    merge_weights: dict[str, tuple[float, float]]
    metrics: dict[str, float]


class AdapterList(BaseModel):
    """The reply of GET /adapters."""

    base_model: str
    adapters: list[AdapterInfo]
