"""GPTQ's checkpoints (AutoGPTQ, GPTQModel) with symmetric int4 weights and inputs in their own order.

`qweight` int32 (inputs / 8, outputs) has eight inputs to a word, lowest bits first, as code + 8; `scales`
(groups, outputs); `qzeros` (groups, outputs / 8) the zero point, 8, which format 1 stores less one; `g_idx`
(inputs,) the group of each input.
"""

from pathlib import Path

import numpy as np

from llamita.errors import InputError, shown
from llamita.imports.coded_files import ModuleFiles, take_over_modules
from llamita.imports.codes import Coded
from llamita.imports.take_over import Imported
from llamita.models.weights import FLOAT_DTYPES
from llamita.numerics.affine import to_f32
from llamita.numerics.packing import CODES_PER_WORD, unpack_int4
from llamita.system.progress import Progress

_KNOWN = {"qweight", "qzeros", "scales", "g_idx", "bias"}
_STORED_ZERO = {"gptq": 7, "gptq_v2": 8}  # by checkpoint_format
_ACT_ORDER = "without desc_act (--no-act-order), or the float model"


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed directory; see `forms.convert`."""
    return take_over_modules(Gptq(source), directory, progress)


class Gptq(ModuleFiles):
    """Such a checkpoint; satisfies `takeover.CodedModel`.

    Raises:
        InputError: other bits, asymmetric weights, another order of inputs, or see `ModuleFiles`.
    """

    form = "GPTQ"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self.quantization
        for key, expected in (("bits", 4), ("sym", True)):
            if settings.get(key) != expected:
                raise InputError(
                    f"config.json: quantization_config: {key}",
                    f"{expected}",
                    shown(settings.get(key), 40),
                    "try the float model",
                )
        found = settings.get("checkpoint_format", "gptq")
        if not isinstance(found, str) or found not in _STORED_ZERO:
            raise InputError(
                "config.json: quantization_config: checkpoint_format", f"{' or '.join(_STORED_ZERO)}", shown(found, 40)
            )
        self._zero = _STORED_ZERO[found]

    def activations(self) -> str | None:
        """See `takeover.CodedModel`."""
        return "float activations"

    def coded(self, name: str) -> Coded:
        """See `takeover.CodedModel`."""
        parts = self.parts(name, _KNOWN)
        if "bias" in parts and np.any(self.part(name, "bias", FLOAT_DTYPES)):  # some tools write zeros
            raise InputError(f"{name}.bias", "none by config.json", "one that is not zero")
        words, scales = self.part(name, "qweight", ("I32",)), to_f32(self.part(name, "scales", FLOAT_DTYPES))
        if words.ndim != 2 or scales.ndim != 2 or not len(scales):
            raise InputError(f"{name}", "matrices", f"qweight {words.shape} and scales {scales.shape}")
        columns, groups = len(words) * CODES_PER_WORD, len(scales)
        if columns % groups:
            raise InputError(f"{name}", f"groups of one size among {columns} inputs", f"{groups}")
        if "g_idx" not in parts and self.quantization.get("desc_act"):
            raise InputError(f"{name}.g_idx", "beside desc_act", "none", f"try one {_ACT_ORDER}")
        if "g_idx" in parts:
            order = self.part(name, "g_idx", ("I32", "I64"))
            if not np.array_equal(order, np.arange(columns) // (columns // groups)):
                raise InputError(
                    f"{name}.g_idx", "inputs in their own order", "them by activation", f"try a checkpoint {_ACT_ORDER}"
                )
        zeros = self.part(name, "qzeros", ("I32",))
        held = (groups, words.shape[1] // CODES_PER_WORD)
        if zeros.shape != held or np.any(unpack_int4(zeros) + 8 != self._zero):
            raise InputError(f"{name}.qzeros", "the zero point of symmetric weights throughout", "others")
        return Coded(unpack_int4(np.ascontiguousarray(words.T)), np.ascontiguousarray(scales.T), 4)
