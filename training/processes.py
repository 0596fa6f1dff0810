"""The processes that `torchrun` starts for one run; one alone without it."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return which of how many this process is; joins the others the first time."""
    return PartialState(cpu=not torch.cuda.is_available())
