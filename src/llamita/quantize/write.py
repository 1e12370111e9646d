"""Write the weight files of a packed model, module by module and in pieces of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamita import _native
from llamita.methods.rtn import RoundedRows, RoundModule
from llamita.models.names import TRANSFORM
from llamita.models.packed import layout, tensor_bytes
from llamita.models.packed_writer import PackedWriter, plan_shards
from llamita.models.weights import FloatSource, as_stored, check_finite, transform_dtype
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.rounded import stored_scales
from llamita.system.files import FileTable
from llamita.system.progress import Progress

_ROWS = 1024  # rows of a float table copied at a time


class ModuleError(NamedTuple):
    """The rounding error of a module: Σ(w - ŵ)², Σw², and the number of weights."""

    squared: float
    energy: float
    weights: int

    @property
    def relative(self) -> float:
        """Σ(w - ŵ)² / Σw²; 0 for a module of zeros."""
        return self.squared / self.energy if self.energy else 0.0


def write_weights(
    directory: Path, source: FloatSource, rotations: Rotations, scheme: QuantScheme, round_module: RoundModule,
    shard_bytes: int, progress: Progress,
) -> tuple[FileTable, dict[str, ModuleError]]:  # fmt: skip
    """Write the weight files, and return their table and the error of each rounded module.

    Args:
        rotations: those of the source as they are stored.
    """
    transform = rotations.head_transform
    modules = layout(source.config, scheme, lambda name: source.info(name).dtype, transform_dtype(rotations))
    writer = PackedWriter(directory, plan_shards(modules, shard_bytes))
    errors: dict[str, ModuleError] = {}
    total, done = sum(tensor_bytes(tensors) for tensors in modules.values()), 0
    try:
        for name, tensors in modules.items():
            if progress:
                progress(name, done, total)
            if f"{name}.weight_scale" in tensors:
                errors[name] = _write_rounded(writer, name, scheme, round_module(name))
            elif name == TRANSFORM and transform is not None:
                writer.put(name, transform)
            elif name in tensors:
                writer.put(name, source.stored_vector(name))
            else:
                dtype = source.info(f"{name}.weight").dtype
                _write_float(writer, name, as_stored(source.weight(name), dtype))
            done += tensor_bytes(tensors)
        writer.finish()
    finally:
        writer.abandon()
    return writer.files, errors


def _write_rounded(writer: PackedWriter, name: str, scheme: QuantScheme, pieces: Iterator[RoundedRows]) -> ModuleError:
    squared, energy, weights = 0.0, 0.0, 0
    for piece in pieces:
        scales = stored_scales(piece.scales, scheme)
        if scheme.kind(name).bits == 4:
            writer.put(f"{name}.weight_packed", _native.codes_to_packed(piece.codes))
        else:
            writer.put(f"{name}.weight", piece.codes)
        writer.put(f"{name}.weight_scale", scales)
        squared, energy, weights = squared + piece.squared_error, energy + piece.energy, weights + piece.codes.size
    return ModuleError(squared, energy, weights)


def _write_float(writer: PackedWriter, name: str, table: np.ndarray) -> None:
    for start in range(0, len(table), _ROWS):
        piece = table[start : start + _ROWS]
        check_finite(f"{name}.weight", piece, start)
        writer.put(f"{name}.weight", piece)
