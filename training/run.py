"""A training run: its phases one after another, each from where a killed run left it. Knows nothing of masks and adapters."""

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
from training.batches import BatchSize, draw_weights, held_out_parts, plan_steps
from training.checkpoints import MarkWhole, last_whole
from training.config import FitConfig
from training.data import DataError, Item
from training.loss import CompletionLoss, Loss, PreferenceLoss
from training.methods import TrainingMethod
from training.phase import Outcome, Phase, outcome_of, phases_of
from training.processes import processes
from training.progress import Patience, Progress, tensorboard
from training.trainer import PhaseTrainer, load_parameters, training_arguments

logger = logging.getLogger(__name__)

LOCK, RUN, SECONDS, THREADS = "lock", "run.json", "seconds.json", "threads.json"
TRAINED, OUTCOME = "trained.safetensors", "outcome.json"
"""What a phase that is over leaves in its folder, the second last."""


class ThreadsNote(BaseModel):
    """How many processes a run began with, and how many CPU threads each had."""

    processes: int = Field(ge=1)
    threads: int = Field(ge=1, le=1024)


@dataclass(frozen=True, slots=True)
class Examples:
    """What a run is given: what to learn, to leave as it is, and to measure on."""

    data: Sequence[Item]
    mix: Sequence[Item] = ()
    held_out: Sequence[Item] = ()

    @property
    def digest(self) -> str:
        """sha256 (hex) of all of them: a run goes on only with the same ones."""
        sha = hashlib.sha256()
        for items in (self.data, self.mix, self.held_out):
            for example in (example for item in items for example in item.examples):
                sha.update(f"{example.num_prompt} {example.ids} ".encode())
            sha.update(b"/")
        return sha.hexdigest()


def has_ended(config: FitConfig) -> bool:
    """Whether the adapter is there, and no run that has begun since."""
    return (config.output / CONFIG_FILE).is_file() and not config.checkpoints.exists()


def begin(config: FitConfig) -> None:
    """Make the run's folder, before what may take long: an adapter that is there from before is not the result any more."""
    if processes().is_main_process:
        config.checkpoints.mkdir(parents=True, exist_ok=True)


