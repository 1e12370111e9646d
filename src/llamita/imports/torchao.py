"""Read torchao's `IntxUnpackedToInt8Tensor` in safetensors, as transformers saves 8da4w models.

`weight` becomes three tensors: `_weight_qdata` int8, a byte for each code; `_weight_scale` and `_weight_zero_point`
(rows, groups), zeros. The file's metadata has notes about them under the weight's name.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.imports.coded_files import ModuleFiles, import_files
from llamita.imports.codes import Coded
from llamita.imports.import_codes import Imported
from llamita.models.names import EMBEDDING
from llamita.system.files import parse_json
from llamita.system.progress import Progress

PER_TOKEN = "int8_asym_per_token"  # how activations are rounded, in torchao's words
_TYPE = "IntxUnpackedToInt8Tensor"
_KNOWN = {"_weight_qdata", "_weight_scale", "_weight_zero_point"}
_BITS = {"int4": 4, "int8": 8}


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed model; see `convert.convert`."""
    return import_files(Torchao(source), directory, progress)


class Torchao(ModuleFiles):
    """A checkpoint of torchao; an `import_codes.CodedModel`.

    Raises:
        InputError: another kind of torchao's tensors, zero points, or see `ModuleFiles`.
    """

    format = "torchao"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._dynamic: dict[str, bool] = {}

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`; known once all matrices were read."""
        return None if all(self._dynamic.values()) else "float activations"

    def coded(self, name: str) -> Coded:
        """See `ModuleFiles`."""
        self.parts(name, _KNOWN)
        notes = self._notes(name)
        bits = _BITS.get(str(notes.get("target_dtype", {}).get("_data")))
        how = notes.get("activation_quantization")
        if bits is None or how not in (None, PER_TOKEN):
            raise InputError(name, f"int4 or int8 codes, activations {PER_TOKEN}", shown(notes, 120))
        if name != EMBEDDING:  # no activation is multiplied by it
            self._dynamic[name] = how is not None
        codes = self.part(name, "_weight_qdata", ("I8",))
        scales = self.scales(name, "_weight_scale")
        zeros = self.part(name, "_weight_zero_point", ("I8", "I32", "F32"))
        if zeros.size != scales.size or np.any(zeros):
            raise InputError(name, "a zero point of 0 for each scale", "others")
        if codes.ndim != 2 or notes.get("block_size") != [1, codes.shape[1] // scales.shape[1]]:
            raise InputError(f"{name}: block_size", "[1, inputs of a scale]", shown(notes.get("block_size")))
        return Coded(codes, scales, bits)

    def _notes(self, name: str) -> dict[str, Any]:
        """Return the file's notes about a weight."""
        text = self.metadata(f"{name}.weight")
        found = parse_json(text.encode(errors="replace"), f"{name}: torchao's notes") if isinstance(text, str) else {}
        notes = found.get("_data")
        if found.get("_type") != _TYPE or not isinstance(notes, dict):
            raise InputError(name, f"torchao's {_TYPE}", shown(found.get("_type"), 60))
        if not isinstance(notes.get("target_dtype"), dict):
            raise InputError(f"{name}: target_dtype", "a type's name")
        return notes
