"""The packed directory: the one form between methods and everything after them.

Linear layers lie in compressed-tensors' `pack-quantized` layout, embedding and head in float or int8 per
channel, and `llamita.json` says how they came about and has the SHA-256 of every other file and of itself
without that line. `docs/reference/packed-model.md` has it byte by byte.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from llamita.errors import InputError, shown
from llamita.models.checkpoint import check_names, open_tensor_files
from llamita.models.config import ModelConfig
from llamita.models.names import EMBEDDING, HEAD, TRANSFORM, linear_names, table_names, vector_names
from llamita.models.weights import FLOAT_DTYPES, Int4Weight, Int8Weight, check_finite
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import factor
from llamita.numerics.packing import CODES_PER_WORD
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import KINDS, LayerKind, QuantScheme
from llamita.system.files import parse_json, read_bytes, safe_path

METADATA = "llamita.json"
FORMAT = 2  # 2: the scheme has overrides for some layers; all else is written as 1
KEYS = {"self_sha256", "format", "llamita", "scheme", "method", "settings", "seed", "rotations",
        "calibration", "source", "float_layers", "error", "files"}  # fmt: skip
_SELF_LINE = re.compile(rb'\{\n  "self_sha256": "([0-9a-f]{64})",\n')
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCALE_DTYPE = {"float32": "F32", "bfloat16": "BF16"}
_SMALLEST_NORMAL_BITS, _LARGEST_BITS = 0x0080, 0x7F7F  # of a positive bf16

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name to (dtype, shape), as `tensorfile` takes them


def layout(
    config: ModelConfig, scheme: QuantScheme, float_dtype: Callable[[str], str], transform: str | None = None
) -> dict[str, Tensors]:
    """Every tensor of a packed model, by module, in the order in which they are made.

    Args:
        float_dtype: the dtype in which a tensor that stays float is stored, by its full name.
        transform: the dtype of the head's transform, None where there is none.

    Raises:
        InputError: a group size does not divide its layer's inputs, or the scheme has a layer that the
            model has not.
    """
    shapes = table_names(config) | linear_names(config)
    for name in scheme.layers:
        if name not in shapes:
            raise InputError("scheme: layers", "names of this model's layers", f"{name[:80]!r}")
    if scheme.kind(EMBEDDING).bits == 4:
        raise InputError(f"{EMBEDDING}", "w8 or float", f"{scheme.kind(EMBEDDING).name}")
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
    if kind.group_size is None:  # compressed-tensors' shape of scales, but for tables
        per_row = (rows, 1) if name.startswith("model.layers.") else (rows,)
        return {f"{name}.weight": ("I8", shape), f"{name}.weight_scale": (scale, per_row)}
    if columns % kind.group_size:
        fitting = [g for g in (256, 128, 64, 32) if columns % g == 0]
        try_this = f"try --group-size {fitting[0]}" if fitting else "no group size fits this model"
        raise InputError(f"{name}", f"inputs in groups of {kind.group_size}", f"{columns}", f"{try_this}")
    return {
        f"{name}.weight_shape": ("I64", (2,)),
        f"{name}.weight_packed": ("I32", (rows, columns // CODES_PER_WORD)),
        f"{name}.weight_scale": (scale, (rows, columns // kind.group_size)),
    }


def tensor_bytes(tensors: Tensors) -> int:
    """Bytes of data that these tensors hold."""
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "I8": 1}
    return sum(sizes[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def int8_tables(config: ModelConfig, scheme: QuantScheme) -> list[str]:
    """Embedding and head as far as they are int8; a tied table is both."""
    head = EMBEDDING if config.tied else HEAD
    kinds = {EMBEDDING: scheme.kind(EMBEDDING), HEAD: scheme.kind(head)}
    return [name for name, kind in kinds.items() if kind.bits == 8]


def quantization_config(config: ModelConfig, scheme: QuantScheme) -> dict[str, Any]:
    """The scheme as compressed-tensors says it, for config.json.

    Layers that differ from the rest have groups of their own: there a name's pattern goes before the class
    `Linear`. compressed-tensors has no int8 table that embedding and head share; a format of our own name
    makes every loader that rests on it refuse, where it would else take the codes for weights.
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
    """Regular expressions, as compressed-tensors marks them, that match these modules and no others."""
    blocks: dict[str, list[int]] = {}  # "mlp.down_proj" to the blocks where it is meant
    for name in names:
        if name.startswith("model.layers."):
            _, _, block, linear = name.split(".", 3)
            blocks.setdefault(linear, []).append(int(block))
    patterns = [f"re:.*{re.escape(name)}$" for name in names if not name.startswith("model.layers.")]
    for linear, numbers in blocks.items():
        among = "|".join(str(number) for number in sorted(numbers))
        patterns.append(rf"re:.*layers\.({among})\.{re.escape(linear)}$")
    return patterns


