"""Everything that `python -m training.fit` can be told, each default written once."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lori.names import NAME
from lori.template import Template
from lori.values import ValueType
from training.command_line import CommandLine

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FitConfig(CommandLine):
    """Trains a LoRI adapter (arXiv 2504.07448) and writes it as a folder that the server loads."""

    data: list[str]
    """What to learn: JSONL files (`prompt` and `completion`, or `messages`, a line) or hub data sets."""
    output: Path
    """The adapter's folder; its last part is the adapter's name. Checkpoints go beside it, in `OUTPUT.checkpoint`."""
    mix: list[str] = Field(default=[])
    """What to leave alone: rows that the base model answered itself (see `python -m training.answer`). There the adapted model
    is held to the base model's own distribution."""
    mix_fraction: float = Field(default=0.4, ge=0, lt=1)
    """The share of examples drawn from `mix`, where there is one."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    template: list[Template] = Field(default=["chat"], min_length=1)
    """How prompts are written; with both, each row is learnt both ways. The server prefers the first for `messages`."""
    about: str = ""
    """A sentence for the adapter's card: what it does, from which data under which licence."""
    prepare: list[str] = Field(default=[])
    """Commands that made the data, for the adapter's card."""
    rank: int = Field(default=32, ge=1)
    """Rows of A (r)."""
    alpha: float = Field(default=64, gt=0)
    """The delta is scaled by alpha / rank."""
    sparsity: float = Field(default=0.9, ge=0, lt=1)
    """The share of B's entries that LoRI-S sets to zero."""
    values: ValueType = "bfloat16"
    """How B's values are stored."""
    target_modules: list[str] = Field(default=list(PROJECTIONS))
    """Last parts of the names of the linear layers that get a delta."""
    basis_seed: int = Field(default=0, ge=0)
    """Draws A. Adapters with the same seed and stream share it, and add."""
    stream: int = Field(default=0, ge=0)
    """Another stream is another basis of the same seed."""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps of LoRI-S; 0 to say it in epochs."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over `data` in LoRI-S, where `steps` is 0."""
    calibration_steps: int = Field(default=0, ge=0)
    """Optimizer steps of LoRI-D, which finds the mask; 0 is as many as LoRI-S."""
    lr: float = Field(default=2e-2, gt=0)
    """LoRI-S's peak learning rate."""
    calibration_lr: float = Field(default=5e-3, gt=0)
    """LoRI-D's peak learning rate."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """The share of a phase's steps in which the rate rises; it falls as a cosine afterwards."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm over all parameters together."""
    batch_tokens: int = Field(default=1024, ge=1)
    """Examples are drawn until a batch holds this many tokens."""
    max_length: int = Field(default=1024, ge=2)
    """Longer examples are left out and counted."""
    seed: int = 0
    """Orders the data."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    resume: bool = False
    """Goes on from the checkpoint beside `output`."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products of the base; B is always trained in fp32."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 is torch's own choice."""

    @model_validator(mode="after")
    def _is_sound(self) -> "FitConfig":
        if not NAME.fullmatch(self.output.name):
            raise ValueError(
                f"--output ends in {self.output.name!r}, which is to be the adapter's name: it must match {NAME.pattern}"
            )
        if len(set(self.template)) != len(self.template):
            raise ValueError(f"template names one twice: {self.template}")
        return self
