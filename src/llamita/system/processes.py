"""Several processes at work on one model: which of them this one is, and sums over all of them.

`torchrun` starts them and says so in the environment. Calibration's windows and training's rows are spread
over them; the first process alone writes and prints. Talking to each other is Torch's, reached on use:
`methods.ranks`.
"""

import os
from collections.abc import Callable
from importlib import import_module

import numpy as np

from llamita import _native
from llamita.errors import InputError

_ALL_SUM = "llamita.system.torch_processes:all_sum_array"
_JOIN = "llamita.system.torch_processes:join"


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


def all_sum(array: np.ndarray) -> np.ndarray:
    """The sum of every process's array, in place: each has the same values afterwards."""
    if world() > 1:
        _load(_ALL_SUM)(array)
    return array


def join(patience: float) -> None:
    """Find the others, unless there are none; from then on no sum waits longer than these seconds."""
    if world() > 1:
        _load(_JOIN)(patience)


def wait() -> None:
    """Go on once every process has come here."""
    all_sum(np.zeros(1))


def agreed(number: int) -> int:
    """The first process's number, which may depend on what it finds on its disk."""
    return int(all_sum(np.array([int(number) if rank() == 0 else 0]))[0])


def _load(entry: str) -> Callable[..., None]:
    module, function = entry.split(":")
    return getattr(import_module(module), function)


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}: expected a whole number of at least {least}, got {text!r}; try torchrun")
    return int(text)
