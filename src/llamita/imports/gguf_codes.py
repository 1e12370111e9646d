"""Read the codes of a GGUF file by llamita's names: Q4_0 and Q8_0, whose blocks of 32 each have a float16 scale."""

from typing import Any

import numpy as np

from llamita.formats.gguf_blocks import codes_of, floats_of
from llamita.formats.gguf_parts import GgufModel, parts_of
from llamita.imports.codes import Coded
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import gguf_name, hf_order
from llamita.models.names import linear_names
from llamita.numerics.rotations import Rotations

STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # floats, BF16 as bits
_BITS = {"Q4_0": 4, "Q8_0": 8}


class GgufCodes:
    """A file whose tensors were checked to be a Llama's; an `import_codes.CodedModel`."""

    format = "GGUF"

    def __init__(self, file: GgufModel, hf_config: dict[str, Any]) -> None:
        self._file, self.path, self.files = file, file.path, parts_of(file.path)
        self.hf_config, self.config = hf_config, ModelConfig.from_hf(hf_config)
        self.rotations, self.rotated = Rotations(), ()

    def is_int4(self) -> bool:
        """Return whether a linear layer is in Q4_0."""
        return any(self._kind(name) == "Q4_0" for name in linear_names(self.config))

    def _kind(self, name: str) -> str:
        return self._file.tensors[gguf_name(f"{name}.weight")].kind

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        return "int8 activations in blocks of 32"

    def matrix(self, name: str) -> Coded | np.ndarray:
        """See `import_codes.CodedModel`; other codes than those of Q4_0 and Q8_0 are multiplied out."""
        kind, data = self._kind(name), self._file.read(gguf_name(f"{name}.weight"))
        order = hf_order(f"{name}.weight", self.config)
        data = data if order is None else data[order]
        if kind in STORED:
            return data.view(STORED[kind])
        if kind not in _BITS:
            return floats_of(kind, data)
        codes, scales = codes_of(kind, data)
        return Coded(codes, scales, _BITS[kind])

    def vector(self, name: str) -> np.ndarray:
        """See `import_codes.CodedModel`."""
        info = self._file.tensors[gguf_name(name)]
        values = self._file.read(gguf_name(name)).view(STORED[info.kind]).reshape(info.shape)
        order = hf_order(name, self.config)
        return values if order is None else values[order]
