"""Lay out and read packed models, the one format between the methods and all that follows.

Linear layers are stored in compressed-tensors' `pack-quantized` layout, embedding and head in float or int8 per
channel. `docs/reference/packed-model.md` specifies the format byte by byte.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.models.checkpoint import StoredTensors, check_names, open_tensor_files
from llamita.models.config import ModelConfig
from llamita.models.metadata import METADATA, Metadata
from llamita.models.names import EMBEDDING, HEAD, TRANSFORM, linear_names, table_names, vector_names
from llamita.models.weights import FLOAT_DTYPES, Int4Weight, Int8Weight, check_finite
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import factor
from llamita.numerics.packing import CODES_PER_WORD
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import KINDS, LayerKind, QuantScheme, fitting_group_size
from llamita.system.files import parse_json, read_bytes

_SCALE_DTYPE = {"float32": "F32", "bfloat16": "BF16"}
_SMALLEST_NORMAL_BITS, _LARGEST_BITS = 0x0080, 0x7F7F  # of a positive bf16
_ANY_FLOAT = "float"  # in a layout, in place of a dtype: one of FLOAT_DTYPES

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name to (dtype, shape), as `TensorWriter` takes them


def layout(
    config: ModelConfig, scheme: QuantScheme, float_dtype: Callable[[str], str], transform: str | None = None
) -> dict[str, Tensors]:
    """Return every tensor of a packed model, by module, in the order in which they are made.

    Args:
        float_dtype: gives the dtype of a tensor that stays float, by its full name.
        transform: the dtype of the head's transform, or None without one.

    Raises:
        InputError: a group size does not divide its layer's inputs, or the scheme names a layer that the model
            does not have.
    """
    shapes = table_names(config) | linear_names(config)
    for name in scheme.layers:
        if name not in shapes:
            raise InputError("scheme: layers", "names of this model's layers", shown(name))
    if scheme.kind(EMBEDDING).bits == 4:
        raise InputError(EMBEDDING, "w8 or float", scheme.kind(EMBEDDING).name)
    scale = _SCALE_DTYPE[scheme.scale_dtype]
    modules: dict[str, Tensors] = {}
    for name, shape in shapes.items():
        kind = scheme.kind(name)
        if kind.bits:
            modules[name] = _rounded_tensors(name, shape, kind, scale)
        else:
            modules[name] = {f"{name}.weight": (float_dtype(f"{name}.weight"), shape)}
    for name, shape in vector_names(config).items():
        modules[name] = {name: (float_dtype(name), shape)}
    if transform:
        modules[TRANSFORM] = {TRANSFORM: (transform, (config.hidden_size, config.hidden_size))}
    return modules


def _rounded_tensors(name: str, shape: tuple[int, int], kind: LayerKind, scale: str) -> Tensors:
    rows, columns = shape
    if kind.group_size is None:  # (rows, 1) is compressed-tensors' shape of scales; tables are our own
        per_row = (rows, 1) if name.startswith("model.layers.") else (rows,)
        return {f"{name}.weight": ("I8", shape), f"{name}.weight_scale": (scale, per_row)}
    if columns % kind.group_size:
        fitting = fitting_group_size(columns)
        keep = f"no group size fits this layer; try --keep-float '*.{name.rpartition('.')[2]}'"
        try_this = f"try --group-size {fitting}, or --fit-groups" if fitting else keep
        raise InputError(name, f"inputs in groups of {kind.group_size}", f"{columns}", try_this)
    return {
        f"{name}.weight_shape": ("I64", (2,)),
        f"{name}.weight_packed": ("I32", (rows, columns // CODES_PER_WORD)),
        f"{name}.weight_scale": (scale, (rows, columns // kind.group_size)),
    }


def tensor_bytes(tensors: Tensors) -> int:
    """Return the bytes of data of these tensors."""
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}
    return sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def int8_tables(config: ModelConfig, scheme: QuantScheme) -> list[str]:
    """Return the names of the int8 tables. With tied weights the one table counts as embedding and head."""
    head = EMBEDDING if config.tied else HEAD
    kinds = {EMBEDDING: scheme.kind(EMBEDDING), HEAD: scheme.kind(head)}
    return [name for name, kind in kinds.items() if kind.bits == 8]


def quantization_config(config: ModelConfig, scheme: QuantScheme) -> dict[str, Any]:
    """Return the scheme as compressed-tensors writes it in config.json.

    Layers that differ from the rest get a group each kind: a pattern of names has precedence over the class `Linear`.
    compressed-tensors has no int8 table that embedding and head share. Its loaders would take the codes for
    weights, so the tables get a format that only llamita knows, and they refuse it.
    """
    by_kind: dict[str, list[str]] = {}
    for name, kind in scheme.layers.items():
        if name not in table_names(config) or kind.startswith("w4"):
            by_kind.setdefault(kind, []).append(name)
    ignored = by_kind.pop("float", [])
    members = [_config_group(_patterns(names), KINDS[kind]) for kind, names in by_kind.items()]
    members.append(_config_group(["Linear"], KINDS[f"w4g{scheme.group_size}"]))
    groups = {f"group_{i}": group for i, group in enumerate(members)}
    tables = int8_tables(config, scheme)
    if tables:
        group = _config_group([f"re:.*{name.split('.')[-1]}" for name in tables], KINDS["w8"])
        groups["group_tables"] = group | {"format": "llamita-int8-table", "input_activations": None}
    head = scheme.kind(EMBEDDING if config.tied else HEAD)
    formats = {group["format"] for group in members}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [*([] if head.bits else [HEAD]), *_patterns(ignored)],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _config_group(targets: list[str], kind: LayerKind) -> dict[str, Any]:
    activations = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False, "num_bits": kind.bits}
    grouped = {"strategy": "group", "group_size": kind.group_size}
    return {
        "targets": targets,
        "format": "pack-quantized" if kind.group_size else "int-quantized",
        "weights": weights | (grouped if kind.group_size else {"strategy": "channel"}),
        "input_activations": activations,
        "output_activations": None,
    }


def _patterns(names: list[str]) -> list[str]:
    """Return regular expressions, marked as compressed-tensors does, that match these modules and no others."""
    blocks: dict[str, list[int]] = {}  # "mlp.down_proj" to the numbers of its blocks
    for name in names:
        if name.startswith("model.layers."):
            _, _, block, linear = name.split(".", 3)
            blocks.setdefault(linear, []).append(int(block))
    patterns = [f"re:.*{re.escape(name)}$" for name in names if not name.startswith("model.layers.")]
    for linear, numbers in blocks.items():
        among = "|".join(str(number) for number in sorted(numbers))
        patterns.append(rf"re:.*layers\.({among})\.{re.escape(linear)}$")
    return patterns


class PackedModel(StoredTensors):
    """Read a packed model, memory-mapped; satisfies `ModelSource`.

    Raises:
        InputError: the model is damaged, incomplete, or of a format that this version does not know.
        RunError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = Metadata.read(path)
        config = read_bytes(path, "config.json")
        if hashlib.sha256(config).hexdigest() != self.metadata.files.get("config.json", {}).get("sha256"):
            raise InputError(f"{path}: config.json: differs from the one that was written", hint="try `llamita verify`")
        self.hf_config = parse_json(config, "config.json")
        self.config = ModelConfig.from_hf(self.hf_config)
        self.scheme = self.metadata.scheme
        self.files, self._where = open_tensor_files(path)
        for name in self.files:
            if name not in self.metadata.files:
                raise InputError(name, f"among the files in {METADATA}", hint="try `llamita verify`")
        self._check()
        self.rotations = self._read_rotations()

    def _check(self) -> None:
        """Compare names, dtypes and shapes of the tensors with those of the layout."""
        is_transformed = "R1" in self.metadata.rotations.names and self.config.tied
        modules = layout(self.config, self.scheme, lambda _: _ANY_FLOAT, _ANY_FLOAT if is_transformed else None)
        expected = {name: tensor for tensors in modules.values() for name, tensor in tensors.items()}
        check_names(set(expected), set(self._where), "is tie_word_embeddings right?")
        for name, (dtype, shape) in expected.items():
            info, allowed = self.info(name), FLOAT_DTYPES if dtype == _ANY_FLOAT else (dtype,)
            if info.dtype not in allowed or info.shape != shape:
                raise InputError(name, f"{' or '.join(allowed)} {shape}", f"{info.dtype} {info.shape}")

    def _read_rotations(self) -> Rotations:
        """Return the rotations with the head's transform; check that the engine can run them."""
        rotations, inputs = self.metadata.rotations, self.config.intermediate_size
        size = rotations.r4_size
        if size is not None and size != inputs:
            raise InputError(f"{METADATA}: rotations: R4: size", f"{inputs}, the inputs of down_proj", f"{size}")
        if size is not None:
            factor(size)
        if TRANSFORM not in self._where:
            return rotations
        transform = self._read(TRANSFORM)
        check_finite(TRANSFORM, transform)
        return replace(rotations, head_transform=transform)

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        """Return a linear layer or table in the scheme's integers, or as a float array (rows, columns)."""
        kind = self.scheme.kind(name)
        if kind.group_size:
            packed = self._read(f"{name}.weight_packed")
            shape = (packed.shape[0], packed.shape[1] * CODES_PER_WORD)
            if tuple(self._read(f"{name}.weight_shape")) != shape:
                raise InputError(f"{name}.weight_shape", f"{shape}", hint="the file is damaged")
            return Int4Weight(packed, self._scales(name), kind.group_size)
        if kind.bits:
            return Int8Weight(self._read(f"{name}.weight"), self._scales(name).reshape(-1))
        return self._read(f"{name}.weight")

    def _scales(self, name: str) -> np.ndarray:
        """Return the scales of a module; check that every runtime accepts them: finite, normal and positive."""
        scales = self._read(f"{name}.weight_scale")
        bits = scales if scales.dtype == np.uint16 else scales.view(np.uint32) >> 16
        if bits.size and not (bits.min() >= _SMALLEST_NORMAL_BITS and bits.max() <= _LARGEST_BITS):
            raise InputError(f"{name}.weight_scale", "finite, normal, positive scales", hint="the file is damaged")
        return scales

    def vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias, float32 (length,)."""
        vector = to_f32(self._read(name))
        if not np.isfinite(vector).all():
            raise InputError(name, "finite values", hint="the file is damaged")
        return vector
