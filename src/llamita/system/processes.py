"""Several processes that work on one model: which of them this one is, and its share of the work.

`torchrun` starts them and says so in the environment. Calibration windows and training rows are spread over
them. Only the first process writes and prints.
"""

import os

from llamita import _native
from llamita.errors import InputError


def world() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1, 1) if "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """The number of this one, from 0."""
    return _number("RANK", 0, 0) if world() > 1 else 0


def fair_threads(threads: int | None) -> int | None:
    """Threads for this process: those asked for, or its part of this machine's where it shares it."""
    beside = _number("LOCAL_WORLD_SIZE", 1, 1) if world() > 1 else 1
    if threads is not None or beside == 1 or os.environ.get("LLAMITA_THREADS"):
        return threads
    return max(1, _native.usable_cpus() // beside)


def share(count: int) -> range:
    """The places, of `count`, that are this process's part: in order, and none of another's."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}", f"a whole number of at least {least}", f"{text!r}", "try torchrun")
    return int(text)
