"""Answer what exporters ask of a packed model: its modules and name, its adapter, its scales on a coarser grid."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.names import linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.peft import StoredAdapter, read_adapter
from llamita.models.weights import Int4Weight, Int8Weight, ModelSource, Weight
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16, to_f32
from llamita.numerics.packing import CODES_PER_WORD, unpack_int4
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.lineage import check_fits

NO_ROTATION = "try quantize --no-runtime-rotation"
_EIGHT_ZEROS = np.uint32(0x88888888)  # a word of eight codes 0, each stored as 8
_SMALLEST_F16 = np.float32(2.0**-14)  # the smallest that is normal
_LARGEST_CHANGE = 2.0**-8  # of a scale by rounding to bf16


def refuse_rotation(packed: PackedModel, target: str) -> None:
    """Raise InputError if a model needs more at run time than a plain Llama."""
    if packed.rotations.acts_at_run_time:
        what = "R4" if packed.rotations.r4_size else "the matrix in front of a tied head"
        expected = "a model that needs no rotation at run time"
        raise InputError(f"--to {target}", expected, f"{what}, which this format cannot hold", NO_ROTATION)


def adapter_of(packed: PackedModel, path: Path | None) -> StoredAdapter | None:
    """Return the adapter that goes with a model; raise InputError if it does not fit."""
    if path is None:
        return None
    check_fits(packed, [path])
    return read_adapter(path, packed.config)


def module_names(source: ModelSource) -> list[str]:
    """Return the names of tables and linear layers; the head only where it has a table of its own."""
    return [*table_names(source.config), *linear_names(source.config)]


def shape_of(weight: Weight) -> tuple[int, int]:
    """Return rows and columns of a matrix."""
    if isinstance(weight, Int4Weight):
        return len(weight.packed), weight.packed.shape[1] * CODES_PER_WORD
    rows, columns = (weight.codes if isinstance(weight, Int8Weight) else weight).shape
    return rows, columns


def codes_of(weight: Int4Weight | Int8Weight) -> np.ndarray:
    """Return a copy of a matrix's codes, int8 (rows, columns)."""
    return unpack_int4(np.asarray(weight.packed)) if isinstance(weight, Int4Weight) else np.array(weight.codes)


def source_name(packed: PackedModel) -> str:
    """Return the name of the float model without its directory."""
    return packed.metadata.source.name.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Grid:
    """The effect of a coarser grid on a model's scales.

    Attributes:
        total: scales of rounded layers.
        off: those that change when they are rounded to the grid.
        subnormal: those that are subnormal there, and exact.
        largest: the largest relative change.
        zeros: groups and channels of zeros, whose scale means nothing and is 1.
    """

    total: int
    off: int
    subnormal: int
    largest: float
    zeros: int


def check_grid(packed: PackedModel, grid: str, may_round: bool, target: str) -> Grid:
    """Check that all scales are exact on a grid, "bf16" or "f16", or may be rounded to it.

    Raises:
        InputError: the first layer with a scale that is not exact, or too far from every value of the grid.
    """
    total = off = subnormal = zeros = 0
    largest = 0.0
    for name in module_names(packed):
        weight = packed.weight(name)
        zeros += _groups_of_zeros(weight)
        if isinstance(weight, np.ndarray) or not _uses_grid(weight, grid):
            continue
        scales = to_f32(np.asarray(weight.scales)).ravel()
        rounded = _rounded(scales, grid)
        changes = np.abs(rounded - scales) / scales
        lost = ~np.isfinite(rounded) | (rounded <= 0) | (changes > _LARGEST_CHANGE)
        if lost.any():
            hint = "try another target: these weights are too small or too large for it"
            raise InputError(f"--to {target}: {name}", f"scales within {grid}", f"{scales[lost][0]:g}", hint)
        is_off = rounded != scales
        if is_off.any() and not may_round:
            hint = "try --round-scales, which says how much it changes"
            raise InputError(f"--to {target}: {name}", f"scales on the grid of {grid}", "others", hint)
        total, off = total + len(scales), off + int(is_off.sum())
        if grid == "f16":
            subnormal += int(((rounded < _SMALLEST_F16) & ~is_off).sum())
        largest = max(largest, float(changes.max()))
    return Grid(total, off, subnormal, largest, zeros)


def _uses_grid(weight: Int4Weight | Int8Weight, grid: str) -> bool:
    """Return whether the grid is for this weight's scales: with "bf16", those of channels stay float32."""
    return grid != "bf16" or isinstance(weight, Int4Weight)


def _groups_of_zeros(weight: Weight) -> int:
    """Count the groups, or channels of int8, that are all zeros."""
    if isinstance(weight, np.ndarray):
        return 0
    if isinstance(weight, Int8Weight):
        return int((~np.any(weight.codes, axis=1)).sum())
    words = np.asarray(weight.packed).view(np.uint32) == _EIGHT_ZEROS
    return int(words.reshape(*np.asarray(weight.scales).shape, -1).all(axis=-1).sum())


class RoundedScales:
    """A packed model with its scales rounded to a grid; satisfies `ModelSource`."""

    def __init__(self, packed: PackedModel, grid: str) -> None:
        self._packed, self._grid = packed, grid
        self.path: Path = packed.path
        self.config: ModelConfig = packed.config

    @property
    def scheme(self) -> QuantScheme | None:
        """See `ModelSource`."""
        return self._packed.scheme

    @property
    def rotations(self) -> Rotations:
        """See `ModelSource`."""
        return self._packed.rotations

    def weight(self, name: str) -> Weight:
        """Return the model's weight on rounded scales."""
        weight = self._packed.weight(name)
        if isinstance(weight, np.ndarray) or not _uses_grid(weight, self._grid):
            return weight
        scales = _rounded(to_f32(np.asarray(weight.scales)), self._grid)
        if isinstance(weight, Int4Weight):
            return Int4Weight(weight.packed, scales, weight.group_size)
        return Int8Weight(weight.codes, scales)

    def vector(self, name: str) -> np.ndarray:
        """See `ModelSource`."""
        return self._packed.vector(name)

    def close(self) -> None:
        """See `ModelSource`."""
        self._packed.close()


def _rounded(scales: np.ndarray, grid: str) -> np.ndarray:
    if grid == "bf16":
        return bf16_to_f32(f32_to_bf16(scales))
    with np.errstate(over="ignore", under="ignore"):
        return scales.astype(np.float16).astype(np.float32)
