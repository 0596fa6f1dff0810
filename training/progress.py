"""What a person sees of a phase while it runs, and what ends it early."""

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
    """Training cannot go on: says at which step, and what might help."""


class Progress(TrainerCallback):
    """A bar of loss, tokens/s and time left. Ends the run where the loss is no number any more."""

    def __init__(self, name: str, step_tokens: list[int]) -> None:
        self.name, self.step_tokens = name, step_tokens
        self.losses: list[float] = []
        self._bar: tqdm[None] | None = None
        self._started = (0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Open the bar, where this process is the first."""
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
        """Raise `TrainingError` for a loss that is not finite; else moves the bar."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of {self.name} is {loss} at step {state.global_step}: a lower learning rate may help")
        self.losses.append(loss)
        if self._bar is not None:
            at, first = self._started
            rate = sum(self.step_tokens[first : state.global_step]) / (time.monotonic() - at)
            self._bar.set_postfix(loss=f"{recent_loss(self.losses):.3f}", tokens_per_s=f"{rate:.0f}", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, *_: object, **__: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class Patience(TrainerCallback):
    """Ends a phase once `num_measurements` in a row were no better than the best before them, those before a resume included."""

    def __init__(self, num_measurements: int) -> None:
        self.num_measurements = num_measurements

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Look at once: what was cut off may have been about to end."""
        losses = [loss for _, loss in held_out_losses_of(state)]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self.num_measurements:
            control.should_training_stop = True

    on_evaluate = on_train_begin


def check_tensorboard() -> None:
    """Raise `LoriError` where TensorBoard is not installed: before anything is begun."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise LoriError("--tensorboard needs: pip install '.[train]'") from error


def tensorboard(folder: Path) -> TrainerCallback:
    """Return what writes logs for TensorBoard, which is installed, to `folder`."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra

    return TensorBoardCallback(SummaryWriter(str(folder)))
