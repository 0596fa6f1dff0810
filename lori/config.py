"""`adapter_config.json`: PEFT's field names where PEFT has the field, ours under `lori`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lori.basis import Basis
from lori.template import Template


class BasisConfig(BaseModel):
    """What A is drawn from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: Literal["philox-u24-1"] = "philox-u24-1"
    seed: int = Field(ge=0, lt=2**63)
    stream: int = Field(ge=0, lt=2**63)

    def basis(self) -> Basis:
        """Returns the basis itself."""
        return Basis(self.seed, self.stream, self.generator)


class LoriSection(BaseModel):
    """What PEFT has no field for."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: Literal[1] = 1
    basis: BasisConfig
    basis_digest: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of A over all modules: loading draws A again and compares."""
    base_digest: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 that identifies the base model, see `lori.base_model.base_digest`."""
    content_digest: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 over the weights, rank, alpha, basis and base, see `lori.format.content_digest`; it begins the version."""
    sparsity: float = Field(ge=0, lt=1)
    templates: tuple[Template, ...] = Field(min_length=1)
    """The templates that the adapter was trained on, the preferred one first."""
    merge_weights: dict[str, tuple[float, float]] = {}
    """For a partner's name: the weights (own, partner's) that a merge with it was measured at."""
    training: dict[str, Any] = {}
    """The command's own record: data, seed, steps, time."""
    metrics: dict[str, float] = {}
    """Measured on held-out rows, base and adapter."""


class AdapterConfig(BaseModel):
    """One adapter's `adapter_config.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["LORI"] = "LORI"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(min_length=1)
    lora_dropout: float = 0.0
    bias: Literal["none"] = "none"
    inference_mode: bool = True
    lori: LoriSection

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.lora_alpha / self.r
