"""Import a quantized model of another tool: its codes and scales as they are, written as a packed model.

One matrix is in memory at a time, so every matrix is read twice: `survey` looks at all of them to find the scheme that
holds them, and `write` reads them again to write them. Scales are therefore made positive twice, too. Only a head that
may repeat the embedding is read once more, together with it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamita import __version__
from llamita.errors import InputError
from llamita.imports.codes import Coded, Found, find_kinds, scales_for, scheme_of, with_positive_scales
from llamita.models.card import CardFacts, model_card
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import describe_kinds
from llamita.models.metadata import ErrorRecord, Metadata, SourceRecord
from llamita.models.names import EMBEDDING, HEAD, linear_names, table_names, vector_names
from llamita.models.packed import PackedModel, layout
from llamita.models.packed_writer import plan_shards, write_config, write_shards
from llamita.models.peft import StoredAdapter
from llamita.models.weights import as_stored, check_finite, stored_dtype
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16
from llamita.numerics.packing import pack_int4
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import file_table, place_of, sha256_file, write_bytes
from llamita.system.progress import Progress

_METHOD = "imported"  # in llamita.json
_ROWS = 1024  # of a matrix compared at a time


class CodedModel(Protocol):
    """A quantized model in another tool's format.

    Attributes:
        format: its name, for people.
        path: the file or directory that was opened.
        files: those that decide what the model is.
        hf_config: config.json without the keys that say how the model is quantized.
        rotations: the rotations that the weights expect at run time.
        rotated: names of rotations that are in the weights already; adapters of the float model do not fit these.
    """

    format: str
    path: Path
    files: list[Path]
    hf_config: dict[str, Any]
    rotations: Rotations
    rotated: tuple[str, ...]

    def activations(self) -> str | None:
        """Name what the format does with activations, None where llamita does the same; asked after all matrices."""
        ...

    def matrix(self, name: str) -> Coded | np.ndarray:
        """Return a linear layer or table by its module's name; float ones as they are stored."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias by its full name, as it is stored."""
        ...


@dataclass(frozen=True)
class ImportedCodes:
    """How a quantized model was kept.

    Attributes:
        scheme: that holds it.
        float_layers: matrices that are stored as floats, and why.
        changed: groups of zeros, and groups whose sign was turned.
        activations: see `CodedModel`.
    """

    scheme: QuantScheme
    float_layers: dict[str, str]
    changed: int
    activations: str | None


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        codes: how they were kept; None where the result is a float checkpoint.
        adapter: belongs to the model, and is not in the directory.
        note: what else a user has to know.
        layers: of the model.
    """

    codes: ImportedCodes | None = None
    adapter: StoredAdapter | None = None
    note: str | None = None
    layers: int = 0


@dataclass(frozen=True)
class Survey:
    """What `write` has to know before its first byte.

    Attributes:
        config, hf_config: of the model, whose head is tied where it repeats the embedding.
        dtypes: the type of every tensor that stays float, in safetensors' words.
        codes: how the others are kept.
    """

    config: ModelConfig
    hf_config: dict[str, Any]
    dtypes: dict[str, str]
    codes: ImportedCodes


class CodesLostError(Exception):
    """An int4 layer's codes cannot be kept, and the caller asked for all of them."""


def import_codes(
    model: CodedModel, directory: Path, progress: Progress = None, remark: str | None = None, keep_all: bool = False
) -> ImportedCodes:
    """Write a packed model.

    Args:
        directory: exists, and holds nothing but tokenizer and companions.
        remark: a sentence for the card.
        keep_all: see `survey`.

    Raises:
        InputError: a shape or value that a packed model cannot hold.
        RunError: the disk is full, or a file cannot be read.
        CodesLostError: see `survey`; nothing was written.
    """
    found = survey(model, progress, keep_all)
    write(model, found, directory, progress, remark)
    return found.codes


# ---- first pass ----------------------------------------------------------------------------------


