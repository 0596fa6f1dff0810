"""What a study works with: adapters that are trained when they are first asked for, and measurements that are made once.

Everything is written down in the output's folder, one file a measurement, so that a study that was cut off goes on.
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
from training.answer import AnswerConfig, chosen_rows, write_answers
from training.config import FitConfig
from training.data import Row, Source
from training.evaluation.figures import Figures
from training.evaluation.local_adapters import Choice, applied
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.metrics import measure, read_measured
from training.fit import fit
from training.study.config import StudyConfig

logger = logging.getLogger(__name__)


class StudyError(LoriError):
    """A study cannot be made, or go on."""


class Lab:
    """One seed's adapters and measurements."""

    def __init__(self, config: StudyConfig, base: BaseModel, seed: int) -> None:
        self.config, self.base, self.seed = config, base, seed
        self.folder = config.output / f"seed-{seed}"

    @property
    def rates(self) -> dict[str, Any]:
        """The learning rates of both phases of LoRI."""
        return {"lr": self.config.lr, "calibration_lr": self.config.calibration_lr}

    @cached_property
    def instructing(self) -> list[str]:
        """The tasks that have ordinary instructions, which are prompts without a completion."""
        tasks = [task for task, its in self.config.tasks.items() if its.metric == "refusal"]
        return [task for task in tasks if chosen_rows(self._asked(task, 0))]

    def adapter(self, name: str, task: str, kept: Iterable[str] = (), *, instructed: bool = False, **options: Any) -> Path:
        """Return the folder of the adapter called `name`, trained on `task` with these `options` of `fit` if it is not there.

        It is held to the base's own answers to prompts of the tasks in `kept` and, if `instructed`, to ordinary instructions.
        """
        folder = self.folder / "adapters" / name
        if folder.is_dir():
            return folder
        config = self.config
        shared = {
            "output": folder, "data": self._train(task), "mix": self._mixed(task, kept, instructed), "on_bad": "skip",
            "model": config.model, "dtype": config.dtype, "template": ["plain"],
            "rank": config.rank, "alpha": config.alpha, "steps": config.steps, "seed": self.seed,
            "batch_tokens": config.batch_tokens, "max_length": config.max_length,
            "resume": (folder.parent / f"{name}.checkpoint").is_dir(), "threads": config.threads,
        }  # fmt: skip
        logger.info("seed %d: training %s", self.seed, name)
        with threads_restored():  # one that finds CPUs busy, or is resumed, does not slow those after it
            return fit(FitConfig.model_validate(shared | options), f"# {name} of python -m training.study, seed {self.seed}")

    def measured(
        self,
        name: str,
        task: str,
        adapters: Sequence[Path],
        weights: Sequence[float] = (1.0,),
        options: MergeOptions = DEFAULTS,
        num_rows: int | None = None,
    ) -> Figures:
        """Return the figures of `task` with `adapters` applied at `weights`, measured if `name` was not yet."""
        num_rows = num_rows or self.config.num_rows
        file = self.folder / "results" / f"{name}.{task}.{num_rows}.json"
        if not file.is_file():
            logger.info("seed %d: measuring %s on %s", self.seed, name, task)
            loaded = [load_adapter(folder, self.base.identity) for folder in adapters]
            choice, rows = Choice(loaded, weights[: len(loaded)], options), self._rows(task, num_rows)
            with applied(self.base.model, choice.merged()):
                figures = measure(self.config.tasks[task].metric, LocalAnswerer(self.base.model, self.base.tokenizer), rows)
            if missing := {self.config.tasks[task].figure, self.config.tasks[task].beside} - {None, *figures}:
                raise StudyError(f"{task} has no figure {missing.pop()!r}: its metric has {', '.join(figures)}")
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(figures).encode())
        found: Figures = json.loads(file.read_text())
        return found

    def _mixed(self, task: str, kept: Iterable[str], instructed: bool) -> list[Source]:
        # What is to be learnt of a benign prompt is to do as before, also where that is to say nothing.
        unanswered = [self._answered(other, 0) for other in self.instructing if instructed or other == task]
        return [
            Source(path=str(file)) for file in (*unanswered, *(self._answered(other, self.config.num_mixed) for other in kept))
        ]

    def _rows(self, task: str, num_rows: int) -> list[Row]:
        chosen = self.config.tasks[task]
        return read_measured(self._placed(chosen.test), chosen.metric, num_rows)

    def _train(self, task: str) -> list[Source]:
        return [self._placed(source) for source in self.config.tasks[task].train]

    def _placed(self, source: Source) -> Source:
        file = self.config.data / source.path
        return source.model_copy(update={"path": str(file)}) if file.exists() else source

    def _answered(self, task: str, num_rows: int) -> Path:
        """Return a file of the base's own answers: to `num_rows` of the task's prompts, or to those without a completion."""
        asked = self._asked(task, num_rows)
        if not asked.output.is_file():
            write_answers(self.base, chosen_rows(asked), asked)
        return asked.output

    def _asked(self, task: str, num_rows: int) -> AnswerConfig:
        return AnswerConfig(
            data=self._train(task), output=self.folder / "answers" / f"{task}-{num_rows or 'unanswered'}.jsonl", template="plain",
            on_bad="skip", only_unanswered=not num_rows, num_rows=num_rows, max_tokens=24 if num_rows else 40, seed=self.seed,
        )  # fmt: skip
