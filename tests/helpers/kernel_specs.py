"""What the native operations must compute, in plain NumPy: int64 dot products, exact fused multiply-adds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from llamita import _native
from llamita.numerics.affine import quantize_activations, to_f32

F32 = npt.NDArray[np.float32]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 18, 19, 20, 22, 23, 64]  # below, at and above every tile


def fma(a: F32, b: F32, c: F32) -> F32:
    """a * b + c rounded once: first in float64 to odd, so that the second rounding sees the first."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 + 24 bits
    total = product + c
    rest = product - (total - (total - product)) + (c - (total - product))  # what `total` lost
    bits = total.view(np.int64)
    even_and_inexact = (rest != 0) & (bits & 1 == 0)
    toward_zero = np.where((rest > 0) == (total > 0), 1, -1)
    return np.where(even_and_inexact, bits + toward_zero, bits).view(np.float64).astype(np.float32)


def linear(
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.generic],
    activations: tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.int32]],
    bias: F32 | None = None,
    residual: F32 | None = None,
) -> F32:
    """Quantized weights times quantized activations, in the documented order of every FP32 operation.

    Args:
        codes: (rows, columns).
        scales: (rows, groups), float32 or bf16 bits.
        activations: codes (tokens, columns), scales (tokens,), zero points (tokens,).
    """
    x, x_scales, zero_points = activations
    factors = to_f32(scales)
    rows, groups = factors.shape
    w = codes.reshape(rows, groups, -1).astype(np.int64)  # (rows, groups, inputs)
    dots = np.einsum("tgk,ngk->gtn", x.reshape(len(x), groups, -1).astype(np.int64), w)
    acc = np.zeros((len(x), rows), np.float32)
    column_sums = np.zeros(rows)
    for g in range(groups):
        acc = fma(dots[g].astype(np.float32), np.broadcast_to(factors[:, g], acc.shape), acc)
        column_sums += factors[:, g].astype(np.float64) * w[:, g].sum(axis=1)
    minus_zero_points = np.broadcast_to(-zero_points[:, None].astype(np.float32), acc.shape)
    acc = fma(minus_zero_points, np.broadcast_to(column_sums.astype(np.float32), acc.shape), acc)
    y = x_scales[:, None] * acc
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def float_linear(w: F32, x: F32) -> F32:
    """x (tokens, columns) times w (rows, columns): 16 lanes in order of k, then a tree of halves."""
    columns = w.shape[1]
    padding = ((0, 0), (0, -columns % 16))
    w_lanes, x_lanes = (np.pad(a, padding).reshape(len(a), -1, 16) for a in (w, x))
    acc = np.zeros((len(x), len(w), 16), np.float32)
    for k in range(w_lanes.shape[1]):
        acc = fma(x_lanes[:, None, k], w_lanes[None, :, k], acc)
    for width in (8, 4, 2, 1):
        acc = acc[..., :width] + acc[..., width : 2 * width]
    return acc[..., 0]


def rmsnorm(x: F32, gamma: F32, eps: float) -> npt.NDArray[np.float64]:
    """In float64, as everything below: within FP32's own error of the native result."""
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps) * gamma


def hadamard(x: F32, signs: npt.NDArray[np.int8] | None = None) -> F32:
    """x (tokens, columns) as (tokens, K, n): levels 1, 2, 4, ... over n, sums over K in order, one factor."""
    tokens, columns = x.shape
    runs = 1 if signs is None else len(signs)
    v, stride = x.reshape(tokens, runs, -1), 1
    while stride < columns // runs:
        pairs = v.reshape(tokens, runs, -1, 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        v, stride = np.stack([a + b, a - b], axis=-2).reshape(tokens, runs, -1), 2 * stride
    if signs is not None:
        total = np.zeros_like(v)
        for k in range(runs):  # times 1 or -1 is exact: a plain sum is the fused one
            total += signs[:, k, None].astype(np.float32) * v[:, k : k + 1]
        v = total
    return (v * np.float32(1 / np.sqrt(columns))).reshape(tokens, columns)


def swiglu(gate_up: F32) -> npt.NDArray[np.float64]:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):  # to infinity, and the quotient to 0
        return gate / (1 + np.exp(-gate)) * up


def rotate(x: F32, angles: F32, rope_scaling: float) -> F32:
    """x (tokens, heads, dim) by angles (tokens, 1, dim / 2), rounded as the engine rounds it."""
    wide, scaling = angles.astype(np.float64), np.float32(rope_scaling)
    cos, sin = np.cos(wide).astype(np.float32) * scaling, np.sin(wide).astype(np.float32) * scaling
    low, high = np.split(x, 2, axis=2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2).astype(np.float32)


def coded(x: F32) -> npt.NDArray[Any]:
    """What int8 keys or values (tokens, heads, dim) stand for: each head as a token's activations are."""
    codes, scales, zeros = quantize_activations(x.reshape(-1, x.shape[2]))
    values = scales[:, None] * (codes.astype(np.float64) - zeros[:, None])
    return values.reshape(x.shape)


def attention(
    qkv: F32,
    heads: int,
    kv_heads: int,
    inv_freq: F32,
    rope_scaling: float = 1.0,
    dtype: str = "f32",
    window: int = 0,
    rotates: bool = True,
) -> npt.NDArray[np.float64]:
    """Rotary embedding and causal attention of a whole sequence: qkv (tokens, (heads + 2 kv_heads) * dim).

    Of an int8 cache, heads of a power of two are Hadamard transformed. A query sees the last `window` keys; 0 for all.
    """
    tokens, dim = len(qkv), 2 * len(inv_freq)
    q, k, v = np.split(qkv.reshape(tokens, heads + 2 * kv_heads, dim), [heads, heads + kv_heads], axis=1)
    angles = (np.arange(tokens, dtype=np.float32)[:, None] * inv_freq)[:, None]
    if rotates:
        q, k = (rotate(x, angles, rope_scaling) for x in (q, k))
    if dtype == "int8" and dim & (dim - 1) == 0:
        q, k = (hadamard(x.reshape(-1, dim)).reshape(x.shape) for x in (q, k))
    stored = {"f32": lambda x: x, "f16": lambda x: x.astype(np.float16), "int8": coded}[dtype]
    k, v = (np.repeat(stored(x).astype(np.float64), heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q.astype(np.float64), k) / np.sqrt(dim)
    seen = np.tri(tokens, dtype=bool)  # (queries, keys)
    if window:
        seen &= ~np.tri(tokens, k=-window, dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v).reshape(tokens, heads * dim)


def assert_same_bits_everywhere(compute: Callable[[], Any]) -> None:
    """The arrays that `compute` gives are the same on every instruction set and number of threads."""
    before, threads, results = _native.isa(), _native.threads(), []
    try:
        for name in _native.available_isas():
            for count in (1, 2, 5):
                _native.set_isa(name)
                _native.set_threads(count)
                assert (_native.isa(), _native.threads()) == (name, count)
                results.append(compute())
    finally:
        _native.set_isa(before)
        _native.set_threads(threads)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)
