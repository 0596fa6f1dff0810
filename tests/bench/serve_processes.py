"""Programs of a benchmark, each on the measured cores. Programs that are not being measured are stopped."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from lori.native import MAX_ISA_VARIABLE
from tests.bench.serve_wire import FailedError

READY_S = 600
"""Maximum seconds for a program to start."""
TORCH_LIMITS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
"""By instruction set that this project is limited to: variables that limit torch, oneDNN and MKL alike."""
REPOSITORY = Path(__file__).parents[2]


class Program:
    """A running program with all of its children, in a session of its own, on `cores`. It writes to `log`."""

    def __init__(
        self,
        command: Sequence[str],
        cores: Sequence[int],
        log: Path,
        environment: Mapping[str, str],
        stdin: int | None = None,
    ) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, cores)), *command],
                cwd=REPOSITORY,
                env=_environment(len(cores)) | dict(environment),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.PIPE if stdin else file,
                stderr=file,
                start_new_session=True,
                text=True,
            )

    def log_tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-3000:]

    def pause(self) -> None:
        """Stop the program with SIGSTOP, since an idle vLLM polls in a loop on the measured cores."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the program continue."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill the program and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:  # waits for the process and closes its pipes
            pass

    def cpu_s(self) -> float:
        """Return the CPU time in seconds of all running processes of the program's session."""
        return sum(_cpu_s(stat) for stat in _stats() if int(stat[3]) == self.process.pid)

    def wait_until(self, is_ready: Callable[[], bool], most_s: float = READY_S) -> None:
        """Wait until `is_ready`. Raises `FailedError` with the log's end if the program ends first or `most_s` pass."""
        end = time.monotonic() + most_s
        while not is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise FailedError(f"{' '.join(map(str, self.process.args))} did not start: {self.log_tail()}")
            time.sleep(0.1)


def answers(port: int, path: str) -> bool:
    """Return whether a server on `port` answers a GET of `path` with 200."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def busy_s(cores: Sequence[int]) -> float:
    """Return the seconds for which `cores` have been busy, with any process, summed over them."""
    names, ticks = {f"cpu{core}" for core in cores}, 0
    for name, *counts in (line.split() for line in Path("/proc/stat").read_text().splitlines()):
        if name in names:
            user, nice, system, _, _, irq, soft_irq, steal, *_ = map(int, counts)
            ticks += user + nice + system + irq + soft_irq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _stats() -> Iterator[list[str]]:
    """Yield the fields of /proc/PID/stat after the name, for each process; the state is the first field. See proc(5)."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has just ended
            yield file.read_text().rpartition(")")[2].split()


def _cpu_s(stat: list[str]) -> float:
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def _environment(num_threads: int) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LORI_", "VLLM_"))}
    lori_variables = {key: value for key, value in os.environ.items() if key in ("LORI_CACHE", MAX_ISA_VARIABLE)}
    limits = TORCH_LIMITS.get(lori_variables.get(MAX_ISA_VARIABLE, ""), {})
    return (
        inherited
        | lori_variables
        | limits
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
    )
