"""Describe the rotary embedding of a model, as config.json gives it: its base frequency, and its scaling.

Either spelling is read: `rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from llamita.errors import InputError, shown
from llamita.models.values import count, flag, number

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_KNOWING, _ORIGINAL = ("llama3", "yarn", "longrope"), "original_max_position_embeddings"
_OLD_NAMES = {"su": "longrope"}  # of the first Phi-3
_LARGEST_FACTOR = 1e6  # keeps the grown base of dynamic scaling within float32
_LARGEST_THETA = 1e12
_TURNS_RANGE = (1e-6, 1e6)  # low_freq_factor and high_freq_factor; context / factor stays within float32
_ATTENTION_RANGE = (1e-3, 1e3)
_LEAST_ORIGINAL = 2  # tokens: LongRoPE divides by the logarithm


@dataclass(frozen=True)
class RopeConfig:
    """Describe the rotary embedding: its base frequency and its scaling for long contexts.

    Attributes:
        factor: for all kinds but "default".
        low_freq_factor, high_freq_factor: for "llama3" (Llama 3.1, section "rope scaling" of its reference code).
        original_context: tokens of training before stretching; for all kinds but "default" and "linear".
        beta_fast, beta_slow: for "yarn", turns within the original context from which on, and up to which, a pair is
            not stretched at all, or by the whole factor (Peng et al. 2023, arXiv 2309.00071).
        is_truncated: for "yarn", whether the pairs at both ends are rounded outwards to whole numbers.
        attention_factor: multiplies cosines and sines; 1 but for "yarn" and "longrope".
        short_factors, long_factors: for "longrope", what divides each pair's frequency in texts up to the original
            context, and in longer ones (Ding et al. 2024, arXiv 2402.13753).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @classmethod
    def yarn(cls, theta: float, factor: float, original_context: int) -> "RopeConfig":
        """Return YaRN with the paper's values."""
        attention = _stretched(factor)
        return cls(theta, "yarn", factor, original_context=original_context, attention_factor=attention)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")


def read_rope(values: dict[str, Any], context: int, head_dim: int) -> tuple[RopeConfig, int]:
    """Return the rotary embedding, and the tokens of a sequence after stretching.

    Args:
        values: of config.json.
        context: its `max_position_embeddings`.
        head_dim: gives the number of LongRoPE's factors.

    Raises:
        InputError: a kind that is not known, or an impossible value.
    """
    old, new = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    scaling = old or new
    if not isinstance(scaling, dict):
        raise InputError("config.json: rope_scaling", "an object", type(scaling).__name__)
    if old and new and old != new:
        raise InputError("config.json: rope_scaling", "none beside other rope_parameters", hint="try removing one")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_TYPES:
        raise InputError("config.json: rope_scaling", f"one of {', '.join(ROPE_TYPES)}", shown(kind))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: partial_rotary_factor", "1.0", hint="the engine rotates whole heads")
    if kind in _KNOWING and (original := values.get(_ORIGINAL)) is not None:  # as transformers prefers it
        scaling = {**scaling, _ORIGINAL: original}
    theta = number(values, "rope_theta", 1, _LARGEST_THETA, default=10000.0)
    theta = number(scaling, "rope_theta", 1, _LARGEST_THETA, default=theta)
    if kind == "default":
        return RopeConfig(theta=theta), context
    if kind == "longrope":
        return _longrope(scaling, theta, context, head_dim), context
    if scaling.get("factor") is None:
        raise InputError("config.json: rope_scaling", f"a factor with type {kind!r}", "none")
    factor = number(scaling, "factor", 1, _LARGEST_FACTOR)  # below 1 it would shorten the context
    if kind == "yarn":
        rope = _yarn(scaling, theta, factor, context)
        return rope, max(context, int(rope.original_context * factor))
    if kind != "llama3":  # their config gives the trained context, and a factor
        return RopeConfig(theta=theta, kind=kind, factor=factor, original_context=context), int(context * factor)
    low, high = (number(scaling, f"{end}_freq_factor", *_TURNS_RANGE) for end in ("low", "high"))
    if low >= high:
        raise InputError("config.json: high_freq_factor", f"more than low_freq_factor {low}", f"{high}")
    original = count(scaling, _ORIGINAL)
    return RopeConfig(theta, kind, factor, low, high, original), context


def _yarn(scaling: dict[str, Any], theta: float, factor: float, context: int) -> RopeConfig:
    """Read YaRN's values; where no attention factor is given, it is the paper's 0.1·ln(factor) + 1."""
    low, high = _TURNS_RANGE
    plain = RopeConfig.yarn(theta, factor, count(scaling, _ORIGINAL, context))
    fast, slow = (
        number(scaling, key, low, high) if scaling.get(key) else default  # 0 counts as missing in transformers
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if fast <= slow:
        raise InputError("config.json: beta_fast", f"more than beta_slow {slow:g}", f"{fast:g}")
    if theta <= 1:
        raise InputError("config.json: rope_theta", "more than 1 with yarn", f"{theta:g}")
    scales = [scaling.get(key) and number(scaling, key, low, high) for key in ("mscale", "mscale_all_dim")]
    attention = plain.attention_factor
    if all(scales):
        attention = _stretched(factor, scales[0]) / _stretched(factor, scales[1])
    if scaling.get("attention_factor") is not None:
        attention = number(scaling, "attention_factor", *_ATTENTION_RANGE)
    is_truncated = flag(scaling, "truncate", True)
    return replace(plain, beta_fast=fast, beta_slow=slow, is_truncated=is_truncated, attention_factor=attention)


def _stretched(factor: float, scale: Any = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0


def _longrope(scaling: dict[str, Any], theta: float, context: int, head_dim: int) -> RopeConfig:
    """Read LongRoPE's values; where no attention factor is given, it is √(1 + ln(factor) / ln(original context))."""
    original = count(scaling, _ORIGINAL, context)
    if original < _LEAST_ORIGINAL:
        raise InputError("config.json: original_max_position_embeddings", f"at least {_LEAST_ORIGINAL}", f"{original}")
    factors = []
    for key in ("short_factor", "long_factor"):
        given = scaling.get(key)
        if not isinstance(given, list) or len(given) != head_dim // 2:
            raise InputError(f"config.json: {key}", f"{head_dim // 2} numbers, one for each pair", shown(given, 40))
        factors.append(tuple(number({key: value}, key, 1e-3, _LARGEST_FACTOR) for value in given))
    factor = number(scaling, "factor", 1e-3, _LARGEST_FACTOR, default=context / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if scaling.get("attention_factor") is not None:
        attention = number(scaling, "attention_factor", *_ATTENTION_RANGE)
    return RopeConfig(
        theta, "longrope", factor, original_context=original, attention_factor=attention,
        short_factors=factors[0], long_factors=factors[1],
    )  # fmt: skip