def survey(model: CodedModel, progress: Progress = None, keep_all: bool = False) -> Survey:
    """Look at every tensor, and find the scheme and the types that hold them.

    Args:
        keep_all: stop at the first int4 layer whose codes cannot be kept, instead of storing it as floats.

    Raises:
        InputError: a shape or value that a packed model cannot hold.
        CodesLostError: with `keep_all` alone.
    """
    config, hf_config = ModelConfig.from_hf(model.hf_config), model.hf_config
    names, found = table_names(config) | linear_names(config), dict[str, Found]()
    floats, exact = dict[str, str](), {"BF16", "F16", "F32"}  # stored types; those that hold all stored in float32
    for done, (name, shape) in enumerate(names.items()):
        if progress:
            progress(f"looking at {name}", done, 2 * len(names))
        matrix = _matrix(model, name, shape)
        found[name] = find_kinds(name, matrix)
        if isinstance(matrix, np.ndarray):
            floats[f"{name}.weight"] = stored_dtype(matrix)
            exact &= _exact_types(matrix)
        elif keep_all and matrix.bits == 4 and found[name].kinds == ("float",) and name in linear_names(config):
            raise CodesLostError(name)
    if not config.tied and _is_tied(model, found):
        config, hf_config = replace(config, tied=True), {**hf_config, "tie_word_embeddings": True}
        found.pop(HEAD)
    scheme, changed = scheme_of(found), sum(f.changed for f in found.values())
    codes = ImportedCodes(scheme, _float_layers(model.format, found), changed, model.activations())
    for name in vector_names(config):
        vector = model.vector(name)
        floats[name] = stored_dtype(vector)
        exact &= _exact_types(vector)
    # Formats that know float32 alone get back what the model came from: bf16 or float16, if all values are exact there.
    narrow = next(dtype for dtype in ("BF16", "F16", "F32") if dtype in exact)
    dtypes = {f"{name}.weight": "F32" for name in found}  # what is multiplied out
    dtypes |= {tensor: narrow if dtype == "F32" else dtype for tensor, dtype in floats.items()}
    return Survey(config, hf_config, dtypes, codes)


def _matrix(model: CodedModel, name: str, shape: tuple[int, int]) -> Coded | np.ndarray:
    """Return a matrix of this shape, or raise InputError."""
    matrix = model.matrix(name)
    have = matrix.shape if isinstance(matrix, np.ndarray) else matrix.codes.shape
    if have != shape:
        raise InputError(name, f"{shape}", f"{have}")
    if isinstance(matrix, Coded):
        rows, groups = matrix.scales.shape if matrix.scales.ndim == 2 else (0, 0)
        if rows != shape[0] or not groups or shape[1] % groups:
            raise InputError(name, f"scales for {shape[0]} rows", f"{matrix.scales.shape}")
    return matrix


def _is_tied(model: CodedModel, found: dict[str, Found]) -> bool:
    """Return whether the head repeats the embedding, as in formats that cannot tie int8 tables."""
    if found[HEAD].kinds != found[EMBEDDING].kinds or found[HEAD].kinds == ("float",):
        return False
    table, head = model.matrix(EMBEDDING), model.matrix(HEAD)
    assert isinstance(table, Coded)
    assert isinstance(head, Coded)
    return np.array_equal(table.scales, head.scales) and np.array_equal(table.codes, head.codes)


def _float_layers(format: str, found: dict[str, Found]) -> dict[str, str]:
    kept, lost = f"float in {format}", f"multiplied out: {format} has it in codes that llamita does not keep"
    return {name: lost if f.is_coded else kept for name, f in found.items() if f.kinds == ("float",)}


def _exact_types(values: np.ndarray) -> set[str]:
    """Return the float types in which all values are exact; every type for values that are not stored in float32."""
    exact = {"BF16", "F16", "F32"}
    for start in range(0, len(values) if values.dtype == np.float32 else 0, _ROWS):
        part = values[start : start + _ROWS]
        if "BF16" in exact and not np.array_equal(bf16_to_f32(f32_to_bf16(part)), part):
            exact.remove("BF16")
        with np.errstate(over="ignore"):
            if "F16" in exact and not np.array_equal(part.astype(np.float16), part):
                exact.remove("F16")
    return exact


