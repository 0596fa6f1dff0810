"""Free memory in a container: the container's limit counts, not the machine's. The tests write the cgroup files of Linux."""

from pathlib import Path

import psutil
import pytest

from lori import resources as module
from lori.kernels.pages import zeros
from lori.resources import free_memory

MIB = 2**20
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V1_NONE = "9223372036854771712"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "own")
    return tmp_path / "cgroup"


def write(folder: Path, names: tuple[str, str, str], limit: int | str, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = f"cache 1\nrss 2\n{names[2]}inactive_file {cached // 2}\n{names[2]}active_file {cached - cached // 2}\n"
    (folder / "memory.stat").write_text(stat)


def within(groups: Path, *lines: str) -> None:
    (groups.parent / "own").write_text("".join(f"{line}\n" for line in lines))


def test_a_container_has_less_than_its_machine(groups: Path) -> None:
    within(groups, "0::/")
    write(groups, V2, limit=20 * MIB, used=15 * MIB)
    assert free_memory() == 5 * MIB


def test_among_nested_groups_the_fullest_counts(groups: Path) -> None:
    within(groups, "0::/slice/unit")
    write(groups / "slice", V2, limit=20 * MIB, used=18 * MIB)
    write(groups / "slice" / "unit", V2, limit="max", used=17 * MIB)
    assert free_memory() == 2 * MIB


def test_a_cgroup_v1_container_sees_its_group_as_the_root(groups: Path) -> None:
    within(groups, "5:cpu,cpuacct:/docker/ab", "4:memory:/docker/ab", "1:name=systemd:/", "0::/")
    write(groups / "memory", V1, limit=20 * MIB, used=15 * MIB)
    assert free_memory() == 5 * MIB


def test_the_page_cache_counts_as_free(groups: Path) -> None:
    within(groups, "0::/")
    write(groups, V2, limit=20 * MIB, used=19 * MIB, cached=9 * MIB)
    assert free_memory() == 10 * MIB


@pytest.mark.parametrize("names", [V1, V2])
def test_usage_above_the_limit_leaves_nothing_free(groups: Path, names: tuple[str, str, str]) -> None:
    within(groups, "4:memory:/a", "0::/a")
    write(groups / "memory" / "a" if names == V1 else groups / "a", names, limit=20 * MIB, used=21 * MIB)
    assert free_memory() == 0


def test_without_a_limit_the_machine_counts(groups: Path) -> None:
    before = psutil.virtual_memory().total // 16
    assert free_memory() > before  # no groups at all
    within(groups, "4:memory:/a", "0::/a")
    write(groups / "memory", V1, limit=V1_NONE, used=MIB)
    write(groups / "a", V2, limit="max", used=MIB)
    assert before < free_memory() <= psutil.virtual_memory().total


def test_memory_that_a_container_lacks_is_refused_before_allocation(groups: Path) -> None:
    within(groups, "0::/")
    write(groups, V2, limit=20 * MIB, used=15 * MIB)
    assert len(zeros(5 * MIB)) == 5 * MIB
    with pytest.raises(MemoryError, match=r"0\.1 GiB of 0\.0 that are free"):
        zeros(100 * MIB)
