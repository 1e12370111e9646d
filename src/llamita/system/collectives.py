"""Sums and barriers over all processes of a run; Torch does them and is imported on use (`torch_processes`)."""

from collections.abc import Callable
from importlib import import_module

import numpy as np

from llamita.system.processes import rank, world

_ALL_SUM = "llamita.system.torch_processes:all_sum_array"
_JOIN = "llamita.system.torch_processes:join"


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
