"""Decode matrices in GGUF's blocks: codes and scales of Q4_0 and Q8_0, and floats of every kind that is read.

llama.cpp's Q4_0 files store the head, or the tied table, in Q6_K.
"""

import numpy as np

from llamita.formats.gguf import BLOCK
from llamita.numerics.affine import to_f32


def floats_of(kind: str, data: np.ndarray) -> np.ndarray:
    """Return a matrix of a file in float32 (rows, columns), or a vector."""
    if kind in ("F32", "F16"):
        return data.view({"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
    if kind == "BF16":
        return to_f32(data.view("<u2"))
    if kind == "Q6_K":
        return _q6_k(data)
    codes, scales = codes_of(kind, data)
    return (codes.reshape(*scales.shape, BLOCK).astype(np.float32) * scales[..., None]).reshape(codes.shape)


def codes_of(kind: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes int8 (rows, columns) and scales float32 (rows, blocks) of a matrix in Q4_0 or Q8_0."""
    blocks = data.reshape(len(data), -1, 2 + (BLOCK // 2 if kind == "Q4_0" else BLOCK))
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    codes = blocks[..., 2:]
    if kind == "Q4_0":
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1).view(np.int8) - np.int8(8)
    return np.ascontiguousarray(codes).view(np.int8).reshape(len(data), -1), scales


def _q6_k(data: np.ndarray) -> np.ndarray:
    """Return the floats of Q6_K blocks; multiply in the order of ggml's dequantize_row_q6_K.

    A block of 256 weights has 128 bytes with the lower 4 bits of codes, 64 with the upper 2, 16 int8 scales of 16
    weights each, and a scale of scales.
    """
    blocks = data.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # (blocks, halves, quarters, 32)
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << 4).astype(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scales *= np.ascontiguousarray(blocks[:, 208:]).view("<f2").astype(np.float32)
    return (codes.reshape(-1, 16, 16) * scales[..., None]).reshape(len(data), -1)
