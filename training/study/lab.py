"""What a study works with: adapters that are trained when they are first asked for, and measurements that are made once.

Everything is written down in the output's folder, one file a measurement, so that a study that was cut off goes on.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.durable import replace_file
from lori.format import load_adapter
from lori.merge_options import DEFAULTS, MergeOptions
from training.answer import AnswerConfig, answers, chosen_rows
from training.config import FitConfig
from training.data import Row, Source
from training.evaluation.figures import Figures
from training.evaluation.local_adapters import Choice, applied
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.metrics import measure, read_measured
from training.fit import fit
from training.study.config import StudyConfig

logger = logging.getLogger(__name__)


class Lab:
    """One seed's adapters and measurements."""

    def __init__(self, config: StudyConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = config.output / f"seed-{seed}"
        if config.threads:
            torch.set_num_threads(config.threads)

    @cached_property
    def base(self) -> BaseModel:
        """The base that is measured on, alone or with adapters applied."""
        return load_base_model(self.config.model, resolve_dtype(self.config.dtype))

    def adapter(self, name: str, task: str, **options: Any) -> Path:
        """Returns the folder of the adapter called `name`, trained on `task` with these `options` of `fit` if it is not there."""
        folder = self.folder / "adapters" / name
        if folder.is_dir():
            return folder
        config = self.config
        shared = {
            "output": folder, "data": self._train(task), "on_bad": "skip", "model": config.model, "dtype": config.dtype,
            "template": ["plain"], "rank": config.rank, "alpha": config.alpha, "steps": config.steps, "seed": self.seed,
            "batch_tokens": config.batch_tokens, "max_length": config.max_length, "lr": config.lr,
            "calibration_lr": config.calibration_lr, "resume": True, "save_every": 10**6,
        }  # fmt: skip
        logger.info("seed %d: training %s", self.seed, name)
        return fit(FitConfig.model_validate(shared | options), f"python -m training.study: {name}")

    def measured(
        self,
        name: str,
        task: str,
        adapters: Sequence[Path],
        weights: Sequence[float] = (1.0,),
        options: MergeOptions = DEFAULTS,
        num_rows: int | None = None,
    ) -> Figures:
        """Returns the figures of `task` with `adapters` applied at `weights`, measured if `name` was not yet."""
        num_rows = num_rows or self.config.num_rows
        file = self.folder / "results" / f"{name}.{task}.{num_rows}.json"
        if not file.is_file():
            logger.info("seed %d: measuring %s on %s", self.seed, name, task)
            loaded = [load_adapter(folder, self.base.identity) for folder in adapters]
            choice, rows = Choice(loaded, weights[: len(loaded)], options), self._rows(task, num_rows)
            with applied(self.base.model, choice.merged()):
                figures = measure(self.config.tasks[task].metric, LocalAnswerer(self.base.model, self.base.tokenizer), rows)
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(figures).encode())
        found: Figures = json.loads(file.read_text())
        return found

    def mixed(self, tasks: Iterable[str]) -> list[Source]:
        """Returns what the base itself answers to prompts of `tasks`."""
        return [Source(path=str(self._answered(task, self.config.num_mixed))) for task in tasks]

    def _rows(self, task: str, num_rows: int) -> list[Row]:
        chosen = self.config.tasks[task]
        return read_measured(str(self.config.data / chosen.test), chosen.metric, num_rows)

    def _train(self, task: str) -> list[Source]:
        """Returns the task's sources. Rows that have no completion are answered by the base itself."""
        found = [self._placed(source) for source in self.config.tasks[task].train]
        return [*found, Source(path=str(self._answered(task, 0)))] if self.config.tasks[task].metric == "refusal" else found

    def _placed(self, source: Source) -> Source:
        file = self.config.data / source.path
        return source.model_copy(update={"path": str(file)}) if file.exists() else source

    def _answered(self, task: str, num_rows: int) -> Path:
        """Returns a file of the base's own answers: to `num_rows` of the task's prompts, or to those without a completion."""
        file = self.folder / "answers" / f"{task}-{num_rows or 'unanswered'}.jsonl"
        if not file.is_file():
            asked = AnswerConfig(
                data=[self._placed(source) for source in self.config.tasks[task].train], output=file, template="plain", only_unanswered=not num_rows, num_rows=num_rows,
                max_tokens=24 if num_rows else 40, seed=self.seed,
            )  # fmt: skip
            torch.manual_seed(self.seed)
            rows = [json.dumps(row) for row in answers(self.base, chosen_rows(asked), asked)]
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, ("\n".join(rows) + "\n").encode())
        return file
