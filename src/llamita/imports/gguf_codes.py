"""The codes of a GGUF file by our names: Q4_0 and Q8_0, whose blocks of 32 have a scale in float16 each."""

from typing import Any

import numpy as np

from llamita.formats.gguf import GgufFile
from llamita.formats.gguf_blocks import codes_of
from llamita.imports.codes import Coded, with_positive_scales
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import gguf_name, hf_order
from llamita.models.names import linear_names
from llamita.numerics.rotations import Rotations

STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # floats, BF16 as bits
_BITS = {"Q4_0": 4, "Q8_0": 8}


class GgufCodes:
    """A file whose tensors were found to be a Llama's; satisfies `takeover.CodedModel`."""

    form = "GGUF"

    def __init__(self, file: GgufFile, hf_config: dict[str, Any]) -> None:
        self._file, self.path, self.files = file, file.path, [file.path]
        self.hf_config, self.config = hf_config, ModelConfig.from_hf(hf_config)
        self.rotations, self.rotated = Rotations(), ()

    def is_int4(self) -> bool:
        """Whether linear layers are in Q4_0."""
        return any(self._kind(name) == "Q4_0" for name in linear_names(self.config))

    def can_be_kept(self) -> bool:
        """Whether there is int4, and all of it has scales that can be made positive."""
        named = [name for name in linear_names(self.config) if self._kind(name) == "Q4_0"]
        return bool(named) and all(self._is_positive(name) for name in named)

    def _is_positive(self, name: str) -> bool:
        matrix = self.matrix(name)
        return isinstance(matrix, Coded) and with_positive_scales(name, matrix)[0] is not None

    def _kind(self, name: str) -> str:
        return self._file.tensors[gguf_name(f"{name}.weight")].kind

    def activations(self) -> str | None:
        """See `takeover.CodedModel`."""
        return "int8 activations in blocks of 32"

    def matrix(self, name: str) -> Coded | np.ndarray:
        """See `takeover.CodedModel`."""
        kind, data = self._kind(name), self._file.read(gguf_name(f"{name}.weight"))
        order = hf_order(f"{name}.weight", self.config)
        data = data if order is None else data[order]
        if kind in STORED:
            return data.view(STORED[kind])
        codes, scales = codes_of(kind, data)
        return Coded(codes, scales, _BITS[kind])

    def vector(self, name: str) -> np.ndarray:
        """See `takeover.CodedModel`."""
        info = self._file.tensors[gguf_name(name)]
        values = self._file.read(gguf_name(name)).view(STORED[info.kind]).reshape(info.shape)
        order = hf_order(name, self.config)
        return values if order is None else values[order]
