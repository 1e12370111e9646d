"""Native rounding on every instruction set, bit for bit against its NumPy twin."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from llamita import _native
from llamita.numerics import packing
from llamita.numerics.affine import f32_to_bf16, round_weights

RULES = ["torchao", "torchao_bf16", "search"]


def assert_equal_to_twin(
    w: np.ndarray, bits: int, group_size: int, rule: str, importance: np.ndarray | None = None
) -> None:
    codes, scales, error = _native.round_weights(w, bits, group_size, rule, importance)
    expected = round_weights(w, bits, group_size, rule, importance)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_allclose(error, expected[2], rtol=1e-12)


def weights(rows: int, columns: int) -> np.ndarray:
    w = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)
    w[0] = 0
    w[1, : columns // 2] = 0
    w[2] = np.round(w[2] * 4) / 8  # ties
    w[3] *= np.float32(1e-38)
    w[4] *= np.float32(1e36)
    w[5] = np.abs(w[5])
    w[6] = -np.abs(w[6])
    w[7, ::5] *= 50
    return w


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(256, 32), (256, 128), (80, 40), (75, 15), (77, 77), (3, 1)])
def test_equal_to_its_twin(isa: str, rule: str, bits: int, columns: int, group_size: int) -> None:
    assert_equal_to_twin(weights(24, columns), bits, group_size, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("narrow", [f32_to_bf16, lambda w: w.astype(np.float16)], ids=["bf16", "f16"])
def test_narrow_weights_are_widened_first(isa: str, rule: str, narrow: Callable[[np.ndarray], np.ndarray]) -> None:
    w = weights(20, 192)
    w[3:5] = 1  # out of range of float16
    assert_equal_to_twin(narrow(w), 4, 64, rule)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(256, 64), (100, 50)])
def test_importance_weighs_the_search(isa: str, bits: int, columns: int, group_size: int) -> None:
    importance = np.random.default_rng(1).uniform(0, 4, columns).astype(np.float32) ** 4
    w = weights(20, columns)
    assert_equal_to_twin(w, bits, group_size, "search", importance)
    plain = _native.round_weights(w, bits, group_size, "search")[1]
    weighed = _native.round_weights(w, bits, group_size, "search", importance)[1]
    assert (plain != weighed).any()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    w=nps.arrays(np.float32, (3, 32), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    bits=st.sampled_from([4, 8]),
    rule=st.sampled_from(RULES),
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_equal_to_its_twin_on_any_finite_weights(isa: str, w: np.ndarray, bits: int, rule: str) -> None:
    codes, scales, _ = _native.round_weights(w, bits, 16, rule)
    expected = round_weights(w, bits, 16, rule)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(codes, expected[0])


def test_scales_halfway_between_bf16_values_go_to_the_even_one(isa: str) -> None:
    step = np.float32(2.0**-8)  # half of bf16's spacing at 1
    w = np.zeros((3, 16), np.float32)
    w[:, 0] = np.float32(7.5) * (1 + step * np.array([1, 2, 3], np.float32))
    scales = _native.round_weights(w, 4, 16, "torchao_bf16")[1]
    np.testing.assert_array_equal(scales[:, 0], [1, 1 + 2 * step, 1 + 4 * step])


def test_threads_change_nothing() -> None:
    before, results = _native.threads(), []
    try:
        for count in (1, 2, 3):
            _native.set_threads(count)
            results.append(_native.round_weights(weights(50, 128), 4, 32, "search"))
    finally:
        _native.set_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_packing_equals_its_twin() -> None:
    codes = np.random.default_rng(2).integers(-8, 8, (37, 264), dtype=np.int8)
    np.testing.assert_array_equal(_native.codes_to_packed(codes), packing.pack_int4(codes))
