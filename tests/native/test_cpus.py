"""How many threads a process starts by default: affinity, hardware threads, quotas of cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_root import write_root

from llamita import _native

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys")
CPUS = sorted(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else []
USABLE = _native.usable_cpus()
GROUPS = Path("/sys/fs/cgroup/cpu")  # version 1
several = pytest.mark.skipif(len(CPUS) < 2, reason="one processor")


def siblings(cpu: int, text: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text}


def test_without_any_file_every_processor_counts(tmp_path: Path) -> None:
    assert _native.usable_cpus(str(tmp_path)) == len(CPUS)


def test_affinity_is_respected() -> None:
    program = (
        f"import os; os.sched_setaffinity(0, [{CPUS[-1]}]); from llamita import _native as n;"
        "print(n.usable_cpus(), n.threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LLAMITA_THREADS"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["1", "1"], result.stderr


@several
@pytest.mark.parametrize("form", ["{0},{1}\n", "{0}-{1}\n", "{0},{1},4000\n"])
def test_hardware_threads_of_a_core_count_once(tmp_path: Path, form: str) -> None:
    text = form.format(*CPUS[:2])
    if "-" in form and CPUS[1] != CPUS[0] + 1:
        pytest.skip("no neighbours")
    root = write_root(tmp_path, siblings(CPUS[0], text), siblings(CPUS[1], text))
    assert _native.usable_cpus(str(root)) == len(CPUS) - 1


def test_a_sibling_that_may_not_be_used_does_not_count(tmp_path: Path) -> None:
    other = next(cpu for cpu in range(1023) if cpu not in CPUS)
    root = write_root(tmp_path, siblings(CPUS[0], f"{other},{CPUS[0]}\n"))
    assert _native.usable_cpus(str(root)) == len(CPUS)


V2 = {"proc/self/cgroup": "0::/box/job\n", "sys/fs/cgroup/box/job/cpu.max": "max 100000\n"}
V1 = {"proc/self/cgroup": "5:memory:/other\n4:cpu,cpuacct:/box/job\n0::/\n"}
ONE_V1 = {"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": "100000\n"}


@several
@pytest.mark.parametrize(
    "files",
    [
        {**V2, "sys/fs/cgroup/box/job/cpu.max": "100000 100000\n"},
        {**V2, "sys/fs/cgroup/box/cpu.max": "100000 100000\n"},  # a parent's
        {**V2, "sys/fs/cgroup/cpu.max": "199999 100000\n"},  # a container's own, under the host's path
        {**V2, "sys/fs/cgroup/cpu.max": "1000 100000\n"},  # less than one processor
        {**V1, **{f"sys/fs/cgroup/cpu,cpuacct/box/job/{name}": text for name, text in ONE_V1.items()}},
        {**V1, **{f"sys/fs/cgroup/cpu,cpuacct/{name}": text for name, text in ONE_V1.items()}},
    ],
)
def test_the_least_quota_on_the_way_to_the_root_holds(tmp_path: Path, files: dict[str, str]) -> None:
    assert _native.usable_cpus(str(write_root(tmp_path, files))) == 1


@pytest.mark.parametrize(
    "files",
    [
        V2,
        {**V2, "sys/fs/cgroup/elsewhere/cpu.max": "100000 100000\n"},
        {**V2, "sys/fs/cgroup/box/cpu.max": "400000000 100000\n"},  # more than there are
        {**V1, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
         "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        {"proc/self/cgroup": "nonsense\n:\n::\n7:cpu\n", "sys/fs/cgroup/cpu.max": "nonsense\n"},
    ],
)  # fmt: skip
def test_what_is_no_quota_limits_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    assert _native.usable_cpus(str(write_root(tmp_path, files))) == len(CPUS)


@pytest.mark.skipif(USABLE < 2, reason="one processor")
@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", os.W_OK), reason="no cgroup to write")
def test_a_real_quota_holds() -> None:
    group = GROUPS / f"llamita-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        program = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()));"
            "from llamita import _native as n; print(n.usable_cpus())"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.stdout == "1\n", result.stderr
    finally:
        group.rmdir()
