"""What the native module refuses, and in which words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llamita import _native

F32 = np.zeros((2, 64), np.float32)
WIDE: Any = F32.astype(np.float64)
LIST: Any = [1.0]
PACKED, SCALES = np.zeros((3, 8), np.int32), np.ones((3, 2), np.float32)
W4 = _native.pack_w4([PACKED], [SCALES], 32)
W8 = _native.pack_w8(np.zeros((3, 64), np.int8), np.ones(3, np.float32))
FLOAT = _native.wrap_float([np.zeros((3, 64), np.float32)])


def acts(tokens: int = 2, columns: int = 64) -> _native.Activations:
    filled = _native.Activations(tokens, columns)
    _native.quantize(np.zeros((tokens, columns), np.float32), filled)
    return filled


def out(tokens: int = 2, rows: int = 3) -> np.ndarray:
    return np.zeros((tokens, rows), np.float32)


def locked() -> np.ndarray:
    array = out()
    array.flags.writeable = False
    return array


def low_rank(count: int = 3, start: int = 0, rank: int = 2) -> _native.LowRank:
    panels = np.zeros((1, 2, 16), np.float32)
    return _native.LowRank([np.zeros((rank, 64), np.float32)], [(panels, start, count)], 3, 1.0)


def heads_norm(gamma: int = 16, k_gamma: int | None = None, heads: int = 2) -> None:
    """On rows of 64 columns: two query heads, a key head and a value head of 16."""
    q, k = (np.ones(size, np.float32) for size in (gamma, gamma if k_gamma is None else k_gamma))
    _native.rmsnorm_heads(F32.copy(), q, k, heads, 1e-5)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "low rank, parts": (lambda: _native.LowRank([], [], 3, 1.0), "downs, ups: expected as many of one"),
    "low rank, rank": (lambda: low_rank(rank=4), r"ups: expected .*\(1, 4, 16\), got float32"),
    "low rank, outputs": (lambda: low_rank(start=1), "ups: expected outputs within 3, got 3 from 1"),
    "low rank, none": (lambda: low_rank(count=0), "ups: expected outputs within 3, got 0 from 0"),
    "low rank, panels": (lambda: low_rank(count=17), "ups: expected outputs within 3, got 17 from 0"),
    "low rank, x": (
        lambda: _native.low_rank(low_rank(), F32[:, :32].copy(), out()),
        r"x: expected float32 \(any, 64\)",
    ),
    "low rank, out": (lambda: _native.low_rank(low_rank(), F32, out(2, 4)), r"out: expected float32 \(2, 3\)"),
    "dtype": (lambda: _native.quantize(WIDE, acts()), r"x: expected float32 \(any, 64\), got float64"),
    "columns": (
        lambda: _native.quantize(F32[:, :32].copy(), acts()),
        r"x: expected float32 \(any, 64\), got .* \(2, 32\)",
    ),
    "axes": (lambda: _native.quantize(F32[0], acts()), r"x: expected float32 \(any, 64\), got float32 \(64,\)"),
    "strides": (lambda: _native.quantize(F32[:, ::2], acts(2, 32)), "x: expected a C-contiguous array"),
    "not an array": (lambda: _native.quantize(LIST, acts()), "x: expected a C-contiguous array"),
    "tokens": (lambda: _native.quantize(np.zeros((3, 64), np.float32), acts()), "x: expected at most 2 tokens, got 3"),
    "read-only": (lambda: _native.linear(W4, acts(), locked()), "out: expected a C-contiguous, writable array"),
    "out": (lambda: _native.linear(W4, acts(), out(2, 4)), r"out: expected float32 \(2, 3\), got float32 \(2, 4\)"),
    "bias": (lambda: _native.linear(W4, acts(), out(), np.zeros(2, np.float32)), r"bias: expected float32 \(3,\)"),
    "float input": (lambda: _native.linear(W4, F32, out()), "x: expected Activations for w4 weights"),
    "codes input": (lambda: _native.linear(FLOAT, acts(), out()), "x: expected a float32 array for f32 weights"),
    "acts' columns": (lambda: _native.linear(W8, acts(2, 32), out()), "x: expected 64 columns, got 32"),
    "group size": (lambda: _native.pack_w4([PACKED], [SCALES], 12), "group_size: expected a multiple of 8, got 12"),
    "groups": (lambda: _native.pack_w4([PACKED], [SCALES], 48), "group_size: expected a divisor of 64 columns, got 48"),
    "scales": (lambda: _native.pack_w4([PACKED], [SCALES[:2]], 32), r"scales: expected float32\|uint16 \(3, 2\)"),
    "pieces": (lambda: _native.pack_w4([PACKED], [], 32), "packed: expected as many arrays as scales"),
    "widths": (lambda: _native.wrap_float([F32, F32[:, :8].copy()]), r"arrays: expected float32 \(any, 64\)"),
    "mixed": (lambda: _native.wrap_float([F32, F32.astype(np.float16)]), "arrays: expected float32 .* got float16"),
    "too wide": (lambda: _native.wrap_float([np.zeros((1, 65537), np.uint16)]), "columns: expected 1 to 65536"),
    "no columns": (lambda: _native.Activations(1, 0), "columns: expected 1 to 65536, got 0"),
    "code": (lambda: _native.codes_to_packed(np.full((1, 8), 8, np.int8)), "codes: expected -8 to 7"),
    "broken word": (
        lambda: _native.codes_to_packed(np.zeros((1, 7), np.int8)),
        "codes: expected columns in a multiple of 8",
    ),
    "embed w4": (lambda: _native.embed(W4, np.zeros(1, np.int32), F32[:1]), "weights: expected w8 or float rows"),
    "id": (lambda: _native.embed(W8, np.array([0, 3]), F32.copy()), "ids: expected 0 to 2, got 3"),
    "negative id": (lambda: _native.embed(W8, np.array([-1, 0]), F32.copy()), "ids: expected 0 to 2, got -1"),
    "gate": (lambda: _native.swiglu(F32, np.zeros((2, 64), np.float32)), r"gate_up: expected float32 \(2, 128\)"),
    "buffer": (lambda: _native.new_buffer(2**61, 2), "rows, columns: expected a size that exists"),
    "empty buffer": (lambda: _native.new_buffer(1, 0), "rows, columns: expected a size that exists"),
    "gamma": (lambda: _native.rmsnorm(F32, F32[0, :8], 1e-5, F32.copy()), r"gamma: expected float32 \(64,\)"),
    "q_gamma": (lambda: heads_norm(gamma=0), "q_gamma: expected at least one number"),
    "k_gamma": (lambda: heads_norm(k_gamma=8), r"k_gamma: expected float32 \(16,\), got float32 \(8,\)"),
    "columns of heads": (
        lambda: heads_norm(gamma=24),
        r"qkv: expected \(heads \+ 2 \* kv_heads\) \* 24 columns for 2 heads, got 64",
    ),
    "heads of an odd rest": (lambda: heads_norm(heads=1), "qkv: expected .* 16 columns for 1 heads, got 64"),
    "heads alone": (lambda: heads_norm(heads=4), "qkv: expected .* 16 columns for 4 heads, got 64"),
    "no heads": (lambda: heads_norm(heads=0), "qkv: expected .* 16 columns for 0 heads, got 64"),
    "more heads than columns": (lambda: heads_norm(heads=2**64 - 2), "qkv: expected .* 16 columns for"),
    "read-only heads": (
        lambda: _native.rmsnorm_heads(locked(), F32[0, :1], F32[0, :1], 1, 1e-5),
        "qkv: expected a C-contiguous, writable array",
    ),
    "bits": (lambda: _native.round_weights(F32, 3, 32, "search"), "bits: expected 4 or 8, got 3"),
    "rule": (lambda: _native.round_weights(F32, 4, 32, "best"), "rule: expected 'torchao'.* got 'best'"),
    "rounding groups": (lambda: _native.round_weights(F32, 4, 48, "search"), "group_size: expected a divisor of 64"),
    "importance": (
        lambda: _native.round_weights(F32, 4, 32, "search", np.ones(3, np.float32)),
        r"importance: expected float32 \(64,\)",
    ),
    "set": (
        lambda: acts().set(np.zeros((3, 64), np.int8), np.ones(3, np.float32), np.zeros(3, np.int32)),
        "expected at most 2 tokens, got 3",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_clear_text(case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite_are_named(isa: str, value: float, dtype: type) -> None:
    w = np.ones((40, 70), dtype)
    w[39, 3] = np.nan
    w[37, 69] = value
    w[37, 70 - 33] = 1
    with pytest.raises(ValueError, match=rf"got -?{abs(value)} in row 37, column 69"):
        _native.round_weights(w, 4, 35, "search")
