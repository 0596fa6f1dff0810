"""Callbacks of a phase: its progress bar, TensorBoard logs and early stopping."""

import importlib
import math
import time
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from lori.errors import LoriError
from training.phase import held_out_losses_of, losses_of, recent_loss


class TrainingError(LoriError):
    """A failure during training. The message says at which step, and what may help."""


class Progress(TrainerCallback):
    """A progress bar with loss, tokens/s and time left. Ends the run if the loss is not finite."""

    def __init__(self, name: str, step_tokens: list[int]) -> None:
        self.name, self.step_tokens = name, step_tokens
        self.losses: list[float] = []
        self._bar: tqdm[None] | None = None
        self._started = (0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Open the bar, if this process is the first."""
        self.losses = losses_of(state)
        self._started = (time.monotonic(), state.global_step)
        if state.is_world_process_zero:
            self._bar = tqdm(total=len(self.step_tokens), initial=state.global_step, desc=self.name, unit="step")

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Update the bar. Raises `TrainingError` if the loss is not finite."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of {self.name} is {loss} at step {state.global_step}: a lower learning rate may help")
        self.losses.append(loss)
        if self._bar is not None:
            started_at, first_step = self._started
            rate = sum(self.step_tokens[first_step : state.global_step]) / (time.monotonic() - started_at)
            self._bar.set_postfix(loss=f"{recent_loss(self.losses):.3f}", tokens_per_s=f"{rate:.0f}", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, *_: object, **__: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class EarlyStopping(TrainerCallback):
    """Stops a phase after `patience` evaluations in a row without an improvement. Evaluations before a resume count, too."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Stop a phase that has lost its patience already: a resumed run may have been cut off just before it stopped."""
        losses = [loss for _, loss in held_out_losses_of(state)]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True

    on_evaluate = on_train_begin


def check_tensorboard() -> None:
    """Raise `LoriError` if TensorBoard is not installed. Call this before the run begins."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise LoriError("--tensorboard needs: pip install '.[train]'") from error


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Return a callback that writes TensorBoard logs to `folder`. Needs TensorBoard, see `check_tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra

    return TensorBoardCallback(SummaryWriter(str(folder)))
