"""Give this process its place among several that work on one model, and its share of the work.

`torchrun` starts them and sets their environment. Calibration windows and training rows are spread over them. Only
the first process writes and prints.
"""

import os

from llamita import _native
from llamita.errors import InputError, shown


def world() -> int:
    """Return the number of processes."""
    return _number("WORLD_SIZE", 1, 1) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return _number("RANK", 0, 0) if world() > 1 else 0


def fair_threads(threads: int | None) -> int | None:
    """Return the threads for this process: `threads` if given, or its share of the CPUs if processes share them."""
    local = _number("LOCAL_WORLD_SIZE", 1, 1) if world() > 1 else 1
    if threads is not None or local == 1 or os.environ.get("LLAMITA_THREADS"):
        return threads
    return max(1, _native.usable_cpus() // local)


def share(count: int) -> range:
    """Return the indices below `count` that are this process's part: consecutive, and shared with no other."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise InputError(name, f"a whole number of at least {least}", shown(text), "try torchrun")
    return int(text)
