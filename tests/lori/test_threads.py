"""Number of CPU threads: beside other processes, and in containers."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori import resources
from lori.resources import BackgroundLoad, avoid_busy_cpus, cpu_quota, threads_restored, use_threads, warn_if_busy

BURN = "while True: pass"


class FakeLoad(BackgroundLoad):
    """Other processes that keep `num` of four CPUs busy."""

    def __init__(self, num: float) -> None:
        super().__init__()
        self._cpus, self.num = [0, 1, 2, 3], num

    def num_busy(self) -> float:
        """Return how many CPUs are busy."""
        return self.num


@pytest.fixture(autouse=True)
def _four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set four threads, without a variable that requests a number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a control group, /box/inner. To the code under test, this process belongs to it."""
    (tmp_path / "membership").write_text("0::/box/inner\n")
    monkeypatch.setattr(resources, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path / "groups")
    inner = tmp_path / "groups" / "box" / "inner"
    inner.mkdir(parents=True)
    return inner


@pytest.mark.parametrize(("num_busy", "num_free"), [(0.0, 4), (0.3, 4), (0.7, 3), (1.0, 3), (1.3, 3), (2.9, 1), (4.0, 1)])
def test_busy_cpus_are_left_alone(num_busy: float, num_free: int) -> None:
    """A half-busy CPU counts as busy. At least one thread is always used."""
    avoid_busy_cpus(FakeLoad(num_busy))
    assert torch.get_num_threads() == num_free


def test_no_more_threads_than_before() -> None:
    """If there are fewer threads than free CPUs, their number stays."""
    torch.set_num_threads(2)
    avoid_busy_cpus(FakeLoad(0.0))
    assert torch.get_num_threads() == 2


def test_omp_num_threads_is_respected(monkeypatch: pytest.MonkeyPatch, group: Path) -> None:
    """OMP_NUM_THREADS decides the number, whatever the load and the container's limit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    (group / "cpu.max").write_text("100000 100000\n")
    use_threads(0)
    avoid_busy_cpus(FakeLoad(4.0))
    assert torch.get_num_threads() == 4


def test_a_requested_number_is_used(group: Path) -> None:
    """A requested number is used, whatever the container's limit."""
    (group / "cpu.max").write_text("100000 100000\n")
    use_threads(3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("inner", "outer", "num"), [("250000 100000", "max 100000", 2), ("max 100000", "150000 50000", 3), ("50000 100000", None, 1)]
)
def test_a_container_limits_the_threads_to_its_cpu_share(group: Path, inner: str, outer: str | None, num: int) -> None:
    """The smallest share among the group and its parents counts. A fraction of a CPU counts as one thread."""
    (group / "cpu.max").write_text(inner + "\n")
    if outer:
        (group.parent / "cpu.max").write_text(outer + "\n")
    use_threads(0)
    assert torch.get_num_threads() == num


@pytest.mark.usefixtures("group")
def test_a_group_without_a_cpu_share_is_no_limit(tmp_path: Path) -> None:
    """If a group has no file, or the system has no groups, torch's own number is used."""
    assert cpu_quota() == float("inf")
    (tmp_path / "membership").unlink()
    assert cpu_quota() == float("inf")
    use_threads(0)
    assert torch.get_num_threads() == 4


def test_cpus_that_are_not_online_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second online CPU need not have the number 1."""
    (tmp_path / "stat").write_text("cpu  9 0 0 0\ncpu0 1 0 0 0\ncpu2 1 0 0 0\nintr 5\n")
    monkeypatch.setattr(resources, "STAT", tmp_path / "stat")
    assert resources._cpu_numbers(2) == [0, 2]
    (tmp_path / "stat").unlink()
    assert resources._cpu_numbers(2) == [0, 1]


def test_a_block_restores_the_number_of_threads() -> None:
    """The number is restored whatever was set inside the block."""
    with threads_restored():
        use_threads(1)
    assert torch.get_num_threads() == 4


def test_a_warning_names_the_flag_to_pass(caplog: pytest.LogCaptureFixture) -> None:
    """A service keeps its number of threads and warns if another one would be faster."""
    warn_if_busy(FakeLoad(0.0))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_if_busy(FakeLoad(2.0))
    assert "keep 2.0 CPUs busy" in caplog.text
    assert "--threads 2" in caplog.text
    assert torch.get_num_threads() == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a CPU")
def test_only_the_load_of_other_processes_counts() -> None:
    """Another process that keeps one of our CPUs busy counts. This process's own work does not."""
    own_cpus = os.sched_getaffinity(0)
    cpu = min(own_cpus)
    os.sched_setaffinity(0, {cpu})
    try:
        load = BackgroundLoad()
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
        share = 0.3 / (time.monotonic() - load._began)
        assert load.num_busy() <= 1.1 - share
        with subprocess.Popen([sys.executable, "-c", BURN]) as other:
            load = BackgroundLoad()
            time.sleep(1)
            num_busy = load.num_busy()
            other.kill()
        assert num_busy > 0.7
        assert load.num_free() == 1
    finally:
        os.sched_setaffinity(0, own_cpus)
