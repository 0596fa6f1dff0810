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


def calibration(config: FitConfig) -> Phase:
    """Returns the LoRI-D that a mask is drawn from: as long as what follows, where nothing is said."""
    num_steps, num_passes = config.calibration_steps, config.calibration_epochs
    if not num_steps and not num_passes:
        num_steps, num_passes = config.steps, config.epochs
    return Phase("LoRI-D", config.calibration_lr, num_steps, num_passes, config.seed)


def main_phase(config: FitConfig, name: str, lr: float) -> Phase:
    """Returns the phase that the adapter comes from. After a calibration its data comes in another order."""
    return Phase(name, lr, config.steps, config.epochs, config.seed + (name == "LoRI-S"))
