"""Block bootstrap: exact where it can be, and honest about dependence and coverage."""

import numpy as np
import pytest

from llamita.numerics.intervals import Interval, mean_interval, paired_difference


def moving_average(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Noise of mean 0 whose neighbours depend on each other over `width` values."""
    return np.convolve(rng.standard_normal(count + width - 1), np.ones(width) / width, mode="valid")


def test_constant_values_have_no_width():
    assert mean_interval(np.full(1000, 0.25)) == Interval(0.25, 0.25, 0.25)


def test_value_is_the_plain_mean_whatever_the_blocks():
    values = np.random.default_rng(0).exponential(size=1234)
    for block in (1, 7, 128, 5000):
        interval = mean_interval(values, block=block)
        assert interval.value == values.mean()
        assert interval.low < interval.value < interval.high


def test_seed_decides_the_interval():
    values = np.random.default_rng(0).standard_normal(5000)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_interval_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(0).standard_normal(5000)
    whole = mean_interval(values)
    monkeypatch.setattr("llamita.numerics.intervals._DRAWN_AT_ONCE", 100)
    assert mean_interval(values) == whole


def test_width_of_independent_values_is_that_of_the_normal_law():
    values = np.random.default_rng(0).standard_normal(20_000)
    interval = mean_interval(values)
    expected = 2 * 1.96 / np.sqrt(values.size)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.15)


def test_blocks_cover_the_mean_of_dependent_values_and_single_values_do_not():
    rng = np.random.default_rng(0)
    covered = {1: 0, 128: 0}
    trials = 100
    for _ in range(trials):
        values = moving_average(rng, 4000, 16)
        for block in covered:
            interval = mean_interval(values, block=block, resamples=300)
            covered[block] += interval.low <= 0 <= interval.high
    assert covered[128] >= 0.85 * trials
    assert covered[1] <= 0.6 * trials  # one value at a time takes neighbours for independent


def test_short_texts_keep_enough_blocks():
    interval = mean_interval(np.array([0.0] * 20 + [1.0] * 20))
    assert 0 < interval.low < 0.5 < interval.high < 1
    assert mean_interval(np.array([3.0])) == Interval(3.0, 3.0, 3.0)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    text = 5 * rng.standard_normal(4000)
    model, baseline = text + 0.1 + 0.01 * rng.standard_normal(4000), text
    paired = paired_difference(model, baseline)
    assert paired.low < 0.1 < paired.high
    assert paired.high - paired.low < 0.01 * (mean_interval(model).high - mean_interval(model).low)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite"):
        mean_interval(np.array(values))
