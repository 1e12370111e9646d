"""Turn the codes and scales of other tools into llamita's, without changing a weight.

llamita's scales are positive and normal. Its groups have 32, 64, 128 or 256 inputs, the largest that the scales allow:
other tools repeat a channel's scale, or have blocks of 32.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llamita.errors import InputError
from llamita.models.names import EMBEDDING
from llamita.numerics.affine import SMALLEST_NORMAL, bf16_to_f32, f32_to_bf16
from llamita.numerics.scheme import GIVEN, GROUP_SIZES, KINDS, QuantScheme

_LOWEST = {4: -8, 8: -128}


@dataclass(frozen=True)
class Coded:
    """A matrix in symmetric codes.

    Attributes:
        codes: int8 (rows, columns).
        scales: float32 (rows, groups), groups a divisor of columns.
        bits: 4 or 8.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int

    def floats(self) -> np.ndarray:
        """Return the codes times their scales, float32 (rows, columns)."""
        groups = self.codes.reshape(*self.scales.shape, -1)
        return (groups.astype(np.float32) * self.scales[..., None]).reshape(self.codes.shape)


@dataclass(frozen=True)
class Found:
    """The ways in which a matrix can be stored.

    Attributes:
        kinds: keys of `scheme.KINDS`, the best last; "float" where codes cannot be kept.
        is_uniform: whether all scales are equal, as in a matrix of zeros; they then say nothing of the group size.
        on_bf16: whether all scales are exact in bf16.
        changed: groups of zeros, and groups whose sign was turned.
        is_coded: whether the matrix came in codes, kept or not.
    """

    kinds: tuple[str, ...]
    is_uniform: bool = False
    on_bf16: bool = True
    changed: int = 0
    is_coded: bool = True


def with_positive_scales(name: str, coded: Coded) -> tuple[Coded | None, int]:
    """Return the same weights on positive scales with the number of groups that changed, or None if there is no way.

    A group on a negative scale changes the sign of codes and scale. That fails where it has the lowest code, whose
    opposite does not exist, as in llama.cpp's own Q4_0. A group of zeros gets the scale 1.

    Raises:
        InputError: a scale is NaN or infinite, or a code needs more bits.
    """
    codes, scales = coded.codes, coded.scales
    if coded.bits == 4 and codes.size and (codes.min() < -8 or codes.max() > 7):
        raise InputError(name, "codes from -8 to 7", f"{codes.min()} to {codes.max()}")
    if not np.isfinite(scales).all():
        raise InputError(name, "finite scales", "others", "the file is damaged")
    wrong = scales < SMALLEST_NORMAL
    if not wrong.any():
        return coded, 0
    groups = codes.reshape(*scales.shape, -1)[wrong]  # (groups, inputs of one)
    signs = scales[wrong]
    is_zero = (signs == 0) | ~groups.any(axis=1)
    turns = ~is_zero & (signs <= -SMALLEST_NORMAL) & (groups != _LOWEST[coded.bits]).all(axis=1)
    if not (is_zero | turns).all():
        return None, 0
    codes, scales = codes.reshape(*scales.shape, -1).copy(), scales.copy()
    codes[wrong] = np.where(is_zero[:, None], np.int8(0), -groups)
    scales[wrong] = np.where(is_zero, np.float32(1), np.abs(signs))
    return Coded(codes.reshape(coded.codes.shape), scales, coded.bits), int(wrong.sum())


def find_kinds(name: str, matrix: Coded | np.ndarray) -> Found:
    """Return the ways in which a matrix can be stored without changing a weight.

    Raises:
        InputError: the codes of a linear layer fit no group size, or see `with_positive_scales`.
    """
    if isinstance(matrix, np.ndarray):
        return Found(("float",), is_coded=False)
    coded, changed = with_positive_scales(name, matrix)
    if coded is None:
        return Found(("float",))
    scales, columns = coded.scales, coded.codes.shape[1]
    uniform = {"is_uniform": bool((scales == scales.flat[0]).all()), "changed": changed,
               "on_bf16": np.array_equal(bf16_to_f32(f32_to_bf16(scales)), scales)}  # fmt: skip
    per_row = bool((scales == scales[:, :1]).all())
    if coded.bits == 8 or name == EMBEDDING:  # an embedding is never int4 here
        return Found(("w8",), **uniform) if per_row else Found(("float",))
    fitting = [g for g in GROUP_SIZES if columns % g == 0 and _is_constant_in(scales, columns, g)]
    if not fitting:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InputError(name, f"scales for groups of {sizes} inputs", f"{scales.shape[1]} for {columns}")
    return Found(tuple(f"w4g{g}" for g in fitting), **uniform)


def _is_constant_in(scales: np.ndarray, columns: int, group_size: int) -> bool:
    """Return whether all inputs of a group of this size have one scale."""
    own = columns // scales.shape[1]  # inputs that share a stored scale
    if own % group_size == 0:
        return True
    if group_size % own:
        return False
    together = scales.reshape(len(scales), -1, group_size // own)
    return bool((together == together[..., :1]).all())


def scheme_of(found: Mapping[str, Found]) -> QuantScheme:
    """Return the scheme of a whole model, from the ways in which its matrices can be stored.

    Raises:
        InputError: no linear layer is int4.
    """
    blocks = [f for name, f in found.items() if name.startswith("model.layers.") and f.kinds[-1] != "float"]
    grouped = [f for f in blocks if f.kinds[-1].startswith("w4")]
    telling = [f for f in grouped if not f.is_uniform] or grouped
    if not telling:
        raise InputError("linear layers", "symmetric int4", "none whose codes llamita can keep")
    usual = Counter(f.kinds[-1] for f in telling).most_common(1)[0][0]
    kinds = {n: usual if f.is_uniform and usual in f.kinds else f.kinds[-1] for n, f in found.items()}
    on_bf16 = all(f.on_bf16 for f in found.values())
    return QuantScheme(
        name="custom", group_size=KINDS[usual].group_size or 0, scale_rule=GIVEN,
        scale_dtype="bfloat16" if on_bf16 else "float32", table_bits=8 if kinds[EMBEDDING] == "w8" else None,
        layers=kinds,
    )  # fmt: skip


def scales_for(coded: Coded, kind: str) -> np.ndarray:
    """Return scales float32 (rows, groups) for this kind: repeated, or one of those that are equal."""
    rows, columns = coded.codes.shape
    groups = columns // (KINDS[kind].group_size or columns)
    held = coded.scales.shape[1]
    if groups >= held:
        return np.repeat(coded.scales, groups // held, axis=1)
    return np.ascontiguousarray(coded.scales.reshape(rows, groups, -1)[..., 0])
