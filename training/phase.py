"""A phase of a run: its name, length and learning rate, and its outcome as reports and records have it."""

from dataclasses import dataclass

from transformers import TrainerState

from training.config import FitConfig

NUM_RECENT = 20
"""Steps over which a loss is averaged where one number is to stand for it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A phase's loss at each step, the held-out loss after some, and how much it saw."""

    losses: list[float]
    held_out: list[list[float]]
    """[step, loss] of each measurement."""
    num_tokens: int
    best_step: int
    """The step whose parameters are kept: the best where something is held out, else the last."""

    @property
    def recent_loss(self) -> float:
        """The mean loss of the last steps."""
        return recent_loss(self.losses)


def outcome_of(state: TrainerState, step_tokens: list[int]) -> Outcome:
    """Return what `state` says of a phase that is over, whose steps had so many tokens."""
    best_step = state.best_global_step or state.global_step
    return Outcome(losses_of(state), held_out_losses_of(state), sum(step_tokens[: state.global_step]), best_step)


def losses_of(state: TrainerState) -> list[float]:
    """Return the loss of each step so far."""
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def held_out_losses_of(state: TrainerState) -> list[list[float]]:
    """Return [step, loss] of each measurement so far."""
    return [[entry["step"], entry["eval_loss"]] for entry in state.log_history if "eval_loss" in entry]


def recent_loss(losses: list[float]) -> float:
    """Return the mean of the last of `losses`."""
    last = losses[-NUM_RECENT:]
    return sum(last) / len(last)


@dataclass(frozen=True, slots=True)
class Phase:
    """Some steps, or where they are 0 some passes over the data, in an order of their own."""

    name: str
    lr: float
    num_steps: int
    num_passes: float
    seed: int


def phases_of(config: FitConfig) -> tuple[Phase, ...]:
    """Return the phases of a run, in order.

    The LoRI-D that a mask is drawn from is as long as what follows, where nothing else is said. LoRI-S sees the data in another
    order than it.
    """
    length = config.steps, config.epochs
    if config.method == "lora":
        return (Phase("LoRA", config.peak_lr, *length, config.seed),)
    if config.method == "lori-d":
        return (Phase("LoRI-D", config.calibration_lr, *length, config.seed),)
    main = Phase("LoRI-S", config.peak_lr, *length, config.seed + 1)
    if config.mask_from:
        return (main,)
    own = config.calibration_steps, config.calibration_epochs
    return Phase("LoRI-D", config.calibration_lr, *(own if any(own) else length), config.seed), main
