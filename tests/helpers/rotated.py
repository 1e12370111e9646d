"""A rotated twin of a checkpoint by the plain formulas: R1 random, R4 by the whole Hadamard matrix."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from llamita.formats.safetensors import TensorInfo
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.affine import f32_to_bf16, to_f32
from llamita.numerics.hadamard import hadamard_matrix
from llamita.numerics.rotations import Rotations

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of the residual stream, behind a norm
WRITERS = ("o_proj", "down_proj")  # into it


class RotatedCheckpoint(Checkpoint):
    """The function of the checkpoint at `path`, which has no biases, by other weights; all float32.

    Args:
        names: of R1 and R4.
        transform_dtype: of the head's transform, "F32" or "BF16"; it is there with R1 and tied tables.
    """

    def __init__(self, path: Path, names: tuple[str, ...] = ("R1", "R4"), transform_dtype: str = "F32") -> None:
        super().__init__(path)
        hidden, inputs = self.config.hidden_size, self.config.intermediate_size
        self._r1, self._r4 = np.eye(hidden), None
        if "R1" in names:
            self._r1 = np.linalg.qr(np.random.default_rng(5).standard_normal((hidden, hidden)))[0]
        if "R4" in names:
            self._r4 = hadamard_matrix(inputs)
        self._is_fused = "R1" in names
        transform = None
        if self._is_fused and self.config.tied:
            gamma = to_f32(super().stored_vector("model.norm.weight")).astype(np.float64)
            transform = (self._r1.T @ (gamma[:, None] * self._r1)).astype(np.float32)
            transform = transform if transform_dtype == "F32" else f32_to_bf16(transform)
        self.rotations = Rotations(names, inputs if "R4" in names else None, transform)

    def weight(self, name: str) -> np.ndarray:
        block, _, last = name.rpartition(".")
        w = to_f32(super().weight(name)).astype(np.float64)
        if last in READERS:
            norm = "input_layernorm" if block.endswith("self_attn") else "post_attention_layernorm"
            w = self._behind_norm(w, f"{block.rpartition('.')[0]}.{norm}.weight")
        elif last == "lm_head":
            w = self._behind_norm(w, "model.norm.weight")
        elif last in WRITERS:
            w = self._r1.T @ w
        else:
            w = w @ self._r1
        return (w @ self._r4.T if last == "down_proj" and self._r4 is not None else w).astype(np.float32)

    def _behind_norm(self, w: np.ndarray, norm: str) -> np.ndarray:
        return w * to_f32(super().stored_vector(norm)) @ self._r1 if self._is_fused else w

    def stored_vector(self, name: str) -> np.ndarray:
        vector = to_f32(super().stored_vector(name))
        return np.ones_like(vector) if self._is_fused and "norm" in name else vector

    def info(self, tensor: str) -> TensorInfo:
        return replace(super().info(tensor), dtype="F32")
