"""A phase of a run: its name, length and learning rate, and its outcome for reports and records."""

from dataclasses import dataclass

from transformers import TrainerState

from training.config import FitConfig

NUM_RECENT = 20
"""Number of last steps over which a loss is averaged when it is given as one number."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a phase: its loss at each step, its held-out losses, and the number of tokens it saw."""

    losses: list[float]
    held_out: list[list[float]]
    """[step, loss] of each evaluation."""
    num_tokens: int
    best_step: int
    """The step whose parameters the adapter gets: the best by held-out loss, or the last if nothing is held out."""

    @property
    def recent_loss(self) -> float:
        """Mean loss of the last steps."""
        return recent_loss(self.losses)


def outcome_of(state: TrainerState, step_tokens: list[int]) -> Outcome:
    """Return the outcome of a finished phase from Trainer's `state`. `step_tokens` are the numbers of tokens of its steps."""
    best_step = state.best_global_step or state.global_step
    return Outcome(losses_of(state), held_out_losses_of(state), sum(step_tokens[: state.global_step]), best_step)


def losses_of(state: TrainerState) -> list[float]:
    """Return the loss of each step so far."""
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def held_out_losses_of(state: TrainerState) -> list[list[float]]:
    """Return [step, loss] of each evaluation so far."""
    return [[entry["step"], entry["eval_loss"]] for entry in state.log_history if "eval_loss" in entry]


def recent_loss(losses: list[float]) -> float:
    """Return the mean of the last `NUM_RECENT` losses, or of the last quarter if that is less."""
    recent = losses[-max(1, min(NUM_RECENT, len(losses) // 4)) :]
    return sum(recent) / len(recent)


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of training: `num_steps` steps, or if that is 0 `num_passes` passes over the data, in an order drawn by `seed`."""

    name: str
    lr: float
    num_steps: int
    num_passes: float
    seed: int


def phases_of(config: FitConfig) -> tuple[Phase, ...]:
    """Return the phases of a run, in order.

    The LoRI-D that finds the mask is as long as LoRI-S, unless `config` gives its length. LoRI-S sees the data in another order.
    """
    length = config.steps, config.epochs
    if config.method == "lora":
        return (Phase("LoRA", config.peak_lr, *length, config.seed),)
    if config.method == "lori-d":
        return (Phase("LoRI-D", config.calibration_lr, *length, config.seed),)
    main = Phase("LoRI-S", config.peak_lr, *length, config.seed + 1)
    if config.mask_from:
        return (main,)
    calibration_length = config.calibration_steps, config.calibration_epochs
    return Phase("LoRI-D", config.calibration_lr, *(calibration_length if any(calibration_length) else length), config.seed), main
