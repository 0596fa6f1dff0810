"""The adapters and measurements of a study, each made when it is first needed.

Adapters and figures are stored in the output's folder, one file for each measurement, so that an interrupted study can go on.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lori.base_model import BaseModel
from lori.errors import LoriError
from lori.format import load_adapter
from lori.merge_options import DEFAULTS, MergeOptions
from lori.resources import threads_restored
from lori.store.files import replace_file
from training.answer import AnswerConfig, select_rows, write_answers
from training.config import FitConfig
from training.data import Row, Source
from training.evaluation.figures import Figures
from training.evaluation.local_adapters import AdapterSelection, apply_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.metrics import measure, read_metric_rows
from training.fit import fit
from training.study.config import StudyConfig

logger = logging.getLogger(__name__)


class StudyError(LoriError):
    """A study that cannot be started or continued."""


class Lab:
    """The adapters and measurements of one seed."""

    def __init__(self, config: StudyConfig, base: BaseModel, seed: int) -> None:
        self.config, self.base, self.seed = config, base, seed
        self.folder = config.output / f"seed-{seed}"

    @property
    def rates(self) -> dict[str, Any]:
        """The learning rates of both phases of LoRI, as options of `fit`."""
        return {"lr": self.config.lr, "calibration_lr": self.config.calibration_lr}

    @cached_property
    def instruction_tasks(self) -> list[str]:
        """The tasks whose data has ordinary instructions, which are prompts without a completion."""
        tasks = [task for task, task_config in self.config.tasks.items() if task_config.metric == "refusal"]
        return [task for task in tasks if select_rows(self._answer_config(task, 0))]

    def adapter(
        self, name: str, task: str, mixed_tasks: Iterable[str] = (), *, mixes_instructions: bool = False, **options: Any
    ) -> Path:
        """Return the folder of the adapter `name`. If it does not exist, train it on `task` with these `options` of `fit`.

        Prompts of `mixed_tasks` and, with `mixes_instructions`, ordinary instructions are mixed in with the base's own answers.
        """
        folder = self.folder / "adapters" / name
        if folder.is_dir():
            return folder
        config = self.config
        shared = {
            "output": folder, "data": self._train_sources(task),
            "mix": self._mix_sources(task, mixed_tasks, mixes_instructions), "on_bad": "skip",
            "model": config.model, "dtype": config.dtype, "template": ["plain"],
            "rank": config.rank, "alpha": config.alpha, "steps": config.steps, "seed": self.seed,
            "batch_tokens": config.batch_tokens, "max_length": config.max_length,
            "resume": (folder.parent / f"{name}.checkpoint").is_dir(), "threads": config.threads,
        }  # fmt: skip
        logger.info("seed %d: training %s", self.seed, name)
        with threads_restored():  # a training may use fewer threads; later trainings must not
            return fit(FitConfig.model_validate(shared | options), f"# {name} of python -m training.study, seed {self.seed}")

    def figures(
        self,
        name: str,
        task: str,
        adapters: Sequence[Path],
        weights: Sequence[float] = (1.0,),
        options: MergeOptions = DEFAULTS,
        num_rows: int | None = None,
    ) -> Figures:
        """Return the figures of `task` with `adapters` applied at `weights`. They are measured if no file of `name` exists."""
        num_rows = num_rows or self.config.num_rows
        file = self.folder / "results" / f"{name}.{task}.{num_rows}.json"
        if not file.is_file():
            logger.info("seed %d: measuring %s on %s", self.seed, name, task)
            loaded = [load_adapter(folder, self.base.identity) for folder in adapters]
            selection, rows = AdapterSelection(loaded, weights[: len(loaded)], options), self._rows(task, num_rows)
            with apply_adapter(self.base.model, selection.merged()):
                figures = measure(self.config.tasks[task].metric, LocalAnswerer(self.base.model, self.base.tokenizer), rows)
            if missing := {self.config.tasks[task].figure, self.config.tasks[task].beside} - {None, *figures}:
                raise StudyError(f"{task} has no figure {missing.pop()!r}: its metric has {', '.join(figures)}")
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(figures).encode())
        result: Figures = json.loads(file.read_text())
        return result

    def _mix_sources(self, task: str, mixed_tasks: Iterable[str], mixes_instructions: bool) -> list[Source]:
        # On benign prompts the adapter should answer as the base does, even if the base's answer is empty.
        instructions = [self._answers_file(other, 0) for other in self.instruction_tasks if mixes_instructions or other == task]
        return [
            Source(path=str(file))
            for file in (*instructions, *(self._answers_file(other, self.config.num_mixed) for other in mixed_tasks))
        ]

    def _rows(self, task: str, num_rows: int) -> list[Row]:
        task_config = self.config.tasks[task]
        return read_metric_rows(self._resolved(task_config.test), task_config.metric, num_rows)

    def _train_sources(self, task: str) -> list[Source]:
        return [self._resolved(source) for source in self.config.tasks[task].train]

    def _resolved(self, source: Source) -> Source:
        """Return `source` with its path relative to the data folder, if such a file exists."""
        file = self.config.data / source.path
        return source.model_copy(update={"path": str(file)}) if file.exists() else source

    def _answers_file(self, task: str, num_rows: int) -> Path:
        """Return a file of the base's own answers to `num_rows` of the task's prompts, or if 0 to those without a completion."""
        config = self._answer_config(task, num_rows)
        if not config.output.is_file():
            write_answers(self.base, select_rows(config), config)
        return config.output

    def _answer_config(self, task: str, num_rows: int) -> AnswerConfig:
        return AnswerConfig(
            data=self._train_sources(task), output=self.folder / "answers" / f"{task}-{num_rows or 'unanswered'}.jsonl",
            template="plain", on_bad="skip", only_unanswered=not num_rows, num_rows=num_rows,
            max_tokens=24 if num_rows else 40, seed=self.seed,
        )  # fmt: skip