# ---- second pass ---------------------------------------------------------------------------------


def write(
    model: CodedModel, found: Survey, directory: Path, progress: Progress = None, remark: str | None = None
) -> None:
    """Write the packed model that `survey` found; see `import_codes`."""
    _write_weights(model, found, directory, progress)
    write_config(directory, found.hf_config, found.codes.scheme, model.rotations)
    write_bytes(directory / "README.md", _card(model, found, directory, remark).encode())
    _write_metadata(model, found.codes, directory)
    PackedModel(directory).close()  # checks what was written


def _write_weights(model: CodedModel, found: Survey, directory: Path, progress: Progress) -> None:
    modules = layout(found.config, found.codes.scheme, lambda name: found.dtypes[name])
    owners = {tensor: name for name, tensors in modules.items() for tensor in tensors}
    made: dict[str, dict[str, np.ndarray]] = {}  # the tensors of one module

    def pieces(tensor: str) -> list[np.ndarray]:
        name = owners[tensor]
        if name not in made:
            made.clear()
            made[name] = _tensors(model, name, found)
        return [made[name][tensor]]

    def report(tensor: str, done: int, total: int) -> None:
        if progress:
            progress(f"writing {tensor}", total + done, 2 * total)

    write_shards(directory, plan_shards(modules), pieces, report)


def _tensors(model: CodedModel, name: str, found: Survey) -> dict[str, np.ndarray]:
    """Return a module's tensors by name, as they are stored."""
    scheme, dtypes = found.codes.scheme, found.dtypes
    if name in dtypes:
        return {name: _finite(name, model.vector(name), dtypes[name])}
    kind, matrix, tensor = scheme.kind(name), model.matrix(name), f"{name}.weight"
    if not kind.bits:
        values = matrix.floats() if isinstance(matrix, Coded) else matrix
        return {tensor: _finite(tensor, values, dtypes[tensor])}
    assert isinstance(matrix, Coded)
    coded, _ = with_positive_scales(name, matrix)
    assert coded is not None
    scales = scales_for(coded, kind.name)
    if kind.group_size is None and not name.startswith("model.layers."):
        scales = scales.reshape(-1)
    stored = scales if scheme.scale_dtype == "float32" else f32_to_bf16(scales)
    if kind.group_size is None:
        return {tensor: coded.codes, f"{name}.weight_scale": stored}
    return {f"{name}.weight_packed": pack_int4(coded.codes), f"{name}.weight_scale": stored}


def _finite(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    values = as_stored(values, dtype)
    check_finite(name, values)
    return values


def _card(model: CodedModel, found: Survey, directory: Path, remark: str | None) -> str:
    scheme = found.codes.scheme
    made = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return model_card(CardFacts(
        source_name=place_of(model.path).name,
        source_path=model.path if model.path.is_dir() else directory,
        scheme=scheme, kinds=describe_kinds(found.config, scheme),
        method=f"codes and scales of {model.format}, imported as they are",
        scales="those of the tool that made them", is_measured=False, version=__version__,
        source_bytes=sum(path.stat().st_size for path in model.files), tensor_bytes=made,
        relative_error=None, worst=[], remark=remark,
    ))  # fmt: skip


def _write_metadata(model: CodedModel, codes: ImportedCodes, directory: Path) -> None:
    """Write llamita.json, with the hash of every file of the directory."""
    sources = {path.name: sha256_file(path) for path in model.files}
    Metadata(
        llamita=__version__,
        scheme=codes.scheme,
        method=_METHOD,
        settings={"form": model.format, "rotated": list(model.rotated)},
        seed=None,
        rotations=model.rotations,
        calibration=None,
        source=SourceRecord(str(place_of(model.path)), sources),
        float_layers=codes.float_layers,
        error=ErrorRecord(None, None, {}),
        files=file_table(directory),
    ).write(directory)
