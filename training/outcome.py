"""What a phase left, as it is written down: what reports and records are made of."""

from dataclasses import dataclass

from transformers import TrainerState

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
    """Returns what `state` says of a phase that is over, whose steps had so many tokens."""
    best_step = state.best_global_step or state.global_step
    return Outcome(losses_of(state), held_out_losses_of(state), sum(step_tokens[: state.global_step]), best_step)


def losses_of(state: TrainerState) -> list[float]:
    """Returns the loss of each step so far."""
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def held_out_losses_of(state: TrainerState) -> list[list[float]]:
    """Returns [step, loss] of each measurement so far."""
    return [[entry["step"], entry["eval_loss"]] for entry in state.log_history if "eval_loss" in entry]


def recent_loss(losses: list[float]) -> float:
    """Returns the mean of the last of `losses`."""
    last = losses[-NUM_RECENT:]
    return sum(last) / len(last)
