"""The order of rows and the frequencies that other formats expect."""

from pathlib import Path

import numpy as np
import pytest
from tiny import llama3_rope, make_checkpoint

from llamita.models.checkpoint import Checkpoint
from llamita.models.foreign_names import pair_order, rope_factors


def test_rows_go_where_neighbours_are_rotated() -> None:
    np.testing.assert_array_equal(pair_order(8, 2), [0, 2, 1, 3, 4, 6, 5, 7])


def test_frequencies_are_divided_as_llama_31_does(tmp_path: Path) -> None:
    values = {"head_dim": 128, "rope_theta": 500000.0, "rope_scaling": llama3_rope(8.0)}
    config = Checkpoint(make_checkpoint(tmp_path, "llama31", **values)).config
    factors = rope_factors(config)
    assert factors[0] == 1.0  # turns often: left alone
    assert factors[-1] == pytest.approx(config.rope.factor)  # turns seldom: stretched
    assert (np.diff(factors) >= 0).all()
