"""Read GPTQ's checkpoints (AutoGPTQ, GPTQModel) with symmetric int4 weights and inputs in their own order.

`qweight` int32 (inputs / 8, outputs) has eight inputs in a word, lowest bits first, as code + 8. `scales` is (groups,
outputs). `qzeros` (groups, outputs / 8) has the zero point, 8, from which format 1 subtracts one. `g_idx` (inputs,) has
the group of each input.
"""

from pathlib import Path

import numpy as np

from llamita.errors import InputError, shown
from llamita.imports.coded_files import ModuleFiles, import_files
from llamita.imports.codes import Coded
from llamita.imports.import_codes import Imported
from llamita.models.weights import FLOAT_DTYPES
from llamita.numerics.affine import to_f32
from llamita.numerics.packing import CODES_PER_WORD, unpack_int4
from llamita.system.progress import Progress

_WHERE = "config.json: quantization_config"
_KNOWN = {"qweight", "qzeros", "scales", "g_idx", "bias"}
_STORED_ZERO = {"gptq": 7, "gptq_v2": 8}  # by checkpoint_format
_UNORDERED = "try a checkpoint without desc_act (--no-act-order), or the float model"


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed model; see `convert.convert`."""
    return import_files(Gptq(source), directory, progress)


class Gptq(ModuleFiles):
    """A checkpoint of GPTQ; an `import_codes.CodedModel`.

    Raises:
        InputError: other bits, asymmetric weights, reordered inputs, or see `ModuleFiles`.
    """

    format = "GPTQ"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self.quantization
        for key, expected in (("bits", 4), ("sym", True)):
            if settings.get(key) != expected:
                raise InputError(f"{_WHERE}: {key}", f"{expected}", shown(settings.get(key), 40), "try the float model")
        found = settings.get("checkpoint_format", "gptq")
        if not isinstance(found, str) or found not in _STORED_ZERO:
            raise InputError(f"{_WHERE}: checkpoint_format", " or ".join(_STORED_ZERO), shown(found, 40))
        self._zero = _STORED_ZERO[found]

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        return "float activations"

    def coded(self, name: str) -> Coded:
        """See `ModuleFiles`."""
        parts = self.parts(name, _KNOWN)
        if "bias" in parts and np.any(self.part(name, "bias", FLOAT_DTYPES)):  # some tools write zeros
            raise InputError(f"{name}.bias", "none by config.json", "one that is not zero")
        words, scales = self.part(name, "qweight", ("I32",)), to_f32(self.part(name, "scales", FLOAT_DTYPES))
        if words.ndim != 2 or scales.ndim != 2 or not len(scales):
            raise InputError(name, "matrices", f"qweight {words.shape} and scales {scales.shape}")
        columns, groups = len(words) * CODES_PER_WORD, len(scales)
        if columns % groups:
            raise InputError(name, f"groups of one size among {columns} inputs", f"{groups}")
        if "g_idx" not in parts and self.quantization.get("desc_act"):
            raise InputError(f"{name}.g_idx", "one, as desc_act is set", "none", _UNORDERED)
        if "g_idx" in parts:
            order = self.part(name, "g_idx", ("I32", "I64"))
            if not np.array_equal(order, np.arange(columns) // (columns // groups)):
                raise InputError(f"{name}.g_idx", "inputs in their own order", "them by activation", _UNORDERED)
        zeros = self.part(name, "qzeros", ("I32",))
        held = (groups, words.shape[1] // CODES_PER_WORD)
        if zeros.shape != held or np.any(unpack_int4(zeros) + 8 != self._zero):
            raise InputError(f"{name}.qzeros", "the zero point of symmetric weights throughout", "others")
        return Coded(unpack_int4(np.ascontiguousarray(words.T)), np.ascontiguousarray(scales.T), 4)
