"""The KV cache of one sequence: its keys and values, its length, its rotary frequencies."""

import math

import numpy as np

from llamita import _native
from llamita.engine.adapters import Adapter
from llamita.models.config import ModelConfig, RopeConfig

KV_DTYPES = ("f32", "f16", "int8")


class SequenceCache:
    """Keys and values of one sequence in every layer, in native memory that grows as tokens come.

    Args:
        config: gives the shapes and the rotary frequencies.
        capacity: the most tokens it can hold.
        kv_dtype: "f32", "f16", or "int8" with a scale and a zero point for each token and head.
        declared_length: the length that the sequence may reach. Dynamic rotary scaling depends on it. It is fixed at
            the start, so that the order of work cannot change a result.
    """

    def __init__(self, config: ModelConfig, capacity: int, kv_dtype: str, declared_length: int) -> None:
        frequencies = rope_frequencies(config.rope, config.head_dim, declared_length)
        self.native = _native.KVCache(
            config.layers, config.kv_heads, config.head_dim, capacity, kv_dtype, frequencies, 1.0
        )
        self.capacity = capacity
        self.length = 0
        self.adapter: Adapter | None = None  # used to compute the keys and values; set before the first step

    def copy_prefix(self, source: "SequenceCache", tokens: int) -> None:
        """Replace the content by the first tokens of another sequence of the same model.

        Args:
            source: has the same kv_dtype and, under dynamic rotary scaling, the same frequencies.
            tokens: at most source.length and this cache's capacity.

        Raises:
            ValueError: the caches do not match, or there are too many tokens.
        """
        if tokens > source.length:
            raise ValueError(f"tokens: expected at most {source.length}, got {tokens}")
        self.native.copy_prefix(source.native, tokens)
        self.length = tokens

    @property
    def nbytes(self) -> int:
        """Bytes reserved for the whole capacity. Tokens so far may fill less."""
        return self.native.nbytes


def rope_frequencies(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Return the radians per position of each rotated pair: float32 (head_dim / 2,).

    Every operation is in float32 and in the order of transformers (`modeling_rope_utils.py`), because an error in a
    frequency grows with the position. `length` only matters for "dynamic".
    """
    return _SCALINGS[rope.kind](rope, head_dim, length)


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(theta, exponents.astype(np.float64))  # NumPy's float32 power is off by one ulp
    return np.float32(1) / powers.astype(np.float32)


def _default(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    return _base_frequencies(rope.theta, head_dim)


def _linear(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Divide positions by the factor (position interpolation, arXiv 2306.15595)."""
    return _base_frequencies(rope.theta, head_dim) / np.float32(rope.factor)


def _dynamic(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Let the base grow with the length of the sequence beyond the trained context (NTK-aware scaling)."""
    if length <= rope.original_context:
        return _base_frequencies(rope.theta, head_dim)
    stretch = np.float32(rope.factor) * np.float32(length) / np.float32(rope.original_context)
    stretch -= np.float32(rope.factor - 1)
    growth = np.float32(float(stretch) ** (head_dim / (head_dim - 2)))
    return _base_frequencies(float(np.float32(rope.theta) * growth), head_dim)


def _llama3(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Divide slow pairs by the factor, leave fast ones and interpolate between them (Llama 3.1)."""
    frequencies = _base_frequencies(rope.theta, head_dim)
    # Torch divides a number by a tensor as number times reciprocal, here and for `turns`.
    wavelengths = np.float32(2 * math.pi) * (np.float32(1) / frequencies)  # positions per turn
    original, low, high = rope.original_context, rope.low_freq_factor, rope.high_freq_factor
    factor = np.float32(rope.factor)
    scaled = np.where(wavelengths > np.float32(original / low), frequencies / factor, frequencies)
    turns = np.float32(original) * (np.float32(1) / wavelengths)
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    is_between = (wavelengths >= np.float32(original / high)) & (wavelengths <= np.float32(original / low))
    return np.where(is_between, between, scaled)


_SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3}
