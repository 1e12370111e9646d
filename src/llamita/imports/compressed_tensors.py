"""Read compressed-tensors with symmetric int4 weights, W4A16 and W4A8, as llm-compressor and others write them.

Layouts: `pack-quantized`, the words of llamita's own packed models; `int-quantized`, a byte for each code. A channel or
each of its groups has a scale.
"""

from pathlib import Path
from typing import Any

from llamita.errors import InputError, shown
from llamita.imports.coded_files import ModuleFiles, import_files
from llamita.imports.codes import Coded
from llamita.imports.import_codes import Imported
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
    """Write a packed model; see `convert.convert`."""
    return import_files(CompressedTensors(source), directory, progress)


class CompressedTensors(ModuleFiles):
    """A checkpoint of compressed-tensors; an `import_codes.CodedModel`.

    Raises:
        InputError: asymmetric weights, reordered inputs, other rounding of activations, or see `ModuleFiles`.
    """

    format = "compressed-tensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        settings = self.quantization
        _check("format", settings.get("format"), _FORMATS)
        sparsity = settings.get("sparsity_config") or {}  # some tools write one that says "dense"
        is_dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
        if not is_dense or settings.get("kv_cache_scheme") or settings.get("transform_config"):
            raise InputError(_WHERE, "weights alone", "sparsity, cache or transforms")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise InputError(f"{_WHERE}: config_groups", "groups by name")
        self._rounding = [_rounding_of(group) for group in groups.values()]

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        if "symmetric" in self._rounding:
            return "symmetric int8 activations"
        if None in self._rounding:
            return "float activations" + (" in some layers" if any(self._rounding) else "")
        return None

    def coded(self, name: str) -> Coded:
        """See `ModuleFiles`."""
        parts = self.parts(name, _KNOWN)
        if "bias" in parts:
            raise InputError(f"{name}.bias: unexpected for the architecture in config.json")
        scales = self.scales(name, "weight_scale")
        if "weight_packed" not in parts:
            codes = self.part(name, "weight", ("I8",))
            is_small = name != EMBEDDING and codes.size and codes.min() >= -8 and codes.max() <= 7
            return Coded(codes, scales, 4 if is_small else 8)
        words, shape = (self.part(name, "weight_packed", ("I32",)), self.part(name, "weight_shape", ("I64", "I32")))
        held = (words.shape[0], words.shape[1] * CODES_PER_WORD) if words.ndim == 2 else None
        if shape.shape != (2,) or held != (int(shape[0]), int(shape[1])):
            raise InputError(f"{name}.weight_packed", f"int4 words of {shape.ravel().tolist()}", f"{words.shape}")
        return Coded(unpack_int4(words), scales, 4)


def _rounding_of(group: dict[str, Any]) -> str | None:
    """Return how a group of layers rounds activations: "asymmetric", "symmetric" or None; check all of its settings."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if group.get("output_activations") or not isinstance(weights, dict):
        raise InputError(_WHERE, "weights and their inputs quantized", "others")
    for key, known in _WEIGHTS.items():
        _check(f"weights: {key}", weights.get(key), known)
    if group.get("format") == "pack-quantized":
        _check("weights: num_bits: of pack-quantized", weights["num_bits"], (4,))
    if weights.get("actorder") not in (None, False, "static", "weight"):
        expected, hint = "inputs in their own order", "try a checkpoint without"
        raise InputError(f"{_WHERE}: actorder", expected, shown(weights["actorder"], 40), hint)
    if activations is None:
        return None
    if not isinstance(activations, dict):
        raise InputError(f"{_WHERE}: input_activations", "settings")
    for key, known in _ACTIVATIONS.items():
        _check(f"input_activations: {key}", activations.get(key), known)
    return "symmetric" if activations.get("symmetric", True) else "asymmetric"


def _check(key: str, value: object, known: tuple[Any, ...]) -> None:
    """Raise InputError for a value of quantization_config that is not known."""
    if value not in known:
        raise InputError(f"{_WHERE}: {key}", " or ".join(map(str, known)), shown(value, 40))
