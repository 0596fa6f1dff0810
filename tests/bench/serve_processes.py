"""Programs that a benchmark runs, each on the core that is measured; those that are not measured now stand still."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from lori.kernels.native import MAX_ISA_VARIABLE
from tests.bench.serve_wire import FailedError

READY_S = 600
"""How long a program may take to start: vLLM compiles, and may find its core shared."""
REPOSITORY = Path(__file__).parents[2]


class Program:
    """A running program with all its children, in a session of its own, on one core or, `0,1`, several. It prints to `log`."""

    def __init__(
        self, command: Sequence[str], core: int | str, log: Path, environment: Mapping[str, str], stdin: int | None = None
    ) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["taskset", "-c", str(core), *command],
                cwd=REPOSITORY,
                env=_environment() | dict(environment),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.PIPE if stdin else file,
                stderr=file,
                start_new_session=True,
                text=True,
            )

    def pause(self) -> None:
        """Stops it where it stands: an idle vLLM turns in a loop, on the core that is measured."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Kills it, its children too."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:  # waits, and closes its pipes
            pass

    def cpu_s(self) -> float:
        """Returns the processor's time that it, and all of its session that still runs, has used."""
        return sum(_cpu_s(stat) for stat in _stats() if int(stat[3]) == self.process.pid)

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Returns when it `is_ready`. Raises `FailedError`, with the end of its log, where it ends before or takes too long."""
        end = time.monotonic() + READY_S
        while not is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                log_tail = self.log.read_text(errors="replace")[-3000:]
                raise FailedError(f"{' '.join(map(str, self.process.args))} did not start: {log_tail}")
            time.sleep(0.1)


def answers(port: int, path: str) -> bool:
    """Says whether something on `port` answers a GET of `path` with 200."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def busy_s(core: int) -> float:
    """Returns the time for which `core` has been busy, with whatever."""
    lines = Path("/proc/stat").read_text().splitlines()
    ticks = next(line.split()[1:] for line in lines if line.startswith(f"cpu{core} "))
    user, nice, system, _, _, irq, soft_irq, steal, *_ = map(int, ticks)
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def _stats() -> Iterator[list[str]]:
    """Yields what /proc says of each process after its name, see proc(5): its state comes first."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            yield file.read_text().rpartition(")")[2].split()


def _cpu_s(stat: list[str]) -> float:
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def _environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LORI_", "VLLM_"))}
    lori_variables = {key: value for key, value in os.environ.items() if key in ("LORI_CACHE", MAX_ISA_VARIABLE)}
    return inherited | lori_variables | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
