"""Decode the blocks in which GGUF stores matrices: floats of every kind, and codes and scales of Q4_0 and Q8_0.

A block has the codes of 32 to 256 weights and their scales. Every function takes bytes (blocks, bytes of a block) and
returns float32 (blocks, weights of a block). It multiplies in the order of ggml's `dequantize_row_*`
(ggml/src/ggml-quants.c), so the values are ggml's to the bit. `gguf_grids` has the kinds with codebooks.
"""

from collections.abc import Callable

import numpy as np

from llamita.formats import gguf_grids
from llamita.formats.gguf import KINDS
from llamita.numerics.affine import to_f32

_WEIGHTS_AT_ONCE = 1 << 20  # weights; what is computed in between takes some ten times their bytes
_CURVE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)  # IQ4_*
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice the float of 4 bits
_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


def floats_of(kind: str, data: np.ndarray) -> np.ndarray:
    """Return a matrix of a file in float32 (rows, columns), or a vector."""
    if kind in ("F32", "F16", "F64"):
        return data.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind]).astype(np.float32)
    if kind == "BF16":
        return to_f32(data.view("<u2"))
    _, weights, width = KINDS[kind]
    decode = DECODERS[kind]
    blocks = data.reshape(-1, width)
    out = np.empty((len(blocks), weights), np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // weights)
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales; readers refuse what is not finite
        for start in range(0, len(blocks), step):
            out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(*data.shape[:-1], -1)


def codes_of(kind: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes int8 (rows, columns) and scales float32 (rows, blocks) of a matrix in Q4_0 or Q8_0."""
    blocks = data.reshape(len(data), -1, KINDS[kind][2])
    codes = blocks[..., 2:].view(np.int8) if kind == "Q8_0" else _nibbles(blocks[..., 2:]).view(np.int8) - np.int8(8)
    return np.ascontiguousarray(codes).reshape(len(data), -1), _f16(blocks[..., :2])[..., 0]


def _f16(data: np.ndarray) -> np.ndarray:
    """Return float16 numbers (…, 2·n) bytes as float32 (…, n)."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Return the lower halves of all bytes, then the upper ones: (…, 2·bytes)."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _bits(data: np.ndarray, count: int) -> np.ndarray:
    """Return the bits of bytes (blocks, bytes) as (blocks, count, bytes), the lowest first."""
    return data[:, None, :] >> np.arange(count, dtype=np.uint8)[:, None] & 1


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """Return the highest bits of Q5's codes (blocks, 32) in their place, from four bytes."""
    return np.unpackbits(data, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _f16(blocks[:, 2:4])


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _f16(blocks[:, :2]) * (codes.view(np.int8) - np.int8(16))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _f16(blocks[:, :2]) * codes + _f16(blocks[:, 2:4])


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8)


def _quarters(data: np.ndarray) -> np.ndarray:
    """Return codes of two bits from runs of 32 bytes: (blocks, runs, 4, 32), the lowest bits of a run first."""
    return data.reshape(len(data), -1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    """16 bytes of scales and minima of 16 weights each, 64 of codes, a scale of the scales and one of the minima."""
    scales = _f16(blocks[:, 80:82]) * (blocks[:, :16] & 15)
    minima = _f16(blocks[:, 82:84]) * (blocks[:, :16] >> 4)
    codes = _quarters(blocks[:, 16:80]).reshape(-1, 16, 16)
    return (scales[..., None] * codes - minima[..., None]).reshape(-1, 256)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    """32 bytes with the upper bits of codes, 64 with the lower two, 12 with 16 scales of 6 bits, a scale of these."""
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    high = (high[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = (_nibbles(low) | high << 4).view(np.int8) - np.int8(32)
    upper = _bits(blocks[:, :32], 8).reshape(-1, 2, 4, 32)
    codes = _quarters(blocks[:, 32:96]).view(np.int8) - (4 - 4 * upper.view(np.int8))
    scaled = _f16(blocks[:, 108:]) * scales
    return (scaled[..., None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


def _scales_and_minima(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 8 scales and 8 minima of 6 bits from 12 bytes; the last four of each are in two parts."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minima


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _with_minima(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _with_minima(blocks, low | _bits(blocks[:, 16:48], 8) << 4)


def _with_minima(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return scale · code - minimum of codes (blocks, 8, 32); both are 6-bit numbers with a scale of their own."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _f16(blocks[:, :2]) * scales, _f16(blocks[:, 2:4]) * minima
    return (scales[..., None] * codes - minima[..., None]).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """128 bytes with the lower 4 bits of codes, 64 with the upper 2, 16 int8 scales of 16 weights, a scale of these."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), _quarters(blocks[:, 128:192])
    low = np.concatenate([low & 15, low >> 4], axis=2)  # (blocks, halves, quarters, 32)
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    scales = _f16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)
    return (scales[..., None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * _CURVE[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """A scale, 8 scales of 6 bits (two bytes with upper, four with lower parts), and codes on a curve."""
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = _f16(blocks[:, :2]) * ((low | high << 4).astype(np.int8) - np.int8(32))
    values = _CURVE[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))]
    return (scales[..., None] * values).reshape(-1, 256)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    """A power of two, and floats of 4 bits (OCP Microscaling Formats 1.0); the exponent is of half the scale."""
    exponents = blocks[:, :1].astype(np.uint32)
    bits = np.where(exponents < 2, 1 << 21 + exponents, np.maximum(exponents, 1) - 1 << 23).astype(np.uint32)
    return bits.view(np.float32) * _E2M1[_nibbles(blocks[:, 1:])]


def _nvfp4(blocks: np.ndarray) -> np.ndarray:
    """Four scales, floats of 8 bits without sign (4 of exponent, 3 of mantissa), and floats of 4 bits."""
    exponent, mantissa = blocks[:, :4] >> 3 & 15, (blocks[:, :4] & 7).astype(np.float32)
    scale = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7))
    scale = np.where(np.isin(blocks[:, :4], (0, 0x7F)), 0, scale * np.float32(0.5)).astype(np.float32)
    return (scale[..., None] * _E2M1[_nibbles(blocks[:, 4:].reshape(-1, 4, 8))]).reshape(-1, 64)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    """Digits of base 3: five in each of 48 bytes, four in each of 4, as a fraction of 256; then a scale."""
    parts = [
        blocks[:, None, part] * _POWERS_OF_3[:digits, None]  # modulo 256: the digits before are gone
        for part, digits in ((slice(32), 5), (slice(32, 48), 5), (slice(48, 52), 4))
    ]
    digits = np.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=-1).astype(np.uint16) * 3 >> 8
    return _f16(blocks[:, 52:]) * (digits.astype(np.int8) - np.int8(1))


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    codes = _quarters(blocks[:, :64]).reshape(-1, 256).view(np.int8) - np.int8(1)
    return _f16(blocks[:, 64:]) * codes


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4, "NVFP4": _nvfp4, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
    **gguf_grids.DECODERS,
}  # fmt: skip
