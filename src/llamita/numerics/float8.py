"""Widen 8-bit floats to float32: E4M3, which has no infinities, and E5M2 (Micikevicius et al. 2022, "FP8 Formats").

A weight is its code's value times the scale of its block. The product is rounded once, to float32.
"""

import numpy as np
import numpy.typing as npt

from llamita.numerics.affine import F32

_AT_ONCE = 2**18  # values; np.take makes an index of 8 bytes of each


def _e4m3() -> F32:
    """Return the values of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; all bits set are NaN."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(8.0 + mantissas, exponents - 10)  # (1 + mantissa / 8) · 2^(exponent - 7)
    values = np.where(exponents == 0, np.ldexp(mantissas, -9), normal)
    values[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def _e5m2() -> F32:
    """Return the values of the 256 codes, each the upper half of a float16."""
    with np.errstate(invalid="ignore"):  # on Arm, NumPy warns of NaN
        return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


_VALUES = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2()}
FLOAT8 = tuple(_VALUES)  # names of their types in safetensors


def widen(
    codes: npt.NDArray[np.uint8], dtype: str, scales: F32 | None = None, block: tuple[int, int] = (1, 1),
    first_row: int = 0,
) -> F32:  # fmt: skip
    """Return codes as float32, multiplied by the scales of their blocks.

    Args:
        codes: (rows, columns) or (length,).
        dtype: one of FLOAT8.
        scales: (row blocks, column blocks), of matrices only; the last block of a dimension may be partial.
        block: rows and columns of a block.
        first_row: of `codes` in the matrix that the scales are of.
    """
    table, values = _VALUES[dtype], np.empty(codes.shape, np.float32)
    step = max(1, _AT_ONCE // max(1, codes[:1].size))
    for start in range(0, len(codes), step):
        part = values[start : start + step]
        np.take(table, codes[start : start + step], out=part, mode="clip")  # a code is always in range
        if scales is not None:
            rows = scales[(first_row + start + np.arange(len(part))) // block[0]]
            factors = rows if rows.shape[1] == 1 else np.repeat(rows, block[1], axis=1)[:, : part.shape[1]]
            with np.errstate(over="ignore", invalid="ignore"):  # whoever uses the values looks for these
                np.multiply(part, factors, out=part)
    return values
