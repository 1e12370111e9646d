"""Divide the rows of each step among processes, so that together they read the same rows, whatever their number."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from llamita.system import processes
from llamita.train.examples import IGNORED, Windows


def as_dataset(windows: Windows) -> Dataset:
    """Return rows as the trainer takes them, plus a last one without targets, for processes that lack a row."""
    length = windows.ids.shape[1]
    blank = np.zeros((1, length), np.int64)
    return Dataset.from_dict(
        {
            "input_ids": np.concatenate([windows.ids, blank]),
            "labels": np.concatenate([windows.labels, blank + IGNORED]),
            "position_ids": np.concatenate([windows.positions, blank + np.arange(length)]),
        }
    )


def count_rows(dataset: Any) -> int:
    """Count the rows of a dataset of `as_dataset` without the blank one."""
    return len(dataset) - 1


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch of rows of one length."""
    return {name: torch.from_numpy(np.array([row[name] for row in rows], np.int64)) for name in rows[0]}


def count_parts(rows: int, micro_batch: int) -> int:
    """Count the micro-batches that each process makes of `rows` rows of all processes."""
    return math.ceil(math.ceil(rows / processes.world()) / micro_batch)


def own_parts(rows: Sequence[int], micro_batch: int, blank: int) -> list[list[int]]:
    """Return this process's rows in micro-batches, as many as any process has; a blank row fills a missing one."""
    mine = processes.share(len(rows))
    own = rows[mine.start : mine.stop]
    starts = (i * micro_batch for i in range(count_parts(len(rows), micro_batch)))
    return [list(own[start : start + micro_batch]) or [blank] for start in starts]


class StepRows(Sampler[list[int]]):
    """This process's micro-batches of an epoch: its part of each step, of which the last one may be smaller.

    Seed and epoch give the order, which is that of accelerate's SeedableRandomSampler.
    """

    def __init__(self, rows: int, batch: int, micro_batch: int, seed: int) -> None:
        self._rows, self._batch, self._micro_batch = rows, batch, micro_batch
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read next."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._rows, self._batch)
        return whole * count_parts(self._batch, self._micro_batch) + count_parts(rest, self._micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        for start in range(0, self._rows, self._batch):
            yield from own_parts(order[start : start + self._batch], self._micro_batch, self._rows)


class StepLoader(DataLoader[Any]):
    """Loads the rows that StepRows names, and passes the epoch on from the trainer."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read next."""
        rows: Any = self.batch_sampler
        rows.set_epoch(epoch)