class Run:
    """The phases of one method, and the folder in which they are written down."""

    def __init__(self, config: FitConfig, examples: Examples, started: float) -> None:
        """`started`: the monotonic time at which this part of the run began."""
        self.config, self.examples = config, examples
        self._started, self._seconds = started, 0.0
        self.folder = config.checkpoints
        self.outcomes: dict[str, Outcome] = {}
        self._lock = FileLock(self.folder / LOCK)

    def train(self, method: TrainingMethod) -> None:
        """Run each phase that is not over yet. Raises `DataError` for a run of other options or data, `TrainingError`."""
        with processes().main_process_first():
            if processes().is_main_process:
                self._open(method)
        self._use_noted_threads()
        try:
            self._train_all(method)
        finally:
            if processes().is_main_process:
                self._note_time()

    def _train_all(self, method: TrainingMethod) -> None:
        for phase in phases_of(self.config):
            method.begin(phase)
            folder = self.folder / phase.name.lower()
            if not (folder / OUTCOME).is_file():
                self._train(method, phase, folder)
            try:
                load_parameters(method.base.model, load_file(folder / TRAINED))
                self.outcomes[phase.name] = Outcome(**json.loads((folder / OUTCOME).read_text()))
            except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
                raise DataError(f"{folder} is damaged ({error}): remove it, and resume") from error

    @property
    def seconds(self) -> float:
        """What the run has taken, with the parts of it that were cut off: those of a kill count to their last checkpoint."""
        return self._seconds + time.monotonic() - self._started

    def _note_time(self) -> None:
        replace_file(self.folder / SECONDS, json.dumps(self.seconds).encode())

    def close(self) -> None:
        """Remove the folder: the adapter is saved."""
        self._lock.release()  # first: a shared file system keeps an open file, and with it the folder
        remove_folder(self.folder)

    def _open(self, method: TrainingMethod) -> None:
        file = self.folder / RUN
        identity = self._identity(method)
        if self.folder.exists() and not file.is_file() and not all(map(_is_of_a_start, self.folder.iterdir())):
            raise DataError(f"{self.folder} is there and is of no run: checkpoints are not put in it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        if self.config.resume and file.is_file():
            if others := _differences(identity, _read(file)):
                said = "; ".join(others)
                raise DataError(
                    f"{self.folder} is of a run with other options, data or base: {said}: resume with those, or remove it"
                )
            noted = self.folder / SECONDS
            self._seconds = _read(noted) if noted.is_file() else 0.0
            return
        if self.config.resume:
            logger.warning("%s has nothing to go on from: starting from the beginning", self.folder)
        elif file.is_file():
            raise DataError(f"{self.folder} is of a run that did not end: --resume goes on with it; to start anew, remove it")
        for path in self.folder.iterdir():
            if path.name != LOCK:
                discard(path)
        note = {"processes": int(processes().num_processes), "threads": torch.get_num_threads()}
        replace_file(self.folder / THREADS, json.dumps(note).encode())
        replace_file(file, json.dumps(identity).encode())

    def _identity(self, method: TrainingMethod) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with: the options by flag, and what they led to."""
        return {flag_of(name): value for name, value in self.config.identity.items()} | {
            "processes times --accumulation": self._num_parts,
            "the rows, as tokens,": self.examples.digest,
            "the base": method.base.identity.digest,
            "the adapters that it builds on": list(method.parents),
        }

    def _use_noted_threads(self) -> None:
        """Compute with as many threads as the run began with: the order of sums depends on it.

        Not where the options name a number, nor where more or fewer processes share the machine now. Raises `DataError`.
        """
        noted = self.folder / THREADS
        if self.config.threads or not noted.is_file():
            return
        try:
            note = ThreadsNote.model_validate(_read(noted))
        except ValidationError as error:
            raise DataError(f"{noted} is damaged: remove it, and resume") from error
        if note.processes == processes().num_processes and note.threads != torch.get_num_threads():
            logger.info("computing with %d CPU threads, as the run began", note.threads)
            use_threads(note.threads)

    def _take(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise DataError(f"another run is writing to {self.folder}") from error

    @property
    def _num_parts(self) -> int:
        return int(processes().num_processes) * self.config.accumulation

    def _train(self, method: TrainingMethod, phase: Phase, folder: Path) -> None:
        config, examples = self.config, self.examples
        size = BatchSize(config.batch_size, config.batch_tokens)
        steps = plan_steps(
            examples.data, examples.mix, config.mix_fraction, size, (phase.num_steps, phase.num_passes), phase.seed
        )
        step_tokens = [sum(map(len, step)) for step in steps]
        arguments = training_arguments(config, folder, phase.lr, len(steps), method.is_autocast)
        held_out = held_out_parts(examples.held_out, config.batch_tokens)
        weights: list[float] = []
        if config.weight_range:
            low, high = config.weight_range
            weights = draw_weights(len(steps), low, high, phase.seed)
        callbacks = self._callbacks(phase.name, step_tokens)
        trainer = PhaseTrainer(method.base.model, self._loss(method), arguments, steps, held_out, weights, callbacks)
        checkpoint = last_whole(folder) if config.resume else None
        trainer.train(str(checkpoint) if checkpoint else None)
        if arguments.should_save:
            replace_file(folder / TRAINED, save(trainer.trained()))
            replace_file(folder / OUTCOME, json.dumps(asdict(outcome_of(trainer.state, step_tokens))).encode())
            self._note_time()
        processes().wait_for_everyone()

    def _loss(self, method: TrainingMethod) -> Loss:
        if self.config.loss == "dpo":
            return PreferenceLoss(method.base_alone, self.config.beta)
        return CompletionLoss(method.base_alone)

    def _callbacks(self, phase: str, step_tokens: list[int]) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = [MarkWhole(self._note_time), Progress(phase, step_tokens)]
        if self.config.patience:
            callbacks.append(Patience(self.config.patience))
        if self.config.tensorboard:
            callbacks.append(tensorboard(self.config.tensorboard / self.config.output.name / phase.lower()))
        return callbacks


def _is_of_a_start(path: Path) -> bool:
    """Say whether `path` is what a start leaves that was cut off before it had written `RUN`."""
    return path.name in (LOCK, THREADS) or path.name.startswith((f".{RUN}@", f".{THREADS}@"))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): remove {file.parent}") from error


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    names = [name for name in found | expected if found.get(name) != expected.get(name)]
    return [f"{name} is {_shown(found.get(name))}, expected {_shown(expected.get(name))}" for name in names]


def _shown(value: object) -> str:
    return "absent" if value is None else json.dumps(value)
