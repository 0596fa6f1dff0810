"""The options of `python -m training.study`. Each default is written once, here."""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, field_validator, model_validator

from lori.config import Rank
from lori.names import NAME
from training.command_line import CommandLine
from training.config import LORA_LR, LORI_LR
from training.data import Source
from training.evaluation.metrics import MetricName

FREE_OPTIONS = {"recipe", "output", "claims", "seeds", "threads"}
"""Options that may differ between processes that share an output."""
Claim = Literal["single", "merges", "continual", "sparsity", "granularity"]


class TaskConfig(BaseModel):
    """A task: its data and its metric."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train: list[Source]
    """Training data."""
    test: Source
    """Test data."""
    metric: MetricName
    """See `python -m training.evaluate`. pass is not allowed, since it runs programs that the model writes."""
    figure: str
    """The figure of the metric that is the task's score."""
    beside: str | None = None
    """Another figure of the metric, which is reported beside the score."""
    is_loss: bool = False
    """Whether a lower score is better."""

    @field_validator("metric")
    @classmethod
    def _refuse_pass(cls, metric: MetricName) -> MetricName:
        if metric == "pass":
            raise ValueError("pass runs programs that the model writes: python -m training.evaluate --execute-code measures it")
        return metric


def _task(name: str, metric: MetricName, figure: str, **options: Any) -> TaskConfig:
    train, test = [Source(path=f"{name}/train.jsonl")], Source(path=f"{name}/test.jsonl")
    return TaskConfig(train=train, test=test, metric=metric, figure=figure, **options)


SAFETY = "safety"
TASKS = {
    "intent": _task("intent", "exact", "exact_match"),
    "math": _task("math", "loss", "loss", is_loss=True),
    "nlu": _task("nlu", "choice", "accuracy_by_character", beside="accuracy"),
    "safety": _task("safety", "refusal", "refused/harmful", beside="refused/benign"),
}


class StudyConfig(CommandLine):
    """Test the method's claims (arXiv 2504.07448) on a given base model and data, and write the results."""

    recipe: str | None = None
    """A YAML file of these options. Flags override it."""
    data: DirectoryPath
    """The folder that the tasks' paths are relative to."""
    output: Path
    """The folder for adapters, results, tables and plots. Results that exist there already are not computed again."""
    claims: list[Claim] = Field(default=["single", "merges", "continual", "sparsity", "granularity"], min_length=1)
    """single: base, LoRA, LoRI-D and LoRI-S alone. merges: merges of several adapters. continual: safety, then another task.
    sparsity, granularity: LoRI-S at several sparsities and granularities of the mask."""
    tasks: dict[str, TaskConfig] = Field(default_factory=lambda: dict(TASKS))
    """The tasks by name. Continual learning starts with the task called safety. Set them in a recipe rather than by a flag:
    `tasks: {sums: {train: [sums/train.jsonl], test: sums/test.jsonl, metric: loss, figure: loss, is_loss: true}}`."""
    merges: list[str] = Field(default=[])
    """Sets of tasks to merge, such as math+safety. If absent, all sets of two or more tasks."""
    swept: list[str] = Field(default=["intent", "math"])
    """The tasks of the claims continual, sparsity and granularity."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32 - 1)]] = Field(default=[0, 1, 2], min_length=1)
    """Seeds for the order of the data and for LoRA's A. Several processes may share an output, each with its own seeds."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the base's weights and matrix products."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 means as many as there are CPUs that other processes leave idle when the study begins. A training may use
    fewer, and a resumed training uses as many as it began with."""
    rank: Rank = 32
    """Rows of A (r). Alpha is 2 r."""
    steps: int = Field(default=60, ge=3)
    """Optimizer steps of each phase."""
    batch_tokens: int = Field(default=512, ge=1)
    """Minimum tokens of a step; examples are drawn until it has as many."""
    max_length: int = Field(default=512, ge=2)
    """Maximum tokens of an example. Longer examples are left out."""
    lr: float = Field(default=LORI_LR, gt=0)
    """Peak learning rate of LoRI-S."""
    calibration_lr: float = Field(default=5e-3, gt=0)
    """Peak learning rate of LoRI-D."""
    lora_lr: float = Field(default=LORA_LR, gt=0)
    """Peak learning rate of LoRA."""
    num_rows: int = Field(default=300, ge=1)
    """Number of rows of each task to measure single adapters on, drawn once."""
    num_merge_rows: int = Field(default=100, ge=1)
    """Number of rows of each task to measure merges on. It is smaller, since there are many merges."""
    weights: list[float] = Field(default=[0.5, 0.7, 1.0])
    """Weights of merges, to two digits. All adapters of a merge have the same weight. 1/n is always added."""
    num_mixed: int = Field(default=150, ge=1)
    """Number of prompts of each other task to mix in, with the base's own answers."""

    @field_validator("tasks")
    @classmethod
    def _check_names(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        for name in tasks:
            if not NAME.fullmatch(longest := f"{SAFETY}-then-{name}-disjoint"):
                raise ValueError(f"{name!r} is a part of adapters' names, and {longest!r} does not match {NAME.pattern}")
        return tasks

    @model_validator(mode="after")
    def _check_duplicates(self) -> "StudyConfig":
        for flag, values in (
            ("--seeds", self.seeds),
            ("--swept", self.swept),
            ("--merges", [tuple(sorted(tasks)) for tasks in self.merged_tasks]),
            ("--weights", [f"{weight:.2f}" for weight in self.weights]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{flag} names one twice: {values}")
        if invalid := [tasks for tasks in self.merged_tasks if len({*tasks}) != len(tasks) or len(tasks) < 2]:
            raise ValueError(f"--merges has {'+'.join(invalid[0])}, expected two tasks or more, each once")
        return self

    @model_validator(mode="after")
    def _check_task_names(self) -> "StudyConfig":
        used_tasks: dict[str, Collection[str]] = {"--merges": [name for tasks in self.merged_tasks for name in tasks]}
        if set(self.claims) - {"single", "merges"}:
            used_tasks["--swept"] = self.swept
        if "continual" in self.claims:
            used_tasks["--claims continual"] = [SAFETY]
        for flag, names in used_tasks.items():
            if unknown := sorted(set(names) - set(self.tasks)):
                raise ValueError(f"{flag}: there is no task {', '.join(unknown)}: known are {', '.join(self.tasks)}")
        return self

    @property
    def merged_tasks(self) -> list[tuple[str, ...]]:
        """The sets of tasks to merge."""
        if self.merges:
            return [tuple(tasks.split("+")) for tasks in self.merges]
        return [tasks for size in range(2, len(self.tasks) + 1) for tasks in itertools.combinations(self.tasks, size)]

    @property
    def identity(self) -> str:
        """The options, as JSON, that all studies in one output must share."""
        return self.model_dump_json(exclude=FREE_OPTIONS | {"merges", "swept", "weights"})

    def options_of(self, claim: Claim) -> dict[str, Any]:
        """Return the options that determine a claim's results with a seed, except `data`, since the data may have moved."""
        unused = {"merges": {"swept"}, "single": {"swept", "merges", "weights"}}.get(claim, {"merges", "weights"})
        return self.model_dump(mode="json", exclude=FREE_OPTIONS | {"data"} | unused)

    @property
    def alpha(self) -> int:
        """Alpha of all adapters: 2 r, as in the paper."""
        return 2 * self.rank
