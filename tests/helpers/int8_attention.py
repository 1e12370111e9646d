"""Attention over an int8 cache in float64, and how far the engine's integers may be from it.

The spec rounds keys, values and queries as the engine does, and nothing else. The bound is of what the engine rounds
besides (docs/reference/numerics.md): weights to multiples of a unit, 2^x by a short polynomial, sums in float32.
"""

import numpy as np
import numpy.typing as npt
from kernel_specs import F32, hadamard, rotate

from llamita.numerics.affine import quantize_activations

F64 = npt.NDArray[np.float64]
BLOCK = 128
FINE, COARSE = 127 * 128, 127  # units of the largest weight of a block
FINE_SHARE = 1.001 / 64  # of all weights so far; the engine's sums are a little off
POLYNOMIAL = 1.02e-4  # relative error of 2^x
FLOATS = 3e-6  # of float32 sums of inputs of about 1
NEAR_TIE = 1e-3  # in codes: so near to a half, a query may be rounded either way


def attention(
    qkv: F32, heads: int, kv_heads: int, inv_freq: F32, window: int = 0, rotates: bool = True
) -> tuple[F64, F64]:
    """Return the outputs of a whole sequence, and by how much each may differ: (tokens, heads * dim).

    Arguments are those of `kernel_specs.attention`.
    """
    tokens, dim = len(qkv), 2 * len(inv_freq)
    q, k, v = np.split(qkv.reshape(tokens, heads + 2 * kv_heads, dim), [heads, heads + kv_heads], axis=1)
    angles = (np.arange(tokens, dtype=np.float32)[:, None] * inv_freq)[:, None]
    if rotates:
        q, k = (rotate(x, angles, 1.0) for x in (q, k))
    if dim & (dim - 1) == 0:
        q, k = (hadamard(x.reshape(-1, dim)).reshape(x.shape) for x in (q, k))
    (k_codes, k_scales), (v_codes, v_scales) = (_coded(x, heads // kv_heads) for x in (k, v))
    q_codes, q_scales, unsure = _rounded(q)
    keys = k_codes * k_scales[..., None]
    scores = np.einsum("thd,shd->hts", q_codes * q_scales[..., None], keys) / np.sqrt(dim)
    seen = np.tri(tokens, dtype=bool)  # (queries, keys)
    if window:
        seen &= ~np.tri(tokens, k=-window, dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    totals = weights.sum(axis=2)[..., None]  # (heads, tokens, 1)
    values, sizes = v_codes * v_scales[..., None], np.abs(v_codes)
    expected = np.einsum("hts,shd->htd", weights, values) / totals
    size = np.einsum("hts,shd->htd", weights, np.abs(values)) / totals
    lost = np.zeros_like(expected)
    for begin, unit in _units(scores, seen, v_scales):
        part = slice(begin, begin + BLOCK)
        lost += unit[..., None] / 2 * np.einsum("ts,shd->htd", seen[:, part].astype(float), sizes[part]) / totals
    # A query's code that may be one more or less changes scores by so much, and weights by a factor.
    change = np.einsum("thd,hd->ht", unsure * q_scales[..., None], np.abs(keys).max(axis=0)) / np.sqrt(dim)
    bound = lost + (2 * POLYNOMIAL + np.expm1(2 * change)[..., None]) * size + FLOATS
    return tuple(x.transpose(1, 0, 2).reshape(tokens, heads * dim) for x in (expected, bound))


def _coded(x: F32, group: int) -> tuple[F64, F64]:
    """Return codes less their zero points (tokens, heads, dim) and scales (tokens, heads), repeated for each query."""
    codes, scales, zeros = quantize_activations(x.reshape(-1, x.shape[2]))
    shifted = (codes.astype(np.float64) - zeros[:, None]).reshape(x.shape)
    return np.repeat(shifted, group, axis=1), np.repeat(scales.astype(np.float64).reshape(x.shape[:2]), group, axis=1)


def _rounded(q: F32) -> tuple[F64, F64, npt.NDArray[np.bool_]]:
    """Return a query's codes, its scales, and which codes are near a tie."""
    scales = np.abs(q).max(axis=2) / np.float32(127)
    exact = (q * (np.float32(1) / scales)[..., None]).astype(np.float64)
    codes = np.rint(exact)
    return codes, scales.astype(np.float64), np.abs(np.abs(exact - codes) - 0.5) < NEAR_TIE


def _units(scores: F64, seen: npt.NDArray[np.bool_], v_scales: F64) -> list[tuple[int, F64]]:
    """Return the unit of weights times scales of each block, relative to the largest weight: (heads, tokens)."""
    heads, tokens, _ = scores.shape
    most, total, units = np.full((heads, tokens), -np.inf), np.zeros((heads, tokens)), []
    for begin in range(0, tokens, BLOCK):
        part = scores[:, :, begin : begin + BLOCK]
        high = part.max(axis=2)
        after = np.maximum(most, high)
        with np.errstate(invalid="ignore"):  # a row that sees nothing yet
            correction, factor = np.nan_to_num(np.exp(most - after)), np.nan_to_num(np.exp(high - after))
            sums = np.nan_to_num(np.exp(part - after[..., None])).sum(axis=2)
        scale = np.where(seen[None, :, begin : begin + BLOCK], v_scales[begin : begin + BLOCK].T[:, None], 0).max(
            axis=2
        )
        coarse = factor <= FINE_SHARE * total * correction
        units.append((begin, scale / np.where(coarse, COARSE, FINE), high))
        most, total = after, total * correction + sums
    return [(begin, unit * np.exp(high - most)) for begin, unit, high in units]
