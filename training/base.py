"""The base model as the programs of this package load it: on a GPU where there is one, in its best dtype."""

import torch

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from training.processes import processes


def load_base(
    name: str | None, dtype: str = "auto", threads: int = 0, attention: str = "sdpa", is_spread: bool = False
) -> BaseModel:
    """Returns the base called `name`, see `lori.base_model.load_base_model`, on this process's device.

    `threads` of the CPU are used from now on, or torch's own choice where that is 0. With `is_spread` the weights are spread over
    the processes of `torchrun`.
    """
    if threads:
        torch.set_num_threads(threads)
    device = processes().device
    num_processes = int(processes().num_processes) if is_spread else 1
    return load_base_model(name, resolve_dtype(dtype, device), attention, device, num_processes)
