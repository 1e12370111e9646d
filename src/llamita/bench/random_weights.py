"""Make random weights of any shape in seconds, as the engine takes them, without a checkpoint.

Speed, memory and size do not depend on the values of weights. Every matrix is a stretch of one block of random
numbers, each from another place, so that making a model costs no more than packing it. int4 and int8 matrices
are read once, when they are packed, and may share memory. Float ones stay in use, so each gets its own memory.
"""

import math
from pathlib import Path

import numpy as np

from llamita.models.config import ModelConfig
from llamita.models.names import linear_names, table_names, vector_names
from llamita.models.packed import layout
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.numerics.affine import f32_to_bf16
from llamita.numerics.packing import CODES_PER_WORD
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import KINDS, QuantScheme

_BLOCK_BYTES = 2**22  # of random numbers: little compared with a model
_STRIDE = 4099  # prime: matrices of equal shape begin at different places
_DEVIATION = 0.02  # of weights: the initializer range of Llama
_INT4_DEVIATION, _INT8_DEVIATION = 4.6, 73.9  # of codes spread evenly over -8..7 and -128..127
_SCALE_SPREAD = 0.25  # scales lie within this of their mean


class RandomSource:
    """A model of this shape, as a `ModelSource`.

    Args:
        config: the shape.
        scheme: how its weights are rounded; None for bf16.
        name: used in place of a directory.
        seed: the seed of the block of random numbers.

    Raises:
        InputError: the group size does not divide a layer's inputs.
    """

    def __init__(self, config: ModelConfig, scheme: QuantScheme | None, name: str, seed: int = 0) -> None:
        if scheme:
            layout(config, scheme, lambda _name: "BF16")  # raises if the groups do not fit
        self.path, self.config, self.scheme, self.rotations = Path(name), config, scheme, Rotations()
        self._matrices = linear_names(config) | table_names(config)
        self._vectors = vector_names(config)
        self._places = {name: i * _STRIDE for i, name in enumerate([*self._matrices, *self._vectors])}
        rng = np.random.default_rng(seed)
        words = rng.integers(0, 2**64, _BLOCK_BYTES // 8, dtype=np.uint64)
        self._bytes = words.view(np.uint8)
        self._spread = rng.uniform(1 - _SCALE_SPREAD, 1 + _SCALE_SPREAD, 2**16).astype(np.float32)
        self._floats = f32_to_bf16(np.float32(_DEVIATION) * rng.standard_normal(2**20, np.float32))

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        """Return a linear layer or table, stored by the scheme."""
        rows, columns = self._matrices[name]
        kind = self.scheme.kind(name) if self.scheme else KINDS["float"]
        if not kind.bits:
            return self._take(self._floats, name, (rows, columns))
        if not kind.group_size:
            codes = self._take(self._bytes.view(np.int8), name, (rows, columns))
            return Int8Weight(codes, self._scales(name, (rows,), _INT8_DEVIATION))
        words = self._take(self._bytes.view(np.int32), name, (rows, columns // CODES_PER_WORD))
        scales = self._scales(name, (rows, columns // kind.group_size), _INT4_DEVIATION)
        return Int4Weight(words, scales, kind.group_size)

    def vector(self, name: str) -> np.ndarray:
        """Return norms of one or biases of zero: float32 (length,)."""
        return np.full(self._vectors[name], 0.0 if name.endswith(".bias") else 1.0, np.float32)

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _scales(self, name: str, shape: tuple[int, ...], code_deviation: float) -> np.ndarray:
        """Return scales that give weights Llama's deviation: float32, or bf16 bits, as the scheme stores them."""
        assert self.scheme is not None
        scales = self._take(self._spread, name, shape) * np.float32(_DEVIATION / code_deviation)
        return scales if self.scheme.scale_dtype == "float32" else f32_to_bf16(scales)

    def _take(self, block: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of this shape, filled from the block, again and again, from this name's place on."""
        out = np.empty(math.prod(shape), block.dtype)
        start = self._places[name] % len(block)
        filled = 0
        while filled < len(out):
            piece = block[start : start + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, start = filled + len(piece), 0
        return out.reshape(shape)
