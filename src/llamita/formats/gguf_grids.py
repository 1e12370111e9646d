"""Decode the blocks of GGUF whose codes are places in a codebook of vectors: IQ1, IQ2 and IQ3.

The codebooks are constants of the format (ggml/src/ggml-common.h). `gguf_grids.npz` has them; `tools/gguf_grids.py`
makes it from the package gguf.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

_FILE = Path(__file__).with_suffix(".npz")
_DELTA = np.float32(0.125)  # what IQ1 adds to or takes from each value


@cache
def _grids() -> dict[str, np.ndarray]:
    with np.load(_FILE, allow_pickle=False) as file:
        return {name: file[name].astype(np.float32) for name in file.files}


@cache
def _signs() -> np.ndarray:
    """Return 8 signs for each number of 7 bits: one a bit, and the eighth makes the count of minuses even."""
    numbers = np.arange(128, dtype=np.uint8)
    bits = np.unpackbits(numbers[:, None], axis=-1, bitorder="little")
    bits[:, 7] = bits.sum(axis=-1) % 2
    return 1 - 2 * bits.astype(np.float32)


def _signs_of(data: np.ndarray) -> np.ndarray:
    """Return the signs in all bits of bytes: (…, 8)."""
    return 1 - 2 * np.unpackbits(data[..., None], axis=-1, bitorder="little").astype(np.float32)


def _words(data: np.ndarray, kind: str) -> np.ndarray:
    return np.ascontiguousarray(data).view(kind)


def _scale(blocks: np.ndarray) -> np.ndarray:
    return _words(blocks[:, :2], "<f2").astype(np.float32)


def _pairs(data: np.ndarray) -> np.ndarray:
    """Return the lower and the upper half of each byte, one after the other: (blocks, 2·bytes)."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)


def _iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    """For 32 weights: four places in the grid, and a word with four signs of 7 bits and a scale of 4 bits."""
    parts = blocks[:, 2:].reshape(-1, 8, 8)
    word = _words(parts[..., 4:], "<u4")  # (blocks, 8, 1)
    scales = _scale(blocks) * (np.float32(0.5) + (word[..., 0] >> 28).astype(np.float32)) * np.float32(0.25)
    signs = _signs()[word >> np.arange(0, 28, 7, dtype=np.uint32) & 127]
    return (scales[..., None, None] * _grids()["iq2_xxs"][parts[..., :4]] * signs).reshape(-1, 256)


def _iq2_xs(blocks: np.ndarray) -> np.ndarray:
    """Words with a place of 9 bits and signs of 7, and scales of 4 bits for 16 weights."""
    word = _words(blocks[:, 2:66], "<u2")
    scales = _scale(blocks) * (np.float32(0.5) + _pairs(blocks[:, 66:])) * np.float32(0.25)
    values = _grids()["iq2_xs"][word & 511] * _signs()[word >> 9]
    return (scales[..., None] * values.reshape(-1, 16, 16)).reshape(-1, 256)


def _iq2_s(blocks: np.ndarray) -> np.ndarray:
    """Places of 10 bits: 32 bytes with the lower 8, then 32 of signs, 8 with the upper 2, and 8 of scales."""
    high = blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    places = blocks[:, 2:34].astype(np.uint16) | high.reshape(-1, 32).astype(np.uint16) << 8
    scales = _scale(blocks) * (np.float32(0.5) + _pairs(blocks[:, 74:])) * np.float32(0.25)
    values = _grids()["iq2_s"][places] * _signs_of(blocks[:, 34:66])
    return (scales[..., None] * values.reshape(-1, 16, 16)).reshape(-1, 256)


def _iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    """64 places, each of 4 weights, then 8 words with four signs of 7 bits and a scale of 4 bits."""
    word = _words(blocks[:, 66:], "<u4")
    scales = _scale(blocks) * (np.float32(0.5) + (word >> 28).astype(np.float32)) * np.float32(0.5)
    signs = _signs()[word[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127]
    values = _grids()["iq3_xxs"][blocks[:, 2:66]].reshape(signs.shape) * signs
    return (scales[..., None, None] * values).reshape(-1, 256)


def _iq3_s(blocks: np.ndarray) -> np.ndarray:
    """Places of 9 bits: 64 bytes with the lower 8, 8 with the upper bit; then 32 of signs and 4 of scales."""
    high = np.unpackbits(blocks[:, 66:74], axis=-1, bitorder="little").astype(np.uint16)
    values = _grids()["iq3_s"][blocks[:, 2:66] | high << 8].reshape(-1, 8, 4, 8)
    scales = _scale(blocks) * (1 + 2 * _pairs(blocks[:, 106:]))
    return (scales[..., None, None] * values * _signs_of(blocks[:, 74:106].reshape(-1, 8, 4))).reshape(-1, 256)


def _iq1_s(blocks: np.ndarray) -> np.ndarray:
    """32 places with 8 lower bits; 8 words with four times 3 upper bits, a scale of 3 bits and the sign of a shift."""
    word = _words(blocks[:, 34:], "<u2")
    high = word[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    places = blocks[:, 2:34].astype(np.uint16) | high.reshape(-1, 32) << 8
    scales = _scale(blocks) * (2 * (word >> 12 & 7) + 1).astype(np.float32)
    shift = np.where(word & 0x8000, -_DELTA, _DELTA)
    values = _grids()["iq1"][places].reshape(-1, 8, 32) + shift[..., None]
    return (scales[..., None] * values).reshape(-1, 256)


def _iq1_m(blocks: np.ndarray) -> np.ndarray:
    """As IQ1_S with shifts for 8 weights and scales for 16; the scale of scales is in the upper bits of their words."""
    high, word = _pairs(blocks[:, 32:48]), _words(blocks[:, 48:], "<u2")  # (blocks, 32), (blocks, 4)
    upper = (word >> 12) << np.array([0, 4, 8, 12], np.uint16)
    scale = np.bitwise_or.reduce(upper, axis=-1, keepdims=True).view("<f2").astype(np.float32)
    small = word[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    scales = scale * (2 * small.reshape(-1, 16) + 1).astype(np.float32)
    places = blocks[:, :32].astype(np.uint16) | (high & 7).astype(np.uint16) << 8
    shift = np.where(high & 8, -_DELTA, _DELTA)
    values = _grids()["iq1"][places] + shift[..., None]  # (blocks, 32, 8)
    return (scales[..., None] * values.reshape(-1, 16, 16)).reshape(-1, 256)


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s,
}  # fmt: skip
