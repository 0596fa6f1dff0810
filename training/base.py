"""Loading of the base model for the programs of this package, and the options of those that draw rows and run it on them."""

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.resources import BackgroundLoad, avoid_busy_cpus, use_threads
from training.command_line import CommandLine
from training.data import OnBad, Row
from training.processes import processes


class RowsConfig(CommandLine):
    """Options of the programs that draw rows and run a base model on them."""

    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    seed: int = Field(default=0, ge=0)
    """Seed for drawing the rows."""
    on_bad: OnBad = "refuse"
    """refuse: write nothing if a row cannot be used. skip: leave such rows out."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and matrix products."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 means as many as there are CPUs that other processes leave idle."""

    def draw(self, rows: Sequence[Row], num_rows: int) -> list[Row]:
        """Return `num_rows` of `rows` at random, or all if there are fewer."""
        return random.Random(self.seed).sample(rows, min(len(rows), num_rows))


def load_base(
    name: str | None, dtype: str = "auto", threads: int = 0, attention: str = "sdpa", is_sharded: bool = False
) -> BaseModel:
    """Return the base model `name` (see `lori.base_model.load_base_model`) on this process's device: a GPU if there is one.

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
