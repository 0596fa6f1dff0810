"""The options of `python -m training.fit`. Each default is written once, here."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator

from lori.config import Alpha, Rank
from lori.errors import AdapterError
from lori.mask import Granularity
from lori.names import check_name
from lori.sparse import ValueType
from lori.template import Template
from training.command_line import CommandLine, read_recipe
from training.data import OnBad, Source

CHECKPOINT_SUFFIX = ".checkpoint"
LORI_LR, LORA_LR = 2e-2, 2e-3
"""Default peak learning rates of LoRI-S and LoRA. Of the rates tried on the embedded model, these worked well for both `intent`
and `math`. LoRA diverges at LoRI-S's rate."""
Method = Literal["lori", "lori-d", "lora"]
DEPENDENT_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "data": ("about", "prepare"),
    "epochs": ("steps",),
    "calibration_epochs": ("calibration_steps",),
    "batch_tokens": ("batch_size",),
}
"""By option: the options of a recipe that depend on it. A flag that overrides the option drops the recipe's dependent ones."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FitConfig(CommandLine):
    """Train a LoRI adapter (arXiv 2504.07448) and write it as a folder that the server loads."""

    GROUPS: ClassVar[Mapping[str, Sequence[str]]] = {
        "the ten that matter first": (
            "recipe",
            "data",
            "output",
            "model",
            "template",
            "mix",
            "steps",
            "held_out_fraction",
            "resume",
            "threads",
        ),
        "the adapter": ("about", "method", "rank", "alpha", "sparsity", "granularity", "values", "target_modules"),
        "other adapters": ("basis_seed", "stream", "init_from", "mask_from", "avoid"),
        "the data": ("on_bad", "mix_fraction", "max_length", "prepare"),
        "the loss": ("loss", "beta", "weight_range"),
        "length and learning rate": (
            "epochs",
            "calibration_steps",
            "calibration_epochs",
            "lr",
            "calibration_lr",
            "warmup",
            "schedule",
            "weight_decay",
            "max_grad_norm",
        ),
        "batches": ("batch_size", "batch_tokens", "accumulation", "seed"),
        "checkpoints and reports": ("save_every", "held_out", "eval_every", "patience", "tensorboard", "report"),
        "automatic weights": ("prompt_statistics", "background"),
        "hardware": ("dtype", "fsdp"),
    }
    recipe: str | None = None
    """A YAML file of these options, or the name of a recipe in `training/recipes`. Flags override it."""
    data: list[Source]
    """Training data: JSONL files (each line with `prompt` and `completion`, or `messages`) or hub data sets. A source can also be
    an object, such as `{"path": "openai/gsm8k", "name": "main", "prompt": "{{ question }}", "completion": "{{ answer }}"}`. Its
    Jinja templates build the rows from the data set's own columns."""
    output: Path
    """The adapter's folder; its last part is the adapter's name. Checkpoints go beside it, in `OUTPUT.checkpoint`."""
    method: Method = "lori"
    """lori: LoRI-D, then the mask, then LoRI-S. lori-d: train and store all of B. lora: PEFT's LoRA, as a baseline."""
    on_bad: OnBad = "refuse"
    """refuse: train nothing if a row cannot be used. skip: leave such rows out. Either way bad rows are counted, and the first
    ten of each kind are listed with their lines."""
    mix: list[Source] = Field(default=[])
    """Rows on which the adapter should change nothing, with the base model's own answers (see `python -m training.answer`). On
    these rows the loss is the KL divergence from the base model's distribution."""
    loss: Literal["completion", "dpo"] = "completion"
    """completion: cross-entropy of each answer. dpo: DPO on each row's `chosen` and `rejected` (arXiv 2305.18290). Its reference
    model is the base without any adapter, even with `init_from`."""
    beta: float = Field(default=0.1, gt=0)
    """DPO's beta: how strongly the adapted model is held to the base."""
    mix_fraction: float = Field(default=0.4, ge=0, lt=1)
    """Fraction of examples drawn from `mix`, if it is given."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    template: list[Template] = Field(default=["chat"], min_length=1)
    """Templates that format the prompts. With both, each row is learned in both. The server answers `messages` in `chat` if
    all adapters of the request know it, else in `plain` if all know that, and refuses them otherwise."""
    about: str = ""
    """A sentence for the adapter's card: the task, the data and the data's licence."""
    prepare: list[str] = Field(default=[])
    """Commands that made the data, for the adapter's card. Write them as JSON, `["a, b"]`, if one has a comma or a quote."""
    rank: Rank = 32
    """Rows of A (r)."""
    alpha: Alpha = 64
    """The delta is scaled by alpha / rank."""
    sparsity: float = Field(default=0.9, ge=0, lt=1)
    """Fraction of B's entries that LoRI-S leaves out."""
    granularity: Granularity = "model"
    """The group of entries in which the mask takes the largest: model (all modules together), module (attention and MLP apart),
    layer, projection, or matrix."""
    values: ValueType = "bfloat16"
    """Type in which B's values are stored."""
    target_modules: list[str] = Field(default=list(PROJECTIONS), min_length=1)
    """Linear layers that get a delta, by the last part of their names."""
    basis_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of A. Adapters with the same seed and stream share A, and their sum is an exact merge."""
    stream: int = Field(default=0, ge=0, lt=2**63)
    """Stream of A's random numbers: another stream gives another basis of the same seed. Only adapters of one stream share A. The
    paper draws one A for each task."""
    init_from: Path | None = None
    """Starts from this adapter's B (continual learning). Its entries outside of the new mask stay unchanged."""
    mask_from: Path | None = None
    """An adapter trained with `--method lori-d`. The mask keeps its largest entries, so that no LoRI-D is run here, and one
    LoRI-D serves many sparsities. Store that adapter with `--values float32`, so that rounding makes no two entries equal."""
    avoid: list[Path] = Field(default=[])
    """Adapters whose entries the mask leaves out, so that their sum with the new adapter keeps the values of both. The entries of
    `init_from` stay in the new adapter: `init_from` must share no entry with the adapters named here, or be named here itself, so
    that none of its entries change."""
    weight_range: list[Annotated[float, Field(gt=0, le=4)]] = Field(default=[])
    """Two numbers, such as `--weight-range 0.3 --weight-range 1`: each step applies the adapter at a weight drawn uniformly
    between them, so that the adapter also works at such weights in a merge. If absent, the weight is always 1."""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps of LoRI-S (or of `lori-d` or `lora`); 0 to use `epochs`."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over `data`, if `steps` is 0."""
    calibration_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the LoRI-D that finds the mask."""
    calibration_epochs: float = Field(default=0, ge=0)
    """The same in passes, 0.1 for a tenth of `data`. If both are 0, LoRI-D is as long as LoRI-S."""
    lr: float | None = Field(default=None, gt=0, le=1e30)
    """Peak learning rate of LoRI-S (0.02 if absent) or of LoRA (0.002 if absent)."""
    calibration_lr: float = Field(default=5e-3, gt=0, le=1e30)
    """Peak learning rate of LoRI-D."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of a phase's steps in which the learning rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up: it falls to zero (cosine) or stays (constant)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay, on the trained parameters only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm, taken over all parameters together."""
    batch_size: int = Field(default=0, ge=0)
    """Examples of a step; 0 to use `batch_tokens`."""
    batch_tokens: int = Field(default=1024, ge=1)
    """Examples are drawn until a step has this many tokens, if `batch_size` is 0. Also the size of a batch of held-out examples,
    in tokens."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches in which each process computes a step. N processes with 1 train the same as one process with N."""
    max_length: int = Field(default=1024, ge=2)
    """Maximum tokens of an example. Longer examples are bad rows; none is cut."""
    seed: int = Field(default=0, ge=0, lt=2**32 - 1)
    """Seed for the order of the data."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints, if nothing is held out."""
    resume: bool = False
    """Resumes from the checkpoint beside `output`."""
    held_out: list[Source] = Field(default=[])
    """Rows to measure the loss on during training. The best checkpoint becomes the adapter."""
    held_out_fraction: float = Field(default=0, ge=0, lt=1)
    """Fraction of `data` to hold out, if there is no `held_out`: the loss on those rows is measured during training, and the best
    checkpoint becomes the adapter."""
    eval_every: int = Field(default=50, ge=1)
    """Steps between evaluations, and between checkpoints, if something is held out."""
    patience: int = Field(default=0, ge=0)
    """Stops a phase after this many evaluations in a row without an improvement; 0 never stops early."""
    tensorboard: Path | None = None
    """A folder for TensorBoard logs."""
    report: Path | None = None
    """An HTML page to write about the run: loss curves, the mask, answers before and after."""
    prompt_statistics: bool = True
    """Measures the prompts of `data` at the end, for requests with automatic weights, if there are enough and the base has a
    background. It takes three passes over at most 800 rows of each form, and 2,400 in all."""
    background: Path | None = None
    """The base's background, see `python -m training.background`; by default the one that comes with the embedded model."""
    fsdp: bool = False
    """Shards the model over the processes of `torchrun`, for base models that do not fit one device."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base's weights and matrix products. B is always trained in fp32."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads; 0 means as many as there are CPUs that other processes leave idle. --resume uses the same number again."""

    @classmethod
    def overridden_options(cls, flags: Mapping[str, Any], recipe: Mapping[str, Any]) -> set[str]:
        """See `CommandLine`. Also drops the recipe's `lr` if a flag changes the method from or to LoRA."""
        dropped = {dependent for option, dependents in DEPENDENT_OPTIONS.items() if option in flags for dependent in dependents}
        recipe_method, method = recipe.get("method"), flags.get("method", recipe.get("method"))
        return dropped | {"lr"} if (recipe_method == "lora") != (method == "lora") else dropped

    @model_validator(mode="after")
    def _check_combinations(self) -> "FitConfig":
        if faults := [*self._name_faults(), *self._unused_options(), *self._conflicts()]:
            raise ValueError("; ".join(faults))
        return self

    def _name_faults(self) -> Iterator[str]:
        try:
            check_name(self.output.name)
        except AdapterError as error:
            yield f"--output ends in {self.output.name!r}, which is to be the adapter's name: {error}"
        if self.output.suffix == CHECKPOINT_SUFFIX:
            yield f"--output ends in {CHECKPOINT_SUFFIX}, as the folders of checkpoints do"
        if self.report and self._is_in_output_folders(self.report):
            yield "--report is in the adapter's own folder or that of its checkpoints, which the next training replaces"
        if self.tensorboard and self._is_in_output_folders(self.tensorboard / self.output.name):
            fault = f"puts its logs, {self.output.name}/…, into the adapter's own folder or that of its checkpoints"
            yield f"--tensorboard {self.tensorboard} {fault}"
        if self.report and self.report.is_dir():
            yield f"--report {self.report} is a folder, expected a file's name, such as {self.report / 'report.html'}"
        if self.weight_range and not (len(self.weight_range) == 2 and self.weight_range[0] <= self.weight_range[1]):
            yield f"--weight-range is {self.weight_range}, expected two numbers, the lower one first"
        if len(set(self.template)) != len(self.template):
            yield f"--template names one twice: {self.template}"

    def _is_in_output_folders(self, path: Path) -> bool:
        return any(path.resolve().is_relative_to(folder.resolve()) for folder in (self.output, self.checkpoints))

    def _unused_options(self) -> Iterator[str]:
        """Yield a fault for each option that was given as a flag and would have no effect."""
        given = self.model_fields_set - self._recipe_options()
        is_evaluated = bool(self.held_out or self.held_out_fraction)
        for names, is_used, needs in (
            (("sparsity", "granularity", "mask_from", "avoid"), self.method == "lori", "--method lori"),
            (("calibration_steps", "calibration_epochs"), self.method == "lori" and not self.mask_from, "a LoRI-D of its own"),
            (("calibration_lr",), self.method != "lora" and not self.mask_from, "a LoRI-D"),
            (("lr",), self.method != "lori-d", "LoRI-S or LoRA; LoRI-D's is --calibration-lr"),
            (("beta",), self.loss == "dpo", "--loss dpo"),
            (("background",), self.prompt_statistics, "--prompt-statistics"),
            (("mix_fraction",), bool(self.mix), "--mix"),
            (("weight_range",), self.method != "lora", "LoRI"),
            (("basis_seed", "stream"), self.method != "lora", "LoRI, whose A they draw; LoRA's is drawn by --seed"),
            (("epochs",), not self.steps, "--steps 0"),
            (("calibration_epochs",), not self.calibration_steps, "--calibration-steps 0"),
            (("batch_tokens",), is_evaluated or not self.batch_size, "--batch-size 0, or held-out rows"),
            (("save_every",), not is_evaluated, "runs without held-out rows; with them --eval-every says it"),
            (("eval_every", "patience"), is_evaluated, "--held-out or --held-out-fraction"),
        ):
            yield from (f"--{name.replace('_', '-')} is for {needs}" for name in names if name in given and not is_used)

    def _recipe_options(self) -> set[str]:
        """Return the options whose values come from the recipe. They may be unused: a recipe serves all methods."""
        fields = type(self).model_fields
        recipe = read_recipe(self.recipe, fields) if self.recipe else {}
        values = {name: TypeAdapter[Any](fields[name].annotation or Any).validate_python(value) for name, value in recipe.items()}
        return {name for name, value in values.items() if value == getattr(self, name)}

    def _conflicts(self) -> Iterator[str]:
        if self.held_out and self.held_out_fraction:
            yield "--held-out and --held-out-fraction exclude each other"
        if self.loss == "dpo" and self.mix:
            yield "--loss dpo is held to the base by itself, and has no --mix"
        if self.method == "lora" and self.fsdp:
            yield "--method lora is a baseline, and has no --fsdp"

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints, which exists until the run has finished."""
        return self.output.with_name(self.output.name + CHECKPOINT_SUFFIX)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate of LoRI-S, or of LoRA."""
        return self.lr or (LORA_LR if self.method == "lora" else LORI_LR)

    @property
    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the run it continues."""
        may_differ = {"recipe", "resume", "save_every", "output", "accumulation", "report", "tensorboard", "about", "prepare"}
        may_differ |= {"prompt_statistics", "background"}
        return self.model_dump(mode="json", exclude=may_differ)
