"""Change the weights of a float model as they are read, so that transforms stack without a second checkpoint.

A change of a module acts on its inputs, its outputs or both, in float64; the result is rounded once, to float32.
Together the changes of a transform keep the model's function (`methods/equalize.py`, `spinquant.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from llamita.formats.safetensors import TensorInfo
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.weights import FloatSource, pieces_of
from llamita.numerics.affine import F32, to_f32
from llamita.numerics.rotations import Rotations

F64 = npt.NDArray[np.float64]
Change = Callable[[F64], F64]  # maps vectors along the last axis
_PIECE = 2**21  # weights in float64 at a time if rows change one by one: 16 MB


@dataclass(frozen=True)
class ModuleChange:
    """Change a module's weights W (outputs, inputs) and bias (outputs,).

    Attributes:
        inputs: applied one after the other to every row of W.
        outputs: applied one after the other to every column of W, and to the bias.
    """

    inputs: tuple[Change, ...] = ()
    outputs: tuple[Change, ...] = ()


class TransformedSource:
    """Read `source` with some modules changed; satisfies `FloatSource` and `ModelSource`.

    Args:
        changes: module name to change; other modules stay the same.
        ones: full names of norm weights that are now 1.
        rotations: of the result, including those of `source`.
        untie: give the head a separate table, which starts as a copy of the embedding.
    """

    def __init__(
        self,
        source: FloatSource,
        changes: Mapping[str, ModuleChange],
        *,
        ones: Set[str] = frozenset(),
        rotations: Rotations | None = None,
        untie: bool = False,
    ) -> None:
        self.path, self.files, self.scheme = source.path, source.files, None
        self.config, self.hf_config = source.config, source.hf_config
        self._untied = untie and source.config.tied
        if self._untied:
            self.config = replace(source.config, tied=False)
            self.hf_config = {**source.hf_config, "tie_word_embeddings": False}
        self.rotations = source.rotations if rotations is None else rotations
        self._source, self._changes, self._ones = source, changes, ones

    def info(self, tensor: str) -> TensorInfo:
        """Return dtype and shape in which a tensor that stays float is stored.

        Tables keep their dtype, to which the writer rounds them: float32 could double them. Biases become float32.
        """
        info = self._source.info(self._stored_name(tensor))
        name, _, kind = tensor.rpartition(".")
        return replace(info, dtype="F32") if kind == "bias" and name in self._changes else info

    def weight(self, name: str) -> np.ndarray:
        """Return a matrix (rows, columns): float32 if it is changed, else the source's."""
        stored = self._source.weight(self._stored_name(f"{name}.weight").removesuffix(".weight"))
        change = self._changes.get(name)
        if change is None:
            return stored
        if change.outputs:
            rotated = _apply(change.outputs, _apply(change.inputs, _to_f64(stored)).T).T
            return rotated.astype(np.float32, order="C")
        changed = np.empty(stored.shape, np.float32)
        step = max(1, _PIECE // stored.shape[1])
        for start in range(0, len(stored), step):
            rows = slice(start, start + step)
            changed[rows] = _apply(change.inputs, _to_f64(stored[rows]))
        return changed

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a matrix as `weight` gives it, in pieces of rows, each with the number of its first row."""
        return pieces_of(self.weight(name))

    def vector(self, name: str) -> F32:
        """Return a norm's weight or a bias, float32 (length,)."""
        return to_f32(self.stored_vector(name))

    def stored_vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias (length,) in the dtype of `info`."""
        stored = self._source.stored_vector(name)
        if name in self._ones:
            # 1.0 as bf16 bits in uint16, or in a float type.
            return np.full_like(stored, 0x3F80 if stored.dtype == np.uint16 else 1)
        module, _, kind = name.rpartition(".")
        change = self._changes.get(module)
        if kind != "bias" or change is None:
            return stored
        return _apply(change.outputs, _to_f64(stored)).astype(np.float32)

    def close(self) -> None:
        """Unmap the files."""
        self._source.close()

    def _stored_name(self, tensor: str) -> str:
        return f"{EMBEDDING}.weight" if self._untied and tensor == f"{HEAD}.weight" else tensor


def _to_f64(array: np.ndarray) -> F64:
    return to_f32(array).astype(np.float64)


def _apply(changes: tuple[Change, ...], x: F64) -> F64:
    for change in changes:
        x = change(x)
    return x