class PackedModel:
    """A packed directory, memory-mapped; satisfies `ModelSource`.

    Raises:
        InputError: the directory is damaged, incomplete, or of a format that this version does not know.
        RunError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        config = read_bytes(path, "config.json")
        if hashlib.sha256(config).hexdigest() != self.metadata["files"].get("config.json", {}).get("sha256"):
            raise InputError(f"{path}: config.json: differs from the one that was written; try `llamita verify`")
        self.hf_config = parse_json(config, "config.json")
        self.config = ModelConfig.from_hf(self.hf_config)
        self.scheme = QuantScheme.from_dict(self.metadata["scheme"])
        if self.metadata["format"] < format_of(self.scheme):
            raise InputError(f"{METADATA}: format", f"{format_of(self.scheme)} with layers in the scheme")
        self.files, self._where = open_tensor_files(path)
        for name in self.files:
            if name not in self.metadata["files"]:
                raise InputError(f"{name}", f"among the files in {METADATA}", hint="try `llamita verify`")
        self.rotations = Rotations.from_list(self.metadata["rotations"])
        self._check()
        self.rotations = self._read_rotations()

    def _check(self) -> None:
        def stored_dtype(name: str) -> str:
            found = self.files[self._where[name]].tensors[name].dtype if name in self._where else "BF16"
            return found if found in FLOAT_DTYPES else ", ".join(FLOAT_DTYPES)

        assert self.scheme is not None
        is_transformed = "R1" in self.rotations.names and self.config.tied
        modules = layout(self.config, self.scheme, stored_dtype, stored_dtype(TRANSFORM) if is_transformed else None)
        expected = {name: tensor for tensors in modules.values() for name, tensor in tensors.items()}
        check_names(set(expected), set(self._where), "is tie_word_embeddings right?")
        for name, tensor in expected.items():
            info = self.files[self._where[name]].tensors[name]
            if (info.dtype, info.shape) != tensor:
                raise InputError(f"{name}", f"{tensor[0]} {tensor[1]}", f"{info.dtype} {info.shape}")

    def _read_rotations(self) -> Rotations:
        """The rotations with the head's transform, all of them found to be ones that can be run."""
        size, inputs = self.rotations.r4_size, self.config.intermediate_size
        if size is not None and size != inputs:
            raise InputError(f"{METADATA}: rotations: R4: size", f"{inputs}, the inputs of down_proj", f"{size}")
        if size is not None:
            factor(size)
        if TRANSFORM not in self._where:
            return self.rotations
        transform = self._read(TRANSFORM)
        check_finite(TRANSFORM, transform)
        return replace(self.rotations, head_transform=transform)

    def _read(self, tensor: str) -> np.ndarray:
        if tensor not in self._where:
            raise InputError(f"{tensor}", f"in {self.path}", "none")
        return self.files[self._where[tensor]].read(tensor)

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        """A linear layer or table as the scheme has it; float ones (rows, columns)."""
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
        """Scales, found to be what every runtime accepts: finite, normal and positive."""
        scales = self._read(f"{name}.weight_scale")
        bits = scales if scales.dtype == np.uint16 else scales.view(np.uint32) >> 16
        if bits.size and not (bits.min() >= _SMALLEST_NORMAL_BITS and bits.max() <= _LARGEST_BITS):
            raise InputError(f"{name}.weight_scale", "finite, normal, positive scales", hint="the file is damaged")
        return scales

    def vector(self, name: str) -> np.ndarray:
        """(length,) float32."""
        vector = to_f32(self._read(name))
        if not np.isfinite(vector).all():
            raise InputError(f"{name}", "finite values", hint="the file is damaged")
        return vector

    def close(self) -> None:
        """Unmap the files."""
        for file in self.files.values():
            file.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """llamita.json, its own hash, version and keys checked, and the size of every file that it lists.

    Raises:
        InputError: missing, damaged, of another version, or a listed weight file has another size.
    """
    data = read_bytes(path, METADATA)
    values = parse_json(data, METADATA)
    version = values.get("format")
    if type(version) is not int or version < 1:
        raise InputError(f"{METADATA}: format", f"{FORMAT}", shown(version, 40))
    if version > FORMAT:
        raise InputError(f"{METADATA}: format", f"at most {FORMAT}", f"{version}", "try a newer llamita")
    if not self_hash_holds(data):
        raise InputError(f"{path}: {METADATA}: differs from the one that was written; try `llamita verify`")
    if set(values) != KEYS:
        raise InputError(f"{METADATA}", f"the keys {sorted(KEYS)}", shown(sorted(values), 400))
    Rotations.from_list(values["rotations"])
    if not is_file_table(values["files"]):
        raise InputError(f"{METADATA}: files", "names with size and sha256")
    if not _is_provenance(values):
        raise InputError(
            f"{METADATA}: source, error, method or float_layers: not as docs/reference/packed-model.md has them"
        )
    for name, record in values["files"].items():
        if name.endswith(".safetensors"):
            size = safe_path(path, name).stat().st_size
            if size != record["size"]:
                raise InputError(f"{path / name}", f"{record['size']} bytes", f"{size}", "try copying it again")
    return values


