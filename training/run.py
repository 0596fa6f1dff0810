"""A training run: its phases in order, each resumed from its last checkpoint. Knows nothing of masks and adapters."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import TrainerCallback

from lori.config import CONFIG_FILE
from lori.flags import flag_of
from lori.resources import use_threads
from lori.store.files import discard, remove_folder, replace_file
from training.batches import BatchSize, draw_weights, held_out_batches, plan_steps
from training.checkpoints import MarkComplete, last_complete_checkpoint
from training.config import FitConfig
from training.data import DataError, Item
from training.loss import CompletionLoss, Loss, PreferenceLoss
from training.methods import TrainingMethod
from training.phase import Outcome, Phase, outcome_of, phases_of
from training.processes import processes
from training.progress import EarlyStopping, Progress, tensorboard_callback
from training.trainer import PhaseTrainer, load_parameters, training_arguments

logger = logging.getLogger(__name__)

LOCK_FILE, RUN_FILE, SECONDS_FILE, THREADS_FILE = "lock", "run.json", "seconds.json", "threads.json"
TRAINED_FILE, OUTCOME_FILE = "trained.safetensors", "outcome.json"
"""Files of a finished phase in its folder. `OUTCOME_FILE` is written last."""


class Parallelism(BaseModel):
    """Content of `THREADS_FILE`: the number of processes a run began with, and the CPU threads of each."""

    processes: int = Field(ge=1)
    threads: int = Field(ge=1, le=1024)


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a run: training data, examples to mix in, and held-out examples."""

    data: Sequence[Item]
    mix: Sequence[Item] = ()
    held_out: Sequence[Item] = ()

    def __str__(self) -> str:
        counts = (("of the task", self.data), ("mixed in", self.mix), ("held out", self.held_out))
        return ", ".join(f"{len(items)} {role}" for role, items in counts if items)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all examples. A run is resumed only with the same examples."""
        sha = hashlib.sha256()
        for items in (self.data, self.mix, self.held_out):
            for example in (example for item in items for example in item.examples):
                sha.update(f"{example.num_prompt} {example.ids} ".encode())
            sha.update(b"/")
        return sha.hexdigest()


def is_finished(config: FitConfig) -> bool:
    """Return whether the adapter exists and no newer run of it has begun."""
    return (config.output / CONFIG_FILE).is_file() and not config.checkpoints.exists()


def create_run_folder(config: FitConfig) -> None:
    """Create the run's folder. Call this before anything slow, so that an older adapter is not taken for the run's result.

    Raises `DataError` if another run writes there, or has not ended there and is not to be resumed.
    """
    if processes().is_main_process:
        _check_no_other_run(config)
        config.checkpoints.mkdir(parents=True, exist_ok=True)


def _check_no_other_run(config: FitConfig) -> None:
    if not config.resume and (config.checkpoints / RUN_FILE).is_file():
        lock = FileLock(config.checkpoints / LOCK_FILE)
        _acquire(lock, config.checkpoints)
        lock.release()
        raise _unfinished(config.checkpoints)


def _unfinished(folder: Path) -> DataError:
    return DataError(f"{folder} is of a run that did not end: --resume goes on with it; to start anew, remove it")


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DataError(f"another run is writing to {folder}") from error


class Run:
    """A run of one method: its phases, and the folder with their checkpoints and outcomes."""

    def __init__(self, config: FitConfig, examples: Examples, started: float) -> None:
        """Create a run. `started` is the monotonic time at which this program began to work on it."""
        self.config, self.examples = config, examples
        self._started, self._seconds = started, 0.0
        self.folder = config.checkpoints
        self.outcomes: dict[str, Outcome] = {}
        self._lock = FileLock(self.folder / LOCK_FILE)

    def train(self, method: TrainingMethod) -> None:
        """Run each phase that is not finished yet.

        Raises `DataError` if the folder holds a run with other options or data, or is damaged, and `TrainingError` if training
        fails.
        """
        with processes().main_process_first():
            if processes().is_main_process:
                self._open(method)
        self._restore_threads()
        try:
            self._train_phases(method)
        finally:
            if processes().is_main_process:
                self._save_seconds()

    def _train_phases(self, method: TrainingMethod) -> None:
        for phase in phases_of(self.config):
            method.begin_phase(phase)
            folder = self.folder / phase.name.lower()
            if not (folder / OUTCOME_FILE).is_file():
                self._train_phase(method, phase, folder)
            try:
                load_parameters(method.base.model, load_file(folder / TRAINED_FILE))
                self.outcomes[phase.name] = Outcome(**json.loads((folder / OUTCOME_FILE).read_text()))
            except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
                raise DataError(f"{folder} is damaged ({error}): remove it, and resume") from error

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, interrupted programs included. A killed program counts up to its last checkpoint."""
        return self._seconds + time.monotonic() - self._started

    def _save_seconds(self) -> None:
        replace_file(self.folder / SECONDS_FILE, json.dumps(self.seconds).encode())

    def close(self) -> None:
        """Remove the run's folder. Call this once the adapter is saved."""
        self._lock.release()  # first: a shared file system keeps an open file, and so the folder
        remove_folder(self.folder)

    def _open(self, method: TrainingMethod) -> None:
        """Lock the folder and check that it fits this run, or start a new run in it."""
        file = self.folder / RUN_FILE
        identity = self._identity(method)
        if self.folder.exists() and not file.is_file() and not all(map(_is_of_unfinished_start, self.folder.iterdir())):
            raise DataError(f"{self.folder} is there and is of no run: checkpoints are not put in it")
        self.folder.mkdir(parents=True, exist_ok=True)
        _acquire(self._lock, self.folder)
        if self.config.resume and file.is_file():
            if differences := _differences(identity, _read_json(file)):
                listed = "; ".join(differences)
                raise DataError(
                    f"{self.folder} is of a run with other options, data or base: {listed}: resume with those, or remove it"
                )
            seconds_file = self.folder / SECONDS_FILE
            self._seconds = _read_json(seconds_file) if seconds_file.is_file() else 0.0
            return
        if self.config.resume:
            logger.warning("%s has nothing to go on from: starting from the beginning", self.folder)
        elif file.is_file():
            raise _unfinished(self.folder)
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE:
                discard(path)
        parallelism = {"processes": int(processes().num_processes), "threads": torch.get_num_threads()}
        replace_file(self.folder / THREADS_FILE, json.dumps(parallelism).encode())
        replace_file(file, json.dumps(identity).encode())

    def _identity(self, method: TrainingMethod) -> dict[str, Any]:
        """Return what a resumed run must share with the run it continues: options by flag, data, base and parents."""
        return {flag_of(name): value for name, value in self.config.identity.items()} | {
            "processes times --accumulation": self._num_micro_batches,
            "the rows, as tokens,": self.examples.digest,
            "the base": method.base.identity.digest,
            "the adapters that it builds on": list(method.parents),
        }

    def _restore_threads(self) -> None:
        """Set the number of CPU threads that the run began with, since the order of sums depends on the number of threads.

        Does nothing if the options give a number of threads, or if the number of processes has changed. Raises `DataError` if the
        file with the number is damaged.
        """
        file = self.folder / THREADS_FILE
        if self.config.threads or not file.is_file():
            return
        try:
            parallelism = Parallelism.model_validate(_read_json(file))
        except ValidationError as error:
            raise DataError(f"{file} is damaged: remove it, and resume") from error
        if parallelism.processes == processes().num_processes and parallelism.threads != torch.get_num_threads():
            logger.info("computing with %d CPU threads, as the run began", parallelism.threads)
            use_threads(parallelism.threads)

    @property
    def _num_micro_batches(self) -> int:
        return int(processes().num_processes) * self.config.accumulation

    def _train_phase(self, method: TrainingMethod, phase: Phase, folder: Path) -> None:
        config, examples = self.config, self.examples
        size = BatchSize(config.batch_size, config.batch_tokens)
        steps = plan_steps(
            examples.data, examples.mix, config.mix_fraction, size, (phase.num_steps, phase.num_passes), phase.seed
        )
        step_tokens = [sum(map(len, step)) for step in steps]
        arguments = training_arguments(config, folder, phase.lr, len(steps), method.is_autocast)
        held_out = held_out_batches(examples.held_out, config.batch_tokens)
        weights: list[float] = []
        if config.weight_range:
            low, high = config.weight_range
            weights = draw_weights(len(steps), low, high, phase.seed)
        callbacks = self._callbacks(phase.name, step_tokens)
        trainer = PhaseTrainer(method.base.model, self._loss(method), arguments, steps, held_out, weights, callbacks)
        checkpoint = last_complete_checkpoint(folder) if config.resume else None
        trainer.train(str(checkpoint) if checkpoint else None)
        if arguments.should_save:
            replace_file(folder / TRAINED_FILE, save(trainer.trained_parameters()))
            replace_file(folder / OUTCOME_FILE, json.dumps(asdict(outcome_of(trainer.state, step_tokens))).encode())
            self._save_seconds()
        processes().wait_for_everyone()

    def _loss(self, method: TrainingMethod) -> Loss:
        if self.config.loss == "dpo":
            return PreferenceLoss(method.adapter_disabled, self.config.beta)
        return CompletionLoss(method.adapter_disabled)

    def _callbacks(self, phase: str, step_tokens: list[int]) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = [MarkComplete(self._save_seconds), Progress(phase, step_tokens)]
        if self.config.patience:
            callbacks.append(EarlyStopping(self.config.patience))
        if self.config.tensorboard:
            callbacks.append(tensorboard_callback(self.config.tensorboard / self.config.output.name / phase.lower()))
        return callbacks


def _is_of_unfinished_start(path: Path) -> bool:
    """Return whether a start that was cut off before it wrote `RUN_FILE` may have left `path`."""
    return path.name in (LOCK_FILE, THREADS_FILE) or path.name.startswith((f".{RUN_FILE}@", f".{THREADS_FILE}@"))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): remove {file.parent}") from error


def _differences(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    names = [name for name in actual | expected if actual.get(name) != expected.get(name)]
    return [f"{name} is {_as_text(actual.get(name))}, expected {_as_text(expected.get(name))}" for name in names]


def _as_text(value: object) -> str:
    return "absent" if value is None else json.dumps(value)
