"""Compute the rotary frequencies of a sequence, with every scaling for long contexts."""

import math

import numpy as np

from llamita.models.rope import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Return the radians per position of each rotated pair: float32 (head_dim / 2,).

    Every operation is in float32 and in the order of transformers (`modeling_rope_utils.py`), because an error in a
    frequency grows with the position. `length` only matters for "dynamic" and "longrope".
    """
    return _SCALINGS[rope.kind](rope, head_dim, length)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    """Return the positions per radian of each pair before any scaling."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # NumPy's float32 power is off by one ulp.
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    return np.float32(1) / _powers(theta, head_dim)


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


def _yarn(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Divide slow pairs by the factor, leave fast ones, and blend between the two (YaRN, arXiv 2309.00071, 3.2)."""
    powers, pairs = _powers(rope.theta, head_dim), head_dim // 2

    def pair_of(turns: float) -> float:
        """Return the pair, as a real number, that turns so often within the original context."""
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    kept = np.float32(1) - ramp  # the share of a pair's own frequency
    stretched = np.float32(1) / (np.float32(rope.factor) * powers)
    return stretched * (np.float32(1) - kept) + (np.float32(1) / powers) * kept


def _longrope(rope: RopeConfig, head_dim: int, length: int) -> np.ndarray:
    """Divide each pair by a factor of its own, another in long texts (LongRoPE, arXiv 2402.13753)."""
    factors = rope.long_factors if length > rope.original_context else rope.short_factors
    return np.float32(1) / (np.array(factors, np.float32) * _powers(rope.theta, head_dim))


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
