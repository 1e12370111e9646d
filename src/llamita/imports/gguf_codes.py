"""Read the codes of a GGUF file by llamita's names: Q4_0 and Q8_0, whose blocks of 32 each have a float16 scale."""

import numpy as np

from llamita.formats.gguf_blocks import codes_of
from llamita.formats.gguf_parts import parts_of
from llamita.imports.codes import Coded
from llamita.imports.gguf_source import GgufTensors
from llamita.models.foreign_names import gguf_name
from llamita.numerics.rotations import Rotations

_BITS = {"Q4_0": 4, "Q8_0": 8}


class GgufCodes:
    """A file whose tensors were checked; an `import_codes.CodedModel`."""

    format = "GGUF"

    def __init__(self, tensors: GgufTensors) -> None:
        self._tensors = tensors
        self.path, self.files = tensors.file.path, parts_of(tensors.file.path)
        self.hf_config, self.config = tensors.hf_config, tensors.config
        self.rotations, self.rotated = Rotations(), ()

    def is_int4(self) -> bool:
        """Return whether a linear layer is in Q4_0, and its codes mean the same here as there."""
        return not self._tensors.layout.pieces and "Q4_0" in self._tensors.linear_kinds()

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        return "int8 activations in blocks of 32"

    def matrix(self, name: str) -> Coded | np.ndarray:
        """See `import_codes.CodedModel`; other codes than those of Q4_0 and Q8_0 are multiplied out."""
        tensor = f"{name}.weight"
        kind = self._tensors.stored_kind(tensor)
        if kind not in _BITS:
            return self._tensors.read(tensor)
        codes, scales = codes_of(kind, self._tensors.ordered(tensor, self._tensors.file.read(gguf_name(tensor))))
        return Coded(codes, scales, _BITS[kind])

    def vector(self, name: str) -> np.ndarray:
        """See `import_codes.CodedModel`."""
        return self._tensors.read(name)
