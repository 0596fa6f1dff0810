"""Loading of the base model for the programs of this package: on a GPU if there is one, in the best dtype of the device."""

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.resources import BackgroundLoad, avoid_busy_cpus, use_threads
from training.processes import processes


def load_base(
    name: str | None, dtype: str = "auto", threads: int = 0, attention: str = "sdpa", is_sharded: bool = False
) -> BaseModel:
    """Return the base model `name` (see `lori.base_model.load_base_model`) on this process's device.

    Sets the number of CPU threads of this process: `threads`, or if that is 0 as many as there are CPUs that other processes
    leave idle. With `is_sharded` the weights are sharded over the processes of `torchrun`.
    """
    use_threads(threads)
    load = BackgroundLoad()
    device = processes().device
    num_processes = int(processes().num_processes) if is_sharded else 1
    base = load_base_model(name, resolve_dtype(dtype, device), attention, device, num_processes)
    if not threads and device.type == "cpu":
        avoid_busy_cpus(load)
    return base
