"""Rotations as a value: what can be said and what is refused."""

import numpy as np
import pytest

from llamita.errors import InputError
from llamita.numerics.rotations import Rotations


def test_a_list_of_llamita_json_and_back() -> None:
    rotations = Rotations(("R1", "R2", "R4"), 768)
    assert rotations.to_list() == [{"name": "R1"}, {"name": "R2"}, {"name": "R4", "size": 768}]
    assert Rotations.from_list(rotations.to_list()) == rotations
    assert Rotations.from_list([]) == Rotations()


def test_only_r4_and_the_head_need_the_runtime() -> None:
    assert not Rotations(("R1", "R2")).acts_at_run_time
    assert Rotations(("R4",), 64).acts_at_run_time
    assert Rotations(("R1",), None, np.eye(4, dtype=np.float32)).acts_at_run_time


@pytest.mark.parametrize(
    "values",
    [None, {}, ["R1"], [{"name": "R3"}], [{"name": "R1", "size": 4}], [{"name": "R4"}], [{"size": 4}],
     [{"name": "R4", "size": 0}], [{"name": "R4", "size": 8.0}], [{"name": "R4", "size": True}],
     [{"name": "R2"}, {"name": "R1"}], [{"name": "R1"}, {"name": "R1"}], [{"name": ["R1"]}]],
)  # fmt: skip
def test_what_is_not_known_is_refused(values: object) -> None:
    with pytest.raises(InputError, match="rotations"):
        Rotations.from_list(values)


@pytest.mark.parametrize(
    ("names", "size", "transform"),
    [(("R4",), None, None), (("R1",), 64, None), (("R2",), None, np.eye(4)), (("R1",), None, np.ones((2, 3)))],
)
def test_what_does_not_fit_together_is_refused(
    names: tuple[str, ...], size: int | None, transform: np.ndarray | None
) -> None:
    with pytest.raises(InputError, match="rotations"):
        Rotations(names, size, transform)
