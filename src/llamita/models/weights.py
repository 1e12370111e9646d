"""Define the types of weights, and the sources that give them to methods and engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamita.errors import InputError
from llamita.formats.safetensors import DTYPES, TensorInfo
from llamita.models.config import ModelConfig
from llamita.models.names import name_in_block
from llamita.numerics.affine import F32, dequantize, f32_to_bf16, to_f32
from llamita.numerics.packing import unpack_int4
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme

FLOAT_DTYPES = ("BF16", "F16", "F32")
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # their NumPy types in files, BF16 as bits
_CHUNK = 2**22  # weights converted at a time: 16 MB as float32
_FINITE_CHUNK = 2**22  # values tested at a time
_ROWS = 1024  # rows of a matrix in float at a time


@dataclass(frozen=True)
class Int4Weight:
    """Hold a linear layer in int4: `packed` int32 (rows, columns/8), `scales` (rows, columns/group_size)."""

    packed: np.ndarray
    scales: np.ndarray  # float32, or uint16 holding bf16
    group_size: int


@dataclass(frozen=True)
class Int8Weight:
    """Hold a table in int8 per channel: `codes` int8 (rows, columns), `scales` float32 or bf16 bits (rows,)."""

    codes: np.ndarray
    scales: np.ndarray


class ModelSource(Protocol):
    """Give the engine a model's weights; module names are those of Hugging Face, without `.weight`."""

    path: Path
    config: ModelConfig

    @property
    def scheme(self) -> QuantScheme | None:
        """Return how the weights are rounded, None for a float model."""
        ...

    @property
    def rotations(self) -> Rotations:
        """Return the rotations in the weights, with those that the engine has to do."""
        ...

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        """Return a linear layer or table; float ones as (rows, columns) float32, float16 or bf16 bits."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias, float32 (length,); the name ends in `.weight` or `.bias`."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


Weight = Int4Weight | Int8Weight | np.ndarray


class WeightFile(Protocol):
    """A file of weights, mapped: a `TensorFile` or a `GgufFile`."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Return the stored tensors by name, each with shape, start and stop."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as it is stored, mapped."""
        ...

    def forget(self) -> None:
        """Let the system drop the pages that were read."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class FloatSource(Protocol):
    """Give methods the weights of a float model: a `Checkpoint`, or a `TransformedSource` over one."""

    path: Path
    config: ModelConfig
    hf_config: dict[str, Any]

    @property
    def files(self) -> Mapping[str, WeightFile]:
        """Return the files of weights by name."""
        ...

    @property
    def rotations(self) -> Rotations:
        """Return how the weights are rotated; a checkpoint's are not."""
        ...

    def info(self, tensor: str) -> TensorInfo:
        """Return dtype and shape in which a tensor that stays float is stored."""
        ...

    def weight(self, name: str) -> np.ndarray:
        """Return a matrix (rows, columns), float32, float16 or bf16 bits."""
        ...

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a matrix as `weight` gives it, in pieces of rows, each with the number of its first row."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias, float32 (length,)."""
        ...

    def stored_vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias (length,) as it is stored; check that it is finite."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


def places_of(source: FloatSource) -> list[Path]:
    """Return the model's directory and its files of weights, which may be elsewhere."""
    return [source.path, *(file.path for file in source.files.values())]


def pieces_of(weights: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a matrix in pieces of rows that are small in float32, each with the number of its first row."""
    step = rows_at_once(weights.shape[1])
    for start in range(0, len(weights), step):
        yield start, weights[start : start + step]


def rows_at_once(columns: int) -> int:
    """Return how many rows of a matrix are converted to float32 at a time."""
    return max(1, _CHUNK // columns)


def bias_of(source: ModelSource | FloatSource, name: str) -> np.ndarray | None:
    """Return a linear layer's bias, float32 (rows,), or None where the architecture has none."""
    return source.vector(f"{name}.bias") if source.config.has_bias(name_in_block(name)) else None


def row_blocks(weight: Weight) -> Iterator[F32]:
    """Yield a matrix in float32, some rows at a time."""
    if isinstance(weight, Int4Weight):
        for start in range(0, len(weight.packed), _ROWS):
            rows = slice(start, start + _ROWS)
            yield dequantize(unpack_int4(weight.packed[rows]), weight.scales[rows])
    elif isinstance(weight, Int8Weight):
        for start in range(0, len(weight.codes), _ROWS):
            rows = slice(start, start + _ROWS)
            yield dequantize(weight.codes[rows], weight.scales[rows])
    else:
        for start in range(0, len(weight), _ROWS):
            yield to_f32(weight[start : start + _ROWS])


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values in the float type of a stored tensor ("BF16", "F16" or "F32"), rounded if needed."""
    if stored_dtype(values) == dtype:
        return values
    floats = to_f32(values)
    return f32_to_bf16(floats) if dtype == "BF16" else floats.astype(DTYPES[dtype])


def check_finite(name: str, array: np.ndarray, first_row: int = 0) -> None:
    """Raise InputError at the first NaN or infinity, with its place; `first_row` is added to its row."""
    rows = array.reshape(len(array), -1)
    step = max(1, _FINITE_CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        bad = _not_finite(rows[start : start + step])
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            place = f"row {first_row + start + row}, column {column}"
            raise InputError(name, "finite weights", f"NaN or infinity at {place}", "the checkpoint is damaged")


def _not_finite(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        return (array & np.uint16(0x7F80)) == 0x7F80  # bf16: all exponent bits set
    return ~np.isfinite(array)


def transform_dtype(rotations: Rotations) -> str | None:
    """Return the safetensors name of the dtype of the head's transform, or None without one."""
    transform = rotations.head_transform
    return None if transform is None else stored_dtype(transform)


def stored_dtype(array: np.ndarray) -> str:
    """Return the safetensors name of an array's dtype; uint16 means bf16."""
    return next(name for name in ("BF16", *DTYPES) if np.dtype(DTYPES[name]) == array.dtype)
