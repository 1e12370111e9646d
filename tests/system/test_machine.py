"""Memory that a process may use and take, read from a made-up /proc and /sys: limits of control groups."""

from pathlib import Path

import pytest
from made_up_root import write_root

from llamita.system.machine import free_memory, usable_memory

MB = 2**20
V2 = {"proc/self/cgroup": "0::/box/job\n"}
V1 = {"proc/self/cgroup": "9:cpu:/other\n4:memory:/box/job\n0::/\n"}
FREE = {"proc/meminfo": f"MemTotal: 999999 kB\nMemAvailable: {500 * 1024} kB\n"}
JOB, JOB_V1 = "sys/fs/cgroup/box/job", "sys/fs/cgroup/memory/box/job"


def limit(group: str, limit: int, used: int) -> dict[str, str]:
    names = ("limit_in_bytes", "usage_in_bytes") if "/memory" in group else ("max", "current")
    return {f"{group}/memory.{name}": f"{size * MB}\n" for name, size in zip(names, (limit, used), strict=True)}


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    everything = usable_memory(tmp_path)
    assert everything > 400 * MB
    assert free_memory(tmp_path) == everything  # nothing tells what is free
    root = write_root(tmp_path, FREE, V2, {f"{JOB}/memory.max": "max\n", f"{JOB}/memory.current": "123\n"})
    assert usable_memory(root) == everything
    assert free_memory(root) == min(everything, 500 * MB)


@pytest.mark.parametrize(
    ("files", "group"),
    [
        (V2, JOB),
        (V2, "sys/fs/cgroup/box"),  # a parent's
        (V2, "sys/fs/cgroup"),  # a container's own, under the host's path
        (V1, JOB_V1),
        (V1, "sys/fs/cgroup/memory/box"),
        (V1, "sys/fs/cgroup/memory"),
    ],
)
def test_a_limit_on_the_way_to_the_root_holds_less_what_is_used(
    tmp_path: Path, files: dict[str, str], group: str
) -> None:
    root = write_root(tmp_path, FREE, files, limit(group, 300, 100))
    assert usable_memory(root) == 300 * MB
    assert free_memory(root) == 200 * MB


def test_the_tightest_of_several_limits_holds(tmp_path: Path) -> None:
    """The outer group allows more, but has less left."""
    root = write_root(tmp_path, FREE, V2, limit(JOB, 200, 20), limit("sys/fs/cgroup/box", 300, 250))
    assert usable_memory(root) == 200 * MB
    assert free_memory(root) == 50 * MB


@pytest.mark.parametrize(("files", "group", "prefix"), [(V2, JOB, ""), (V1, JOB_V1, "total_")])
def test_pages_of_files_can_be_had_back(tmp_path: Path, files: dict[str, str], group: str, prefix: str) -> None:
    stat = f"anon 5\n{prefix}inactive_file {30 * MB}\n{prefix}active_file {10 * MB}\n"
    root = write_root(tmp_path, FREE, files, limit(group, 300, 100), {f"{group}/memory.stat": stat})
    assert free_memory(root) == 240 * MB


def test_other_groups_and_full_ones(tmp_path: Path) -> None:
    root = write_root(tmp_path, FREE, V2, limit("sys/fs/cgroup/elsewhere", 100, 1))
    assert free_memory(root) == min(usable_memory(root), 500 * MB)
    assert free_memory(write_root(tmp_path, limit(JOB, 100, 101))) == 0
