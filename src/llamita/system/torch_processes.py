"""Sum over the processes of a run through torch.distributed: gloo, which needs only a CPU, and NCCL on GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llamita.errors import RunError, first_line
from llamita.system.processes import share, world

_PATIENCE = 7 * 24 * 3600.0  # seconds to wait for each other; torchrun ends all processes if one fails


def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum of every process's tensor, in place; each process gets the same bits."""
    if world() > 1:
        join()
        dist.all_reduce(tensor)
    return tensor


def all_sum_array(array: np.ndarray) -> None:
    """Sum every process's array in place."""
    all_sum(torch.from_numpy(array))


def own_rows(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that are this process's part."""
    mine = share(len(tensor))
    return tensor[mine.start : mine.stop]


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """Return all `count` rows; each process gives its part, as `own_rows` cuts them."""
    if world() == 1:
        return rows
    mine = share(count)
    whole = torch.zeros((count, *rows.shape[1:]), dtype=rows.dtype)
    whole[mine.start : mine.stop] = rows
    return all_sum(whole)


def join(patience: float = _PATIENCE) -> None:
    """Find the other processes, unless that is done. Tensors on GPUs are summed there.

    Args:
        patience: seconds that one process waits for another, here and in every sum.

    Raises:
        RunError: the processes do not find each other.
    """
    if world() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    except (RuntimeError, ValueError) as error:
        raise RunError("torchrun", "processes that find each other", first_line(error)) from None


@contextmanager
def advise_when_lost(advice: str) -> Iterator[None]:
    """Turn the error that Torch raises when another process is gone into a RunError with `advice` as its hint."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunError("torchrun", "every process to go on", "one that ended or no longer answers", advice) from None
