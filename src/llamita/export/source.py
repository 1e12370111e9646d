"""What exporters ask of a packed model: that nothing runs online, scales on a coarser grid, plain numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.models.names import linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.peft import StoredAdapter, read_adapter
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16, to_f32
from llamita.quantize.lineage import check_fits

Weight = Int4Weight | Int8Weight | np.ndarray
_EIGHT_ZEROS = np.uint32(0x88888888)  # a word of eight codes 0, each stored as 8
_SMALLEST_F16 = np.float32(2.0**-14)  # the smallest that is normal


def refuse_online(packed: PackedModel, target: str) -> None:
    """Raise InputError where a model needs more at run time than a plain Llama."""
    if packed.rotations.is_online:
        what = "R4" if packed.rotations.r4_size else "the matrix before a tied head"
        raise InputError(
            f"--to {target}",
            "a model that needs no rotation at run time",
            f"{what}, which this form cannot hold",
            "try quantize --no-online",
        )


def adapter_of(packed: PackedModel, path: Path | None) -> StoredAdapter | None:
    """The adapters that are to go with a model, found to fit it."""
    if path is None:
        return None
    check_fits(packed, [path])
    return read_adapter(path, packed.config)


def module_names(packed: PackedModel) -> list[str]:
    """Tables and linear layers, the head only where it has a table of its own."""
    return [*table_names(packed.config), *linear_names(packed.config)]


@dataclass(frozen=True)
class Grid:
    """How a model's scales lie on a coarser grid.

    Attributes:
        total: scales of rounded layers.
        off: those that change when they are rounded to it.
        subnormal: those that are subnormal there, and exact.
        largest: relative change of the one that changes most.
        zeros: groups and channels of zeros, whose scale means nothing and is 1.
    """

    total: int
    off: int
    subnormal: int
    largest: float
    zeros: int


def check_grid(packed: PackedModel, grid: str, may_round: bool, target: str) -> Grid:
    """See that scales lie on a grid, "bf16" or "f16", or may be rounded to it.

    Raises:
        InputError: the first layer with one that does not lie there, or none of whose values is near.
    """
    total = off = subnormal = zeros = 0
    largest = 0.0
    for name in module_names(packed):
        weight = packed.weight(name)
        zeros += _groups_of_zeros(weight)
        if isinstance(weight, np.ndarray) or (grid == "bf16" and isinstance(weight, Int8Weight)):
            continue  # scales of channels are float32 there
        scales = to_f32(np.asarray(weight.scales)).ravel()
        rounded = _on(scales, grid)
        changes = np.abs(rounded - scales) / scales
        lost = ~np.isfinite(rounded) | (rounded <= 0) | (changes > 2.0**-8)
        if lost.any():
            raise InputError(
                f"--to {target}: {name}",
                f"scales within {grid}",
                f"{scales[lost][0]:g}",
                "try another form: these weights are too small or too large for it",
            )
        is_off = rounded != scales
        if is_off.any() and not may_round:
            raise InputError(
                f"--to {target}: {name}",
                f"scales on the grid of {grid}",
                "others",
                "try --round-scales, which says how much it changes",
            )
        total, off = total + len(scales), off + int(is_off.sum())
        if grid == "f16":
            subnormal += int(((rounded < _SMALLEST_F16) & ~is_off).sum())
        largest = max(largest, float(changes.max()))
    return Grid(total, off, subnormal, largest, zeros)


def _groups_of_zeros(weight: Weight) -> int:
    """How many groups, or channels of int8, have zeros alone."""
    if isinstance(weight, np.ndarray):
        return 0
    if isinstance(weight, Int8Weight):
        return int((~np.any(weight.codes, axis=1)).sum())
    words = np.asarray(weight.packed).view(np.uint32) == _EIGHT_ZEROS
    return int(words.reshape(*np.asarray(weight.scales).shape, -1).all(axis=-1).sum())


class RoundedScales:
    """A packed model with its scales rounded to a grid; all else is the model's own."""

    def __init__(self, packed: PackedModel, grid: str) -> None:
        self._packed, self._grid = packed, grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packed, name)

    def weight(self, name: str) -> Weight:
        """As the model has it, on other scales."""
        weight = self._packed.weight(name)
        if isinstance(weight, np.ndarray) or (self._grid == "bf16" and isinstance(weight, Int8Weight)):
            return weight
        scales = _on(to_f32(np.asarray(weight.scales)), self._grid)
        if isinstance(weight, Int4Weight):
            return Int4Weight(weight.packed, scales, weight.group_size)
        return Int8Weight(weight.codes, scales)


def _on(scales: np.ndarray, grid: str) -> np.ndarray:
    if grid == "bf16":
        return bf16_to_f32(f32_to_bf16(scales))
    with np.errstate(over="ignore", under="ignore"):
        return scales.astype(np.float16).astype(np.float32)


def transformers_keys(packed: PackedModel) -> dict[str, Any]:
    """config.json as transformers' own Llama takes it: without what says how it is stored."""
    strange = ("quantization_config", "model_type", "architectures", "dtype", "torch_dtype")
    return {key: value for key, value in packed.hf_config.items() if key not in strange}
