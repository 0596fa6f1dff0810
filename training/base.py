"""The base model as the programs of this package load it: on a GPU where there is one, in its best dtype."""

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.resources import BackgroundLoad, avoid_busy_cpus, use_threads
from training.processes import processes


def load_base(
    name: str | None, dtype: str = "auto", threads: int = 0, attention: str = "sdpa", is_spread: bool = False
) -> BaseModel:
    """Return the base called `name`, see `lori.base_model.load_base_model`, on this process's device.

    `threads` of the CPU are used from now on, or as many as there are CPUs that other processes leave free where that is 0. With
    `is_spread` the weights are spread over the processes of `torchrun`.
    """
    use_threads(threads)
    load = BackgroundLoad()
    device = processes().device
    num_processes = int(processes().num_processes) if is_spread else 1
    base = load_base_model(name, resolve_dtype(dtype, device), attention, device, num_processes)
    if not threads and device.type == "cpu":
        avoid_busy_cpus(load)
    return base
