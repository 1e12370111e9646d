"""Sum over all processes of a run, and wait for them. Torch does it; `torch_processes` is imported on use."""

import numpy as np

from llamita.system.extras import load_optional
from llamita.system.processes import rank, world

_ALL_SUM = "llamita.system.torch_processes:all_sum_array"
_JOIN = "llamita.system.torch_processes:join"
_LACKING = "several processes need the package {package}"


def all_sum(array: np.ndarray) -> np.ndarray:
    """Return the sum of every process's array, in place: each process gets the same values."""
    if world() > 1:
        load_optional(_ALL_SUM, _LACKING)(array)
    return array


def join(patience: float) -> None:
    """Find the other processes, if there are any. From then on no sum waits longer than these seconds."""
    if world() > 1:
        load_optional(_JOIN, _LACKING)(patience)


def wait() -> None:
    """Wait until every process has called this."""
    all_sum(np.zeros(1))


def agreed(number: int) -> int:
    """Return the first process's number, which may depend on the files of its disk."""
    return int(all_sum(np.array([int(number) if rank() == 0 else 0]))[0])
