"""The specification of rounding against torchao and exhaustive search; the native kernels against it."""

import importlib.util
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita import _native
from llamita.numerics.affine import (
    SMALLEST_NORMAL,
    bf16_to_f32,
    dequantize,
    f32_to_bf16,
    quantize_activations,
    round_weights,
    to_f32,
)

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def awkward_weights(rows: int = 24, columns: int = 512, seed: int = 0) -> np.ndarray:
    """Normal weights with groups of zeros, one sign, huge, tiny and subnormal values, and exact ties."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
    w[0, :256] = 0
    w[1] = np.abs(w[1])
    w[2] = -np.abs(w[2])
    w[3] *= np.float32(1e30)
    w[4] *= np.float32(1e-30)
    w[5] *= np.float32(1e-38)
    w[6, :256] = np.arange(256) % 16 - 7.5  # ties: half of every step
    w[7, ::7] *= 100  # outliers
    w[8] = np.sign(w[8])
    w[9, 1:] = 0
    w[10] *= np.float32(2.0**-126)
    return w


# ---- against torchao -----------------------------------------------------------------------------


@needs_torchao
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("seed", [0, 1])
def test_int4_groups_are_bit_equal_to_torchao(group_size: int, seed: int) -> None:
    torch: Any = importlib.import_module("torch")
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    w = awkward_weights(seed=seed)
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(torch.from_numpy(w.copy()))
    model: Any = torch.nn.Sequential(linear)
    quantize_(
        model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group_size))
    )
    expected_codes = model[0].weight.qdata.numpy()
    expected_scales = model[0].weight.scale.numpy()
    for rounded in (round_weights, _native.round_weights):
        codes, scales, _ = rounded(w, 4, group_size, "torchao")
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(scales.view(np.uint32), expected_scales.view(np.uint32))
        np.testing.assert_array_equal(dequantize(codes, scales), model[0].weight.dequantize().numpy())


@needs_torchao
def test_int8_per_channel_is_bit_equal_to_torchao() -> None:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    w = awkward_weights()
    model: Any = torch.nn.Sequential(torch.nn.Embedding(*w.shape, _weight=torch.from_numpy(w.copy())))
    config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, config, lambda module, _name: isinstance(module, torch.nn.Embedding))
    for rounded in (round_weights, _native.round_weights):
        codes, scales, _ = rounded(w, 8, w.shape[1], "torchao")
        np.testing.assert_array_equal(codes, model[0].weight.qdata.numpy())
        np.testing.assert_array_equal(scales, model[0].weight.scale.numpy().reshape(-1, 1))


@needs_torchao
def test_activations_are_bit_equal_to_torchao() -> None:
    import torch
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    x = awkward_weights() * np.float32(50)
    x[11] += 3  # a token that is positive throughout
    block: Any = (1, x.shape[1])
    tensor = torch.from_numpy(x)
    limits: dict[str, Any] = {"quant_min": -128, "quant_max": 127}
    scale, zero = choose_qparams_affine(
        tensor, MappingType.ASYMMETRIC, block, target_dtype=torch.int8, zero_point_dtype=torch.int8, **limits
    )
    expected = quantize_affine(tensor, block, scale, zero, torch.int8, **limits)
    codes, scales, zero_points = quantize_activations(x)
    np.testing.assert_array_equal(codes, expected.numpy())
    np.testing.assert_array_equal(scales, scale.numpy().reshape(-1))
    np.testing.assert_array_equal(zero_points, zero.numpy().reshape(-1))


# ---- native kernels ------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rule", ["torchao", "torchao_bf16", "search", "weighted"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_native_rounding_is_bit_equal_to_its_twin(rule: str, bits: int, dtype: str) -> None:
    w = awkward_weights(columns=256)
    if dtype == "f16":
        w[3] = 1.0  # 1e30 is infinite in float16
        w = w.astype(np.float16)
    elif dtype == "bf16":
        w = f32_to_bf16(w)
    importance = None
    if rule == "weighted":
        rule, importance = "search", np.random.default_rng(1).gamma(1.0, 1.0, 256).astype(np.float32)
    for group_size in (32, 64, 256):
        expected = round_weights(w, bits, group_size, rule, importance)
        found = _native.round_weights(w, bits, group_size, rule, importance)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1].view(np.uint32), expected[1].view(np.uint32))
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 31), (23, 255)])
def test_a_value_that_is_not_finite_is_refused(value: float, place: tuple[int, int]) -> None:
    w = awkward_weights(columns=256)
    w[place] = value
    with pytest.raises(ValueError, match=f"row {place[0]}, column {place[1]}"):
        _native.round_weights(w, 4, 32, "search")
    with pytest.raises(ValueError, match="finite"):
        round_weights(w, 4, 32, "search")


# ---- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "qmax"), [(4, 7), (8, 127)])
def test_search_finds_the_best_of_all_bf16_scales(bits: int, qmax: int) -> None:
    """In float64, none from the scale that halves the largest weight to that which keeps it is better."""
    rng = np.random.default_rng(2)
    w = rng.standard_t(3, (40, 32)).astype(np.float32)
    importance = rng.gamma(0.5, 1.0, 32).astype(np.float32) + np.float32(0.01)
    for factors in (None, importance):
        _, scales, _ = round_weights(w, bits, 32, "search", factors)
        for row, scale in zip(w.astype(np.float64), scales[:, 0].astype(np.float64), strict=True):
            every = bf16_to_f32(np.arange(0x0080, 0x7F80, dtype=np.uint16)).astype(np.float64)
            largest = np.abs(row).max()
            candidates = every[(every >= largest / (2 * qmax + 2)) & (every <= largest / qmax)]
            assert len(candidates) > 128

            def error(s: np.ndarray, row: np.ndarray = row, factors: np.ndarray | None = factors) -> np.ndarray:
                q = np.clip(np.rint(row / s[:, None]), -qmax - 1, qmax)
                e = (row - q * s[:, None]) ** 2
                return (e if factors is None else e * factors).sum(axis=1)

            assert error(np.array([scale]))[0] <= error(candidates).min() * (1 + 1e-5)


def test_search_beats_the_plain_rules() -> None:
    w = np.random.default_rng(3).normal(0, 0.02, (64, 1024)).astype(np.float32)
    energy = (w.astype(np.float64) ** 2).sum()
    for group_size, plain, searched in ((32, 9.02e-3, 7.42e-3), (128, 12.33e-3, 10.21e-3), (256, 14.14e-3, 11.0e-3)):
        error = {rule: round_weights(w, 4, group_size, rule)[2].sum() / energy for rule in ("torchao", "search")}
        assert error["torchao"] == pytest.approx(plain, rel=0.02)  # published in the field for normal weights
        assert error["search"] == pytest.approx(searched, rel=0.02)


def test_scales_of_search_lie_on_the_grid_and_are_normal() -> None:
    for bits in (4, 8):
        _, scales, _ = round_weights(awkward_weights(), bits, 64, "search")
        np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(scales)), scales)
        assert scales.min() >= SMALLEST_NORMAL
        assert np.isfinite(scales).all()


def test_groups_of_zeros_have_a_harmless_scale() -> None:
    codes, scales, error = round_weights(np.zeros((2, 64), np.float32), 4, 32, "search")
    assert not codes.any()
    assert (scales == 1).all()
    assert not error.any()


# ---- bf16 and activations ------------------------------------------------------------------------


def test_every_bf16_value_survives_the_way_to_f32_and_back() -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values = bf16_to_f32(bits)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(f32_to_bf16(values)[finite], bits[finite])
    assert np.isnan(bf16_to_f32(f32_to_bf16(values[~finite]))).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
@settings(max_examples=300, deadline=None)
def test_bf16_rounds_to_the_nearest_and_ties_to_even(value: float) -> None:
    below = np.float32(value).view(np.uint32) >> 16
    neighbours = np.array([below, below + 1], np.uint16)  # away from zero: the two that enclose the value
    distance = np.abs(bf16_to_f32(neighbours).astype(np.float64) - np.float64(np.float32(value)))
    chosen = f32_to_bf16(np.array([value], np.float32))[0]
    if distance[0] == distance[1]:
        assert chosen == neighbours[neighbours % 2 == 0][0]
    else:
        assert chosen == neighbours[np.argmin(distance)]


def test_bf16_halves_go_to_the_even_neighbour() -> None:
    below = np.arange(0x0080, 0x7F00, dtype=np.uint32)
    halves = (below << 16 | 0x8000).view(np.float32)
    np.testing.assert_array_equal(f32_to_bf16(halves), below + below % 2)
    np.testing.assert_array_equal(f32_to_bf16(-halves), (below + below % 2) | 0x8000)


def test_to_f32_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="float64"):
        to_f32(np.zeros(3))


def test_activations_reproduce_zero_and_stay_within_half_a_step() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, (16, 128)).astype(np.float32)
    x[0], x[1, 3] = 0, 0
    codes, scales, zero_points = quantize_activations(x)
    again = dequantize(codes, scales, zero_points)
    assert not again[0].any()
    assert again[1, 3] == 0
    assert (np.abs(again - x) <= 0.501 * scales[:, None] + 1e-6).all()
    assert scales[0] == SMALLEST_NORMAL
    assert zero_points[0] == -128
