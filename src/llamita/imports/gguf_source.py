"""Read a GGUF's weights as a float model, multiplied out as they are read; nothing is written."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.gguf_blocks import floats_of
from llamita.formats.gguf_parts import GgufModel
from llamita.formats.safetensors import TensorInfo
from llamita.imports.detect import LINK
from llamita.imports.gguf_config import ROPE_TENSORS, architecture_of, check_rope, hf_config
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.families import plain_config
from llamita.models.foreign_names import GGUF_IN_PAIRS, gguf_name, heads_of, pair_order
from llamita.models.layout import layout_of
from llamita.models.names import expected_tensors, linear_names
from llamita.models.weights import STORED, rows_at_once
from llamita.numerics.rotations import Rotations
from llamita.system.files import read_json


class GgufTensors:
    """The tensors of a GGUF by llamita's names, in float.

    Attributes:
        values: config.json of the model as the file describes it.
        hf_config, config: of the same model as llamita runs it; see `families.plain_config`.
        layout: see `models/layout.py`.
        shapes: of the architecture's tensors, by name.

    Raises:
        InputError: the file's tensors are not those of its architecture, or its values are impossible.
    """

    def __init__(self, file: GgufModel) -> None:
        self.file, self.values = file, hf_config(file)
        self.hf_config = plain_config(self.values)
        self.config = ModelConfig.from_hf(self.hf_config)
        self.layout = layout_of(self.values, ())
        self._in_pairs = architecture_of(file) in GGUF_IN_PAIRS
        self.shapes = expected_tensors(self.config)
        check_rope(file, self.config)
        self._check()

    def stored_kind(self, tensor: str) -> str:
        """Return the type of the blocks that a tensor is read from."""
        return self.file.tensors[gguf_name(self.layout.piece(tensor).stored)].kind

    def linear_kinds(self) -> set[str]:
        """Return the types of all linear layers."""
        return {self.stored_kind(f"{name}.weight") for name in linear_names(self.config)}

    def kind(self, tensor: str) -> str:
        """Return the float type in which `read` gives a tensor: as it is stored, or "F32" for all else."""
        stored = self.stored_kind(tensor)
        return stored if stored in STORED and self.layout.piece(tensor).factor == 1.0 else "F32"

    def moved_heads(self, tensor: str) -> int | None:
        """Return the heads of a tensor whose rows are in another order in the file, None for the rest."""
        return heads_of(tensor.rpartition(".")[0], self.config) if self._in_pairs else None

    def is_mapped(self, tensor: str) -> bool:
        """Return whether `read` gives a tensor in place, so that it takes no memory beside the file's."""
        is_as_stored = self.layout.piece(tensor).factor == 1.0 and self.stored_kind(tensor) in STORED
        return is_as_stored and self.moved_heads(tensor) is None

    def ordered(self, tensor: str, rows: np.ndarray) -> np.ndarray:
        """Return the rows of a tensor, values or bytes, in transformers' order."""
        heads = self.moved_heads(tensor)
        return rows if heads is None else rows[np.argsort(pair_order(len(rows), heads))]

    def read(self, tensor: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return a tensor of the architecture: BF16 as bits, its rows in transformers' order.

        Args:
            first, last: rows of a matrix to return, of one whose order is the file's.
        """
        piece, stored = self.layout.piece(tensor), self.stored_kind(tensor)
        data = self.file.read(gguf_name(piece.stored))
        data = (data if piece.rows is None else data[slice(*piece.rows)])[first:last]
        shape = (-1, *self.shapes[tensor][1:])
        as_stored = stored in STORED and piece.factor == 1.0
        values = data.view(STORED[stored]).reshape(shape) if as_stored else floats_of(stored, data).reshape(shape)
        return self.ordered(tensor, piece.scaled(values))

    def _check(self) -> None:
        """Check that the file has the architecture's tensors, and nothing else."""
        name, known = self.file.path.name, set[str](ROPE_TENSORS)
        for tensor, shape in self.shapes.items():
            piece = self.layout.piece(tensor)
            stored = gguf_name(piece.stored)
            found = self.file.tensors.get(stored)
            if found is None or piece.shape(found.shape) != shape:
                got = "none" if found is None else f"{found.shape}"
                raise InputError(f"{name}: {stored}", f"{shape}", got)
            if len(shape) == 1 and found.kind not in STORED:
                raise InputError(f"{name}: {stored}", "floats", found.kind)
            known.add(stored)
        for stored in self.file.tensors:
            if stored not in known:
                raise InputError(f"{name}: {shown(stored)}", "a Llama's tensors alone")


class GgufCheckpoint(Checkpoint):
    """A GGUF as a float model: weights from the file, the rest from a directory that `gguf.link` made.

    Raises:
        InputError: the file is no longer there, or see `GgufTensors`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.scheme, self.rotations = path, None, Rotations()
        place = read_json(path, LINK).get("gguf")
        if not isinstance(place, str) or not Path(place).is_file():
            raise InputError(f"{path}: {LINK}", "the GGUF that this was made from", shown(place), "try the GGUF itself")
        self.gguf = GgufModel(Path(place))
        self._tensors = GgufTensors(self.gguf)
        self.hf_config, self.config = self._tensors.hf_config, self._tensors.config
        self.files = {file.path.name: file for file in self.gguf.files}

    def info(self, tensor: str) -> TensorInfo:
        """Return dtype and shape of a tensor as `weight` and `vector` give it."""
        return TensorInfo(self._tensors.kind(tensor), self._tensors.shapes[tensor], 0, 0)

    def remark(self) -> str | None:
        """Say that the weights were rounded before, None if they are a float model's."""
        rounded = sorted(self._tensors.linear_kinds() - {*STORED, "F64", "Q8_0"})
        if not rounded:
            return None
        return (
            f"the source is rounded already ({', '.join(rounded)}): rounding adds to its loss; try a BF16 or Q8_0 one"
        )

    def stored_bytes(self) -> int:
        """Return the bytes that the tensors take in the file."""
        return sum(tensor.stop - tensor.start for tensor in self.gguf.tensors.values())

    def _is_mapped(self, tensor: str) -> bool:
        return self._tensors.is_mapped(tensor)

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a matrix in pieces of rows, multiplied out one by one; those of queries and keys at once."""
        tensor = f"{name}.weight"
        rows, columns = self._tensors.shapes[tensor]
        step = rows if self._tensors.moved_heads(tensor) else rows_at_once(columns)
        for first in range(0, rows, step):
            yield first, self._tensors.read(tensor, first, first + step)

    def _read(self, tensor: str) -> np.ndarray:
        return self._tensors.read(tensor)