def is_file_table(files: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    """Whether a value of llamita.json is a table of file names with their size and SHA-256."""
    return isinstance(files, dict) and all(
        _is_plain(name)
        and isinstance(record, dict)
        and type(record.get("size")) is int
        and record["size"] >= 0
        and isinstance(record.get("sha256"), str)
        for name, record in files.items()
    )


def _is_plain(name: str) -> bool:
    """Whether this can only be the name of a file in the directory itself."""
    return name.isprintable() and name not in ("", ".", "..") and "/" not in name


def _is_source(source: Any) -> bool:
    """Whether this names a model and the SHA-256 of its files, whose names lead nowhere else."""
    return (
        isinstance(source, dict)
        and isinstance(source.get("name"), str)
        and isinstance(source.get("files"), dict)
        and all(
            _is_plain(name) and isinstance(sha256, str) and _SHA256.fullmatch(sha256)
            for name, sha256 in source["files"].items()
        )
    )


def _is_provenance(values: dict[str, Any]) -> bool:
    """Whether the keys that only tell where a model comes from have the types that commands print."""
    error = values["error"]
    return (
        all(isinstance(values[key], str) for key in ("llamita", "method"))
        and all(isinstance(values[key], dict) for key in ("settings", "float_layers"))
        and _is_source(values["source"])
        and isinstance(error, dict)
        and "relative" in error
        and isinstance(error["relative"], float | int | None)  # null in what was imported
        and isinstance(error.get("layers"), dict)
        and all(isinstance(e, float | int) for e in error["layers"].values())
    )


def format_of(scheme: QuantScheme) -> int:
    """The format's number for a directory of this scheme: older readers take what they can read."""
    return 2 if scheme.layers else 1


def self_hash_holds(data: bytes) -> bool:
    """Whether llamita.json has the hash, in its second line, of its bytes without that line."""
    line = _SELF_LINE.match(data)
    return line is not None and line[1].decode() == hashlib.sha256(b"{\n" + data[line.end() :]).hexdigest()
