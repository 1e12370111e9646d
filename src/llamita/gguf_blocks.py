"""Matrices in GGUF's blocks of 32 weights: codes and scales, and floats."""

import numpy as np

from llamita.affine import to_f32
from llamita.gguf_file import BLOCK


def floats_of(kind: str, data: np.ndarray) -> np.ndarray:
    """A matrix of a file in float32 (rows, columns), or a vector."""
    if kind in ("F32", "F16"):
        return data.view({"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
    if kind == "BF16":
        return to_f32(data.view("<u2"))
    codes, scales = codes_of(kind, data)
    return (codes.reshape(*scales.shape, BLOCK).astype(np.float32) * scales[..., None]).reshape(codes.shape)


def codes_of(kind: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 (rows, columns) and scales float32 (rows, blocks) of a matrix in Q4_0 or Q8_0."""
    blocks = data.reshape(len(data), -1, 2 + (BLOCK // 2 if kind == "Q4_0" else BLOCK))
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    codes = blocks[..., 2:]
    if kind == "Q4_0":
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1).view(np.int8) - np.int8(8)
    return np.ascontiguousarray(codes).view(np.int8).reshape(len(data), -1), scales
