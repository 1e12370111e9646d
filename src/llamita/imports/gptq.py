"""Read GPTQ's and AWQ's checkpoints (AutoGPTQ, GPTQModel, AutoAWQ) with int4 weights.

GPTQ: `qweight` int32 (inputs / 8, outputs) has eight inputs in a word, lowest bits first. `scales` is (groups,
outputs), `qzeros` (groups, outputs / 8) has the zero points, from which format 1 subtracts one. `g_idx` (inputs,) has
the group of each input. AWQ: `qweight` (inputs, outputs / 8) and `qzeros` have eight outputs in a word, in the order of
`_AWQ_ORDER`. A weight is scale · (code - zero point). Codes are kept where all zero points are 8 and inputs are in
their own order; others are multiplied out.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamita.errors import InputError, shown
from llamita.imports.coded_files import ModuleFiles, import_files
from llamita.imports.codes import Coded
from llamita.imports.detect import AWQ
from llamita.imports.import_codes import CodesLostError, Imported
from llamita.models.weights import FLOAT_DTYPES
from llamita.numerics.affine import to_f32
from llamita.numerics.packing import CODES_PER_WORD, OFFSET, unpack_int4
from llamita.system.progress import Progress

_WHERE = "config.json: quantization_config"
_KNOWN = {"qweight", "qzeros", "scales", "g_idx", "bias"}
_ZERO_ADDED = {"gptq": 1, "gptq_v2": 0}  # by checkpoint_format
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # the output in each place of a word, lowest bits first
_UNORDERED = "try a checkpoint without desc_act (--no-act-order), or the float model"


class _Stored(NamedTuple):
    """Codes from 0 to 15 (outputs, inputs) uint8, scales and zero points (outputs, groups), groups (inputs,)."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed model, or a float checkpoint of codes that cannot be kept; see `convert.convert`."""
    return import_files(Gptq(source), directory, progress)


class Gptq(ModuleFiles):
    """A checkpoint of GPTQ or AWQ; an `import_codes.CodedModel`.

    Raises:
        InputError: other bits, another format, or see `ModuleFiles`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self.quantization
        self._is_awq = settings.get("quant_method") == AWQ
        self.format = "AWQ" if self._is_awq else "GPTQ"
        if settings.get("bits") != OFFSET // 2:
            raise InputError(f"{_WHERE}: bits", "4", shown(settings.get("bits"), 40), "try the float model")
        key, known = ("version", ("gemm",)) if self._is_awq else ("checkpoint_format", tuple(_ZERO_ADDED))
        found = settings.get(key, known[0])
        if not isinstance(found, str) or found.lower() not in known:
            raise InputError(f"{_WHERE}: {key}", " or ".join(known), shown(found, 40))
        self._added = 0 if self._is_awq else _ZERO_ADDED[found]

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        return "float activations"

    def coded(self, name: str) -> Coded:
        """See `ModuleFiles`.

        Raises:
            CodesLostError: zero points other than 8, or inputs that are not in the order of their groups.
        """
        found = self._stored(name)
        columns, groups = len(found.group), found.scales.shape[1]
        if np.any(found.zeros != OFFSET):
            raise CodesLostError(f"{self.format} with zero points, which our codes do not have")
        if columns % groups or not np.array_equal(found.group, np.arange(columns) // (columns // groups)):
            raise CodesLostError(f"{self.format} with inputs in the order of their activations")
        return Coded((found.codes - np.uint8(OFFSET)).view(np.int8), found.scales, 4)

    def floats(self, name: str) -> np.ndarray:
        """See `ModuleFiles`; float32 holds every product exactly."""
        found = self._stored(name)
        codes = found.codes.astype(np.float32) - found.zeros[:, found.group]
        return codes * found.scales[:, found.group]

    def _stored(self, name: str) -> _Stored:
        parts = self.parts(name, _KNOWN)
        if "bias" in parts and np.any(self.part(name, "bias", FLOAT_DTYPES)):  # some tools write zeros
            raise InputError(f"{name}.bias", "none by config.json", "one that is not zero")
        words, scales = self.part(name, "qweight", ("I32",)), to_f32(self.part(name, "scales", FLOAT_DTYPES))
        zeros = self.part(name, "qzeros", ("I32",))
        if words.ndim != 2 or scales.ndim != 2 or zeros.ndim != 2:
            got = f"qweight {words.shape}, scales {scales.shape}, qzeros {zeros.shape}"
            raise InputError(name, "matrices", got)
        codes = _unpack_awq(words).T if self._is_awq else _unpack(np.ascontiguousarray(words.T))
        held = (len(scales), -(-len(codes) // CODES_PER_WORD))
        if scales.shape[1] != len(codes) or zeros.shape != held:
            raise InputError(f"{name}.qzeros", f"{held} for scales {scales.shape}", f"{zeros.shape}")
        points = (_unpack_awq(zeros) if self._is_awq else _unpack(zeros)) + np.uint8(self._added)
        group = self._groups(name, parts, codes.shape[1], len(scales))
        return _Stored(np.ascontiguousarray(codes), np.ascontiguousarray(scales.T), points.T, group)

    def _groups(self, name: str, parts: set[str], columns: int, groups: int) -> np.ndarray:
        """Return the group of each input."""
        if "g_idx" not in parts:
            if self.quantization.get("desc_act"):
                raise InputError(f"{name}.g_idx", "one, as desc_act is set", "none", _UNORDERED)
            if columns % groups:
                raise InputError(name, f"groups of one size among {columns} inputs", f"{groups}")
            return np.arange(columns) // (columns // groups)
        order = self.part(name, "g_idx", ("I32", "I64"))
        if order.shape != (columns,) or order.min() < 0 or order.max() >= groups:
            raise InputError(f"{name}.g_idx", f"a group below {groups} for each of {columns} inputs")
        return order.astype(np.int64)


def _unpack(words: np.ndarray) -> np.ndarray:
    """Return codes from 0 to 15 (rows, 8 * words) uint8, lowest bits first."""
    return unpack_int4(words).view(np.uint8) + np.uint8(OFFSET)


def _unpack_awq(words: np.ndarray) -> np.ndarray:
    codes = _unpack(words).reshape(len(words), -1, CODES_PER_WORD)
    ordered = np.empty_like(codes)
    ordered[..., _AWQ_ORDER] = codes
    return ordered.reshape(len(words), -1)
