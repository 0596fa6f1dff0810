"""Everything that `python -m training.fit` can be told, each default written once."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lori.mask import Granularity
from lori.names import NAME
from lori.template import Template
from lori.values import ValueType
from training.command_line import CommandLine
from training.data import OnBad, Source

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FitConfig(CommandLine):
    """Trains a LoRI adapter (arXiv 2504.07448) and writes it as a folder that the server loads."""

    recipe: str | None = None
    """A YAML file of these options, or the name of one of `training/recipes`. Flags win over it."""
    method: Literal["lori", "lori-d", "lora"] = "lori"
    """lori: both phases. lori-d: the first alone, which keeps all of B. lora: A is trained, too."""
    data: list[Source]
    """What to learn: JSONL files (`prompt` and `completion`, or `messages`, a line) or hub data sets. A source can also be an
    object, such as `{"path": "openai/gsm8k", "name": "main", "prompt": "{{ question }}", "completion": "{{ answer }}"}`, whose
    Jinja templates make rows of the set's own columns."""
    output: Path
    """The adapter's folder; its last part is the adapter's name. Checkpoints go beside it, in `OUTPUT.checkpoint`."""
    on_bad: OnBad = "refuse"
    """refuse: where a row cannot be used, nothing is trained, and each is named. skip: they are left out, named and counted."""
    held_out: list[Source] = Field(default=[])
    """What is measured on while training."""
    held_out_fraction: float = Field(default=0, ge=0, lt=1)
    """The share of `data` that is measured on instead of learnt, where `held_out` is empty."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between measurements; 0 is none."""
    patience: int = Field(default=0, ge=0)
    """A phase ends after this many measurements without a better one; 0 is never."""
    mix: list[Source] = Field(default=[])
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
    granularity: Granularity = "model"
    """What is ranked together for the mask."""
    values: ValueType = "bfloat16"
    """How B's values are stored."""
    target_modules: list[str] = Field(default=list(PROJECTIONS))
    """Last parts of the names of the linear layers that get a delta."""
    basis_seed: int = Field(default=0, ge=0)
    """Draws A. Adapters with the same seed and stream share it, and add."""
    stream: int = Field(default=0, ge=0)
    """Another stream is another basis of the same seed."""
    init_from: Path | None = None
    """An adapter's folder to start from."""
    avoid: list[Path] = Field(default=[])
    """Adapters' folders whose entries of B are not used."""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps of LoRI-S; 0 to say it in epochs."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over `data` in LoRI-S, where `steps` is 0."""
    calibration_steps: int = Field(default=0, ge=0)
    """Optimizer steps of LoRI-D, which finds the mask; 0 is as many as LoRI-S."""
    calibration_epochs: float = Field(default=0, ge=0)
    """Passes over `data` in LoRI-D, where `calibration_steps` is 0; 0 is as many as LoRI-S."""
    lr: float = Field(default=2e-2, gt=0)
    """LoRI-S's peak learning rate."""
    calibration_lr: float = Field(default=5e-3, gt=0)
    """LoRI-D's peak learning rate."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """The share of a phase's steps in which the rate rises; it falls as a cosine afterwards."""
    weight_decay: float = Field(default=0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm over all parameters together."""
    batch_size: int = Field(default=0, ge=0)
    """Examples of a step; 0 to say it in `batch_tokens`."""
    accumulation: int = Field(default=1, ge=1)
    """Passes in which one process computes a step."""
    batch_tokens: int = Field(default=1024, ge=1)
    """Examples are drawn until a batch holds this many tokens."""
    max_length: int = Field(default=1024, ge=2)
    """Longer examples are bad rows: nothing is cut."""
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
    tensorboard: Path | None = None
    """A folder for TensorBoard's event files."""
    report: Path | None = None
    """A file for the run's figures as JSON."""
    fsdp: bool = False
    """Shards the base over the processes of torchrun."""

    @model_validator(mode="after")
    def _is_sound(self) -> "FitConfig":
        if not NAME.fullmatch(self.output.name):
            raise ValueError(
                f"--output ends in {self.output.name!r}, which is to be the adapter's name: it must match {NAME.pattern}"
            )
        if len(set(self.template)) != len(self.template):
            raise ValueError(f"template names one twice: {self.template}")
        return self
