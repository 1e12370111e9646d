"""Describe this machine and the memory of this process, from Linux's files; elsewhere little is known."""

import os
import platform
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_UNKNOWN_CACHE = 64 * 2**20  # bytes: assumed last-level cache if the system does not report it
_ROOT = Path("/")
# Names of a control group's limit and use, and of the pages of files in its memory.stat: versions 2 and 1.
_GROUP_FILES = (
    (("memory.max", "memory.current"), ("active_file", "inactive_file")),
    (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("total_active_file", "total_inactive_file")),
)
_INTERVAL = 0.01  # seconds between two measurements of memory


def cpu_name() -> str:
    """Return the CPU's name, with family and model if known: virtual machines often hide more of the name."""
    facts: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    return name


def usable_memory(root: Path = _ROOT) -> int:
    """Return the bytes of memory that this process may use, used ones included: all, or a container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _group_limits(root))])


def free_memory(root: Path = _ROOT) -> int:
    """Return the bytes that this process may still take; pages of files count as free, as the system drops them."""
    free = usable_memory(root)
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return max(0, min([free, *(limit - used for limit, used in _group_limits(root))]))


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of the process's control group and of each group around it with a limit.

    In a container whose path is the host's, the path leads nowhere, but the container's group is mounted as the root.
    `native/cpus_linux.cpp` reads quotas of processor time in the same way.
    """
    for line in _lines(root / "proc/self/cgroup"):  # "0::/path" is version 2, "4:memory:/path" version 1
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        names, files = _GROUP_FILES[bool(controllers)]
        place = mount / path.strip("/")
        for group in [place, *place.parents[: len(place.parts) - len(mount.parts)]]:
            limit, used = (_first(group / name) for name in names)
            if not limit.isdigit():  # no such file, or "max"
                continue
            stat = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
            given_back = sum(int(stat.get(name, 0)) for name in files)
            yield int(limit), max(0, int(used or 0) - given_back)


def last_level_cache() -> int:
    """Return the bytes of all last-level caches together that the CPUs of this process reach."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    sizes: dict[str, int] = {}
    for cpu in cpus:
        caches = sorted(Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"))
        last = max(caches, key=lambda path: int(_first(path / "level") or 0), default=None)
        size = _first(last / "size") if last else ""
        if last and size.endswith("K"):
            sizes[_first(last / "shared_cpu_list") or str(cpu)] = int(size[:-1]) * 1024
    return sum(sizes.values()) or _UNKNOWN_CACHE


def anonymous_bytes() -> int:
    """Return this process's resident bytes without pages of files; if unknown, the peak with them."""
    for line in _lines("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MemoryWatch:
    """Measure the peak of `anonymous_bytes` within a block, every hundredth of a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Take the memory of this moment into account."""
        self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> "MemoryWatch":
        self._done.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._thread is not None
        self._done.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.look()


def _first(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux, or another layout
        return []
