"""Training processes, forked from one that has imported everything. A test can kill one, or run several together."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess

from server.transport.sockets import free_port
from training.config import FitConfig
from training.fit import fit

NUM_RANKS = 2


def train(config: FitConfig) -> BaseProcess:
    """Start a process that trains."""
    return _start(config, {})


def train_together(config: FitConfig) -> list[BaseProcess]:
    """Start two processes that train one adapter together, as torchrun does."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS, "GROUP_WORLD_SIZE": 1}
    own = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(NUM_RANKS)]
    return [_start(config, {name: str(value) for name, value in {**shared, **one}.items()}) for one in own]


def _start(config: FitConfig, environment: dict[str, str]) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_train, args=(config, environment))
    process.start()
    return process


def _train(config: FitConfig, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    fit(config, "command")
