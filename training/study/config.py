"""Everything that `python -m training.study` can be told, each default written once."""

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

ANY_OUTPUT = {"recipe", "output", "claims", "seeds", "threads"}
"""What may differ among those who share an output."""
Claim = Literal["single", "merges", "continual", "sparsity", "granularity"]


class TaskConfig(BaseModel):
    """A task: what is learnt, and what is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train: list[Source]
    """What is learnt."""
    test: Source
    """What is measured on."""
    metric: MetricName
    """See `python -m training.evaluate`. Not pass, which runs programs that the model writes."""
    figure: str
    """Which of the metric's figures is the task's score."""
    beside: str | None = None
    """Another of its figures, which is told beside the score."""
    is_loss: bool = False
    """The lower the better."""

    @field_validator("metric")
    @classmethod
    def _runs_nothing(cls, metric: MetricName) -> MetricName:
        if metric == "pass":
            raise ValueError("pass runs programs that the model writes: python -m training.evaluate --execute-code measures it")
        return metric


def _task(name: str, metric: MetricName, figure: str, **more: Any) -> TaskConfig:
    train, test = [Source(path=f"{name}/train.jsonl")], Source(path=f"{name}/test.jsonl")
    return TaskConfig(train=train, test=test, metric=metric, figure=figure, **more)


SAFETY = "safety"
TASKS = {
    "intent": _task("intent", "exact", "exact_match"),
    "math": _task("math", "loss", "loss", is_loss=True),
    "nlu": _task("nlu", "choice", "accuracy_by_character", beside="accuracy"),
    "safety": _task("safety", "refusal", "refused/harmful", beside="refused/benign"),
}


class StudyConfig(CommandLine):
    """Reruns the method's claims (arXiv 2504.07448) at the scale of the base and data it is given, and writes what comes out."""

    recipe: str | None = None
    """A YAML file of these options. Flags win over it."""
    data: DirectoryPath
    """The folder that the tasks' paths are in."""
    output: Path
    """A folder for adapters, results, tables and plots. What is in it already is not done again."""
    claims: list[Claim] = Field(default=["single", "merges", "continual", "sparsity", "granularity"], min_length=1)
    """single: base, LoRA, LoRI-D and LoRI-S alone. merges: of several adapters. continual: safety, then a task. sparsity and
    granularity: of the mask."""
    tasks: dict[str, TaskConfig] = Field(default_factory=lambda: dict(TASKS))
    """By name. One called safety is what continual learning begins with. Meant for a recipe, not for the command line:
    `tasks: {sums: {train: [sums/train.jsonl], test: sums/test.jsonl, metric: loss, figure: loss, is_loss: true}}`."""
    merges: list[str] = Field(default=[])
    """Sets of tasks to merge, such as math+safety; all sets of two or more where none is named."""
    swept: list[str] = Field(default=["intent", "math"])
    """The tasks of the claims continual, sparsity and granularity."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32 - 1)]] = Field(default=[0, 1, 2], min_length=1)
    """Of the order of the data, and of LoRA's A. Several processes may share an output, each with its own seeds."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products of the base."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 is as many as there are CPUs that other processes leave free when the study begins; a training may take
    fewer, and one that was cut off goes on with as many as it had."""
    rank: Rank = 32
    """Rows of A (r); alpha is twice as much."""
    steps: int = Field(default=60, ge=3)
    """Optimizer steps of each phase."""
    batch_tokens: int = Field(default=512, ge=1)
    """Tokens of a step, or a little more."""
    max_length: int = Field(default=512, ge=2)
    """Longer examples are left out."""
    lr: float = Field(default=LORI_LR, gt=0)
    """LoRI-S's peak learning rate."""
    calibration_lr: float = Field(default=5e-3, gt=0)
    """LoRI-D's."""
    lora_lr: float = Field(default=LORA_LR, gt=0)
    """LoRA's."""
    num_rows: int = Field(default=300, ge=1)
    """Rows of each task that single adapters are measured on, drawn once."""
    num_merge_rows: int = Field(default=100, ge=1)
    """Rows that merges are measured on: there are many."""
    weights: list[float] = Field(default=[0.5, 0.7, 1.0])
    """The weights of merges, the same for each adapter, to two digits; 1/n is always among them."""
    num_mixed: int = Field(default=150, ge=1)
    """Prompts of each other task that the base answers itself, to be mixed in."""

    @field_validator("tasks")
    @classmethod
    def _names_adapters(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        for name in tasks:
            if not NAME.fullmatch(longest := f"{SAFETY}-then-{name}-disjoint"):
                raise ValueError(f"{name!r} is a part of adapters' names, and {longest!r} does not match {NAME.pattern}")
        return tasks

    @model_validator(mode="after")
    def _none_is_named_twice(self) -> "StudyConfig":
        for flag, named in (
            ("--seeds", self.seeds),
            ("--swept", self.swept),
            ("--merges", [tuple(sorted(tasks)) for tasks in self.merged_tasks]),
            ("--weights", [f"{weight:.2f}" for weight in self.weights]),
        ):
            if len(set(named)) != len(named):
                raise ValueError(f"{flag} names one twice: {named}")
        if unmerged := [tasks for tasks in self.merged_tasks if len({*tasks}) != len(tasks) or len(tasks) < 2]:
            raise ValueError(f"--merges has {'+'.join(unmerged[0])}, expected two tasks or more, each once")
        return self

    @model_validator(mode="after")
    def _tasks_are_known(self) -> "StudyConfig":
        asked: dict[str, Collection[str]] = {"--merges": [name for tasks in self.merged_tasks for name in tasks]}
        if set(self.claims) - {"single", "merges"}:
            asked["--swept"] = self.swept
        if "continual" in self.claims:
            asked["--claims continual"] = [SAFETY]
        for flag, names in asked.items():
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
        """What all that is in one output must have in common."""
        return self.model_dump_json(exclude=ANY_OUTPUT | {"merges", "swept", "weights"})

    def options_of(self, claim: Claim) -> dict[str, Any]:
        """Return what decides what a claim finds with a seed, the data apart: they may lie elsewhere."""
        of_others = {"merges": {"swept"}, "single": {"swept", "merges", "weights"}}.get(claim, {"merges", "weights"})
        return self.model_dump(mode="json", exclude=ANY_OUTPUT | {"data"} | of_others)

    @property
    def alpha(self) -> int:
        """The paper's choice, 2 r."""
        return 2 * self.rank
