"""Read a packed model as a float one: its codes times their scales, in float32."""

from collections.abc import Iterator

import numpy as np

from llamita.formats.safetensors import TensorInfo
from llamita.models.names import linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.weights import FLOAT_DTYPES, pieces_of, row_blocks


class DequantizedSource:
    """Dequantize a packed model as it is read; satisfies `FloatSource` and `ModelSource`."""

    def __init__(self, packed: PackedModel) -> None:
        self.path, self.config, self.hf_config = packed.path, packed.config, packed.hf_config
        self.files, self.rotations, self.scheme = packed.files, packed.rotations, None
        self._packed = packed
        self._shapes = table_names(packed.config) | linear_names(packed.config)

    def info(self, tensor: str) -> TensorInfo:
        """Return dtype and shape of a tensor that is stored in float; BF16 for the others."""
        found = next((file.tensors[tensor] for file in self.files.values() if tensor in file.tensors), None)
        if found is not None and found.dtype in FLOAT_DTYPES:
            return found
        return TensorInfo("BF16", self._shapes[tensor.removesuffix(".weight")], 0, 0)

    def weight(self, name: str) -> np.ndarray:
        """Return a matrix (rows, columns): dequantized in float32, or float as it is stored."""
        weight = self._packed.weight(name)
        if isinstance(weight, np.ndarray):
            return weight
        values, done = np.empty(self._shapes[name], np.float32), 0
        for part in row_blocks(weight):
            values[done : done + len(part)] = part
            done += len(part)
        return values

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a matrix in pieces of rows, each with the number of its first row."""
        return pieces_of(self.weight(name))

    def vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias, float32 (length,)."""
        return self._packed.vector(name)

    def stored_vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias (length,) as it is stored; check that it is finite."""
        self._packed.vector(name)  # checks it
        return next(file.read(name) for file in self.files.values() if name in file.tensors)

    def close(self) -> None:
        """Unmap the files."""
        self._packed.close()
