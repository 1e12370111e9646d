"""compressed-tensors with symmetric int4 weights, W4A16 and W4A8, as llm-compressor and others write them.

Layouts: `pack-quantized`, words as in our own packed directory; `int-quantized`, a byte a code. A channel has
one scale, or each of its groups has.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.imports.coded_files import ModuleFiles, take_over_modules
from llamita.imports.codes import Coded
from llamita.imports.take_over import Imported
from llamita.models.names import EMBEDDING
from llamita.numerics.packing import CODES_PER_WORD, unpack_int4
from llamita.system.progress import Progress

_WHERE = "config.json: quantization_config"
_FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")
_KNOWN = {"weight", "weight_packed", "weight_scale", "weight_shape", "bias"}
_WEIGHTS: dict[str, tuple[Any, ...]] = {"type": ("int",), "symmetric": (True,), "dynamic": (False, None),
                                        "num_bits": (4, 8), "strategy": ("group", "channel")}  # fmt: skip
_ACTIVATIONS: dict[str, tuple[Any, ...]] = {"type": ("int",), "num_bits": (8,), "dynamic": (True,),
                                            "strategy": ("token",)}  # fmt: skip


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed directory; see `forms.convert`."""
    return take_over_modules(CompressedTensors(source), directory, progress)


class CompressedTensors(ModuleFiles):
    """Such a checkpoint; satisfies `takeover.CodedModel`.

    Raises:
        InputError: asymmetric weights, another order of inputs, activations that are rounded otherwise, or
            see `ModuleFiles`.
    """

    form = "compressed-tensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self.quantization
        if settings.get("format") not in _FORMATS:
            raise _unknown("format", settings.get("format"), _FORMATS)
        sparsity = settings.get("sparsity_config") or {}  # some tools write one that says "dense"
        is_dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
        if not is_dense or settings.get("kv_cache_scheme") or settings.get("transform_config"):
            raise InputError(f"{_WHERE}", "weights alone", "sparsity, cache or transforms")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise InputError(f"{_WHERE}: config_groups", "groups by name")
        self._rounding = [_check(group) for group in groups.values()]

    def activations(self) -> str | None:
        """See `takeover.CodedModel`."""
        if "symmetric" in self._rounding:
            return "symmetric int8 activations"
        if None in self._rounding:
            return "float activations" + (" in some layers" if any(self._rounding) else "")
        return None

    def coded(self, name: str) -> Coded:
        """See `takeover.CodedModel`."""
        parts = self.parts(name, _KNOWN)
        if "bias" in parts:
            raise InputError(f"{name}.bias: unexpected for the architecture in config.json")
        scales = self.scales(name, "weight_scale")
        if "weight_packed" not in parts:
            codes = self.part(name, "weight", ("I8",))
            return Coded(codes, scales, _bits(name, codes))
        words, shape = (self.part(name, "weight_packed", ("I32",)), self.part(name, "weight_shape", ("I64", "I32")))
        held = (words.shape[0], words.shape[1] * CODES_PER_WORD) if words.ndim == 2 else None
        if shape.shape != (2,) or held != (int(shape[0]), int(shape[1])):
            raise InputError(f"{name}.weight_packed", f"int4 words of {shape.ravel().tolist()}", f"{words.shape}")
        return Coded(unpack_int4(words), scales, 4)


def _bits(name: str, codes: np.ndarray) -> int:
    """How many bits a byte's codes need; tables stay what they are."""
    is_small = name != EMBEDDING and codes.size and codes.min() >= -8 and codes.max() <= 7
    return 4 if is_small else 8


def _check(group: dict[str, Any]) -> str | None:
    """How a group of layers has its activations rounded: "asymmetric", "symmetric" or not at all."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if group.get("output_activations") or not isinstance(weights, dict):
        raise InputError(f"{_WHERE}", "weights and their inputs quantized", "others")
    for key, known in _WEIGHTS.items():
        if weights.get(key) not in known:
            raise _unknown(f"weights: {key}", weights.get(key), known)
    if group.get("format") == "pack-quantized" and weights["num_bits"] != 4:
        raise _unknown("weights: num_bits: of pack-quantized", weights["num_bits"], (4,))
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise InputError(
            f"{_WHERE}: actorder",
            "inputs in their own order",
            f"{str(weights['actorder'])[:40]!r}",
            "try a checkpoint without",
        )
    if activations is None:
        return None
    if not isinstance(activations, dict):
        raise InputError(f"{_WHERE}: input_activations", "settings")
    for key, known in _ACTIVATIONS.items():
        if activations.get(key) not in known:
            raise _unknown(f"input_activations: {key}", activations.get(key), known)
    return "symmetric" if activations.get("symmetric", True) else "asymmetric"


def _unknown(key: str, value: object, known: tuple[Any, ...]) -> InputError:
    return InputError(f"{_WHERE}: {key}", f"{' or '.join(map(str, known))}", f"{str(value)[:40]!r}")
