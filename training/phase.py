"""A phase of a run: what it is called, how long it is, at which rate."""

from dataclasses import dataclass

from training.config import FitConfig


@dataclass(frozen=True, slots=True)
class Phase:
    """Some steps, or where they are 0 some passes over the data, in an order of their own."""

    name: str
    lr: float
    num_steps: int
    num_passes: float
    seed: int


def phases_of(config: FitConfig) -> tuple[Phase, ...]:
    """Returns the phases of a run, in order.

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
