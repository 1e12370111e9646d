"""Estimate intervals for a mean over tokens, whose values depend on their neighbours, by the block bootstrap.

Consecutive values are cut into blocks, blocks are drawn with replacement, and the percentiles of the redrawn means
bound the interval (Carlstein 1986). Two models are compared by their differences token by token, so that the text's
variance, which both share, cancels.
"""

from dataclasses import dataclass

import numpy as np

BLOCK = 128  # tokens; beyond this distance the errors of two tokens of one text are nearly independent
FEWEST_BLOCKS = 20  # a short text gets shorter blocks: percentiles of a few blocks mean nothing
RESAMPLES = 2000
LEVEL = 0.95
SEED = 1
_DRAWN_AT_ONCE = 2**20  # block numbers in memory at a time


@dataclass(frozen=True)
class Interval:
    """Hold an estimate with the bounds of its interval at `LEVEL`."""

    value: float
    low: float
    high: float


def mean_interval(values: np.ndarray, *, block: int = BLOCK, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Return the mean of values in the order of their tokens, with its block bootstrap interval.

    Args:
        values: (tokens,), finite, at least one.
        block: consecutive values that stay together; fewer if the text is short.
        resamples: means to draw.
        seed: the interval depends on the values and this number alone.

    Raises:
        ValueError: there are no values, or NaN or infinity among them.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"values: expected finite numbers, got {values.size} with NaN or infinity, or none")
    sums, counts = _block_sums(values, max(1, min(block, values.size // FEWEST_BLOCKS)))
    means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(values: np.ndarray, baseline: np.ndarray, **options: int) -> Interval:
    """Return the mean of `values - baseline`, token by token, with its interval; options as in `mean_interval`."""
    difference = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return mean_interval(difference, **options)


def _block_sums(values: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and count of each block; the last one may be shorter."""
    starts = np.arange(0, values.size, block)
    counts = np.minimum(block, values.size - starts)
    return np.add.reduceat(values, starts), counts.astype(np.float64)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return means of blocks drawn with replacement, as many as there are: (resamples,)."""
    means = np.empty(resamples)
    step = max(1, _DRAWN_AT_ONCE // sums.size)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, sums.size, size=(min(step, resamples - start), sums.size))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means
