"""Everything that `python -m training.fit` can be told, each default written once."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from lori.config import Alpha, Rank
from lori.mask import Granularity
from lori.names import NAME
from lori.sparse import ValueType
from lori.template import Template
from training.command_line import CommandLine, read_recipe
from training.data import OnBad, Source

CHECKPOINTS = ".checkpoint"
LORI_LR, LORA_LR = 2e-2, 2e-3
"""Of the rates tried on the embedded model, those that served `intent` and `math` both. LoRA diverges at LoRI-S's."""
Method = Literal["lori", "lori-d", "lora"]
TIED: Mapping[str, tuple[str, ...]] = {
    "data": ("about", "prepare"),
    "epochs": ("steps",),
    "calibration_epochs": ("calibration_steps",),
    "batch_tokens": ("batch_size",),
}
"""What a recipe says of another of its options, and says no more where a flag wins over that."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FitConfig(CommandLine):
    """Trains a LoRI adapter (arXiv 2504.07448) and writes it as a folder that the server loads."""

    recipe: str | None = None
    """A YAML file of these options, or the name of one of `training/recipes`. Flags win over it."""
    data: list[Source]
    """What to learn: JSONL files (`prompt` and `completion`, or `messages`, a line) or hub data sets. A source can also be an
    object, such as `{"path": "openai/gsm8k", "name": "main", "prompt": "{{ question }}", "completion": "{{ answer }}"}`, whose
    Jinja templates make rows of the set's own columns."""
    output: Path
    """The adapter's folder; its last part is the adapter's name. Checkpoints go beside it, in `OUTPUT.checkpoint`."""
    method: Method = "lori"
    """lori: LoRI-D, its mask, LoRI-S. lori-d: all of B is trained and kept. lora: PEFT's LoRA, as a baseline."""
    on_bad: OnBad = "refuse"
    """refuse: where a row cannot be used, nothing is trained. skip: they are left out. Either way they are counted, and ten of
    each kind named, with their lines."""
    mix: list[Source] = Field(default=[])
    """What to leave alone: rows that the base model answered itself (see `python -m training.answer`). There the adapted model
    is held to the base model's own distribution."""
    loss: Literal["completion", "dpo"] = "completion"
    """completion: how likely each answer is. dpo: how much likelier a row's `chosen` has become than its `rejected`, against the
    base alone, also where there is an `init_from` (arXiv 2305.18290)."""
    beta: float = Field(default=0.1, gt=0)
    """How hard dpo is held to the base."""
    mix_fraction: float = Field(default=0.4, ge=0, lt=1)
    """The share of examples drawn from `mix`, where there is one."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    template: list[Template] = Field(default=["chat"], min_length=1)
    """How prompts are written; with both, each row is learnt both ways. The server prefers the first for `messages`."""
    about: str = ""
    """A sentence for the adapter's card: what it does, from which data under which licence."""
    prepare: list[str] = Field(default=[])
    """Commands that made the data, for the adapter's card. Written as JSON, `["a, b"]`, where one has a comma or a quote."""
    rank: Rank = 32
    """Rows of A (r)."""
    alpha: Alpha = 64
    """The delta is scaled by alpha / rank."""
    sparsity: float = Field(default=0.9, ge=0, lt=1)
    """The share of B's entries that LoRI-S leaves out."""
    granularity: Granularity = "model"
    """What the mask's entries are ranked against: model (all modules together), module (attention and MLP apart), layer,
    projection, or matrix."""
    values: ValueType = "bfloat16"
    """How B's values are stored."""
    target_modules: list[str] = Field(default=list(PROJECTIONS), min_length=1)
    """Last parts of the names of the linear layers that get a delta."""
    basis_seed: int = Field(default=0, ge=0, lt=2**63)
    """Draws A. Adapters with the same seed and stream share it, and add."""
    stream: int = Field(default=0, ge=0, lt=2**63)
    """Another stream is another basis of the same seed. Adapters of one stream add; the paper draws one for each task."""
    init_from: Path | None = None
    """Goes on from this adapter's B (continual learning): what the new mask leaves out of it stays as it is."""
    mask_from: Path | None = None
    """Masks by the largest entries of this adapter of `lori-d`, in place of a LoRI-D of its own: one does for many sparsities.
    Store that with `--values float32`, so that no entries are rounded alike."""
    avoid: list[Path] = Field(default=[])
    """Adapters whose entries the mask leaves out, so that a sum keeps both as they are. What `init_from` names stays in the
    adapter: it can be avoided itself, so that nothing of it changes, and else must share no entry with those."""
    weight_range: list[Annotated[float, Field(gt=0, le=4)]] = Field(default=[])
    """Two numbers: each step applies the adapter at a weight drawn evenly between them, so that it also does its work at such
    weights in a merge. None: always at 1."""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps of LoRI-S (or of `lori-d` or `lora`); 0 to say it in epochs."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over `data`, where `steps` is 0."""
    calibration_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the LoRI-D that finds the mask."""
    calibration_epochs: float = Field(default=0, ge=0)
    """The same in passes, 0.1 for a tenth of `data`. Where both are 0 it is as long as LoRI-S."""
    lr: float | None = Field(default=None, gt=0, le=1e30)
    """LoRI-S's peak learning rate, or LoRA's: 0.02 and 0.002 if absent."""
    calibration_lr: float = Field(default=5e-3, gt=0, le=1e30)
    """LoRI-D's peak learning rate."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """The share of a phase's steps in which the rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the rate does afterwards: it falls to zero, or stays."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, on what is trained alone."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm over all parameters together."""
    batch_size: int = Field(default=0, ge=0)
    """Examples of a step; 0 to say it in tokens."""
    batch_tokens: int = Field(default=1024, ge=1)
    """Examples are drawn until a step has this many tokens, where `batch_size` is 0. So many tokens of held-out ones
    are computed together."""
    accumulation: int = Field(default=1, ge=1)
    """Parts in which each process computes a step, one after another. N processes with 1 and one with N train the same."""
    max_length: int = Field(default=1024, ge=2)
    """Longer examples are bad rows: nothing is cut."""
    seed: int = Field(default=0, ge=0, lt=2**32 - 1)
    """Orders the data."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints, where nothing is held out."""
    resume: bool = False
    """Goes on from the checkpoint beside `output`."""
    held_out: list[Source] = Field(default=[])
    """Rows to measure the loss on as training goes; the best checkpoint is the adapter."""
    held_out_fraction: float = Field(default=0, ge=0, lt=1)
    """The share of `data` that is held out instead."""
    eval_every: int = Field(default=50, ge=1)
    """Steps between measurements, and between checkpoints, where something is held out."""
    patience: int = Field(default=0, ge=0)
    """Ends a phase once so many measurements in a row were no better; 0 never does."""
    tensorboard: Path | None = None
    """A folder for TensorBoard's logs."""
    report: Path | None = None
    """An HTML page about the run: loss curves, the mask, answers before and after."""
    fsdp: bool = False
    """Spreads the model over the processes of `torchrun`, for bases that do not fit one device."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products of the base; B is always trained in fp32."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 is as many as there are CPUs that other processes leave free, noted for --resume."""

    @classmethod
    def overruled(cls, given: Mapping[str, Any], told: Mapping[str, Any]) -> set[str]:
        """See `CommandLine`. A recipe's rate is LoRI-S's, or LoRA's, and not that of the other."""
        dropped = {other for option, others in TIED.items() if option in given for other in others}
        was, now = told.get("method"), given.get("method", told.get("method"))
        return dropped | {"lr"} if (was == "lora") != (now == "lora") else dropped

    @model_validator(mode="after")
    def _is_sound(self) -> "FitConfig":
        if faults := [*self._name_faults(), *self._idle(), *self._conflicts()]:
            raise ValueError("; ".join(faults))
        return self

    def _name_faults(self) -> Iterator[str]:
        if not NAME.fullmatch(self.output.name):
            yield f"--output ends in {self.output.name!r}, which is to be the adapter's name: it must match {NAME.pattern}"
        if self.output.suffix == CHECKPOINTS:
            yield f"--output ends in {CHECKPOINTS}, as the folders of checkpoints do"
        if self.report and self._is_in_own_folder(self.report):
            yield "--report is in the adapter's own folder or that of its checkpoints, which the next training replaces"
        if self.tensorboard and self._is_in_own_folder(self.tensorboard / self.output.name):
            said = f"puts its logs, {self.output.name}/…, into the adapter's own folder or that of its checkpoints"
            yield f"--tensorboard {self.tensorboard} {said}"
        if self.report and self.report.is_dir():
            yield f"--report {self.report} is a folder, expected a file's name, such as {self.report / 'report.html'}"
        if self.weight_range and not (len(self.weight_range) == 2 and self.weight_range[0] <= self.weight_range[1]):
            yield f"--weight-range is {self.weight_range}, expected two numbers, the lower one first"
        if len(set(self.template)) != len(self.template):
            yield f"--template names one twice: {self.template}"

    def _is_in_own_folder(self, path: Path) -> bool:
        return any(path.resolve().is_relative_to(own.resolve()) for own in (self.output, self.checkpoints))

    def _idle(self) -> Iterator[str]:
        """What was asked for and would do nothing."""
        given = self.model_fields_set - self._of_recipe()
        is_measured = bool(self.held_out or self.held_out_fraction)
        for names, is_used, needs in (
            (("sparsity", "granularity", "mask_from", "avoid"), self.method == "lori", "--method lori"),
            (("calibration_steps", "calibration_epochs"), self.method == "lori" and not self.mask_from, "a LoRI-D of its own"),
            (("calibration_lr",), self.method != "lora" and not self.mask_from, "a LoRI-D"),
            (("lr",), self.method != "lori-d", "LoRI-S or LoRA; LoRI-D's is --calibration-lr"),
            (("beta",), self.loss == "dpo", "--loss dpo"),
            (("mix_fraction",), bool(self.mix), "--mix"),
            (("weight_range",), self.method != "lora", "LoRI"),
            (("basis_seed", "stream"), self.method != "lora", "LoRI, whose A they draw; LoRA's is drawn by --seed"),
            (("epochs",), not self.steps, "--steps 0"),
            (("calibration_epochs",), not self.calibration_steps, "--calibration-steps 0"),
            (("batch_tokens",), is_measured or not self.batch_size, "--batch-size 0, or held-out rows"),
            (("save_every",), not is_measured, "runs without held-out rows; with them --eval-every says it"),
            (("eval_every", "patience"), is_measured, "--held-out or --held-out-fraction"),
        ):
            yield from (f"--{name.replace('_', '-')} is for {needs}" for name in names if name in given and not is_used)

    def _of_recipe(self) -> set[str]:
        """What a recipe says for all methods, and no flag says otherwise, may be of no use to the one that is asked for."""
        fields = type(self).model_fields
        told = read_recipe(self.recipe, fields) if self.recipe else {}
        read = {name: TypeAdapter[Any](fields[name].annotation or Any).validate_python(value) for name, value in told.items()}
        return {name for name, value in read.items() if value == getattr(self, name)}

    def _conflicts(self) -> Iterator[str]:
        if self.held_out and self.held_out_fraction:
            yield "--held-out and --held-out-fraction exclude each other"
        if self.loss == "dpo" and self.mix:
            yield "--loss dpo is held to the base by itself, and has no --mix"
        if self.method == "lora" and self.fsdp:
            yield "--method lora is a baseline, and has no --fsdp"

    @property
    def checkpoints(self) -> Path:
        """The folder of a run that has not ended."""
        return self.output.with_name(self.output.name + CHECKPOINTS)

    @property
    def peak_lr(self) -> float:
        """The learning rate of LoRI-S, or of LoRA."""
        return self.lr or (LORA_LR if self.method == "lora" else LORI_LR)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with."""
        free = {"recipe", "resume", "save_every", "output", "accumulation", "report", "tensorboard", "about", "prepare"}
        return self.model_dump(mode="json", exclude=free)
