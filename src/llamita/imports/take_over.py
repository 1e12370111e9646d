"""A quantized model of another tool as a packed directory: its codes and scales as they are.

A reader of some form gives matrices and vectors by our names; `take_over` looks at all of them once, to find
the scheme that holds them, and writes them in a second pass.
"""

from collections.abc import Iterator
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
from llamita.system.files import file_table, sha256_file, write_bytes
from llamita.system.progress import Progress

METHOD = "imported"
_ROWS = 1024  # of a table looked at together


class CodedModel(Protocol):
    """A quantized model in some form.

    Attributes:
        form: what made it, for people.
        path: the file or directory it lies in.
        files: those that decide what it is.
        hf_config: config.json, without how it is quantized.
        rotations: what its weights expect at run time.
        rotated: names of the rotations that are in its weights, which adapters of the float model do not fit.
    """

    form: str
    path: Path
    files: list[Path]
    hf_config: dict[str, Any]
    rotations: Rotations
    rotated: tuple[str, ...]

    def activations(self) -> str | None:
        """What the form does with activations where it is not what llamita does; asked after all matrices."""
        ...

    def matrix(self, name: str) -> Coded | np.ndarray:
        """A linear layer or table by its module's name; float ones as they are stored."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or a bias by its full name, as it is stored."""
        ...


@dataclass(frozen=True)
class Taken:
    """What was taken over.

    Attributes:
        float_layers: matrices in float, and why.
        changed: groups whose sign was turned, or that were zeros.
        activations: see `CodedModel`.
    """

    scheme: QuantScheme
    float_layers: dict[str, str]
    changed: int
    activations: str | None


@dataclass(frozen=True)
class Imported:
    """What became of a model in another form.

    Attributes:
        taken: what was taken over; None of a float checkpoint.
        adapter: that goes with it, and is not in the directory.
        layers: of the model.
        note: what else a user has to know.
    """

    taken: Taken | None = None
    adapter: StoredAdapter | None = None
    note: str | None = None
    layers: int = 0


def take_over(model: CodedModel, directory: Path, progress: Progress = None, remark: str | None = None) -> Taken:
    """Write a packed directory.

    Args:
        directory: exists; tokenizer and companions are there already, nothing else.
        remark: a sentence for the card.

    Raises:
        InputError: a shape or value that the packed form does not hold.
        RunError: disk full, or a file cannot be read.
    """
    config = ModelConfig.from_hf(model.hf_config)
    names = table_names(config) | linear_names(config)
    found = {}
    for done, (name, shape) in enumerate(names.items()):
        if progress:
            progress(f"looking at {name}", done, 2 * len(names))
        matrix = _matrix(model, name, shape)
        found[name] = find_kinds(name, matrix)
    if not config.tied and _is_tied(model, found):
        config, hf_config = replace(config, tied=True), {**model.hf_config, "tie_word_embeddings": True}
        found.pop(HEAD)
    else:
        hf_config = model.hf_config
    scheme = scheme_of(found)
    taken = Taken(scheme, _float_layers(model.form, found), sum(f.changed for f in found.values()), model.activations())
    _write_weights(model, config, scheme, directory, progress)
    write_config(directory, hf_config, scheme, model.rotations)
    write_bytes(directory / "README.md", _card(model, config, taken, directory, remark).encode())
    _write_metadata(model, taken, directory)
    PackedModel(directory).close()  # found to be whole
    return taken


def _matrix(model: CodedModel, name: str, shape: tuple[int, int]) -> Coded | np.ndarray:
    """A matrix, found to have its shape."""
    matrix = model.matrix(name)
    have = matrix.shape if isinstance(matrix, np.ndarray) else matrix.codes.shape
    if have != shape:
        raise InputError(f"{name}", f"{shape}", f"{have}")
    if isinstance(matrix, Coded):
        rows, groups = matrix.scales.shape if matrix.scales.ndim == 2 else (0, 0)
        if rows != shape[0] or not groups or shape[1] % groups:
            raise InputError(f"{name}", f"scales for {shape[0]} rows", f"{matrix.scales.shape}")
    return matrix


def _is_tied(model: CodedModel, found: dict[str, Found]) -> bool:
    """Whether the head is the embedding once more, as forms have it that know no table that is both."""
    if found[HEAD].kinds != found[EMBEDDING].kinds or found[HEAD].kinds == ("float",):
        return False
    table, head = model.matrix(EMBEDDING), model.matrix(HEAD)
    assert isinstance(table, Coded)
    assert isinstance(head, Coded)
    return np.array_equal(table.scales, head.scales) and np.array_equal(table.codes, head.codes)


def _float_layers(form: str, found: dict[str, Found]) -> dict[str, str]:
    kept, lost = f"float in {form}", f"multiplied out: {form} has it in codes that llamita does not keep"
    return {name: lost if f.is_coded else kept for name, f in found.items() if f.kinds == ("float",)}


def _write_weights(
    model: CodedModel, config: ModelConfig, scheme: QuantScheme, directory: Path, progress: Progress
) -> None:
    """Write every tensor, floats in the narrowest type in which those of the form are exact."""
    matrices, vectors = table_names(config) | linear_names(config), vector_names(config)
    dtypes = _float_dtypes(model, scheme, list(matrices), vectors)
    modules = layout(config, scheme, lambda name: dtypes[name])
    owners = {tensor: name for name, tensors in modules.items() for tensor in tensors}
    made: dict[str, dict[str, np.ndarray]] = {}  # of the module at hand

    def pieces(tensor: str) -> list[np.ndarray]:
        name = owners[tensor]
        if name not in made:
            made.clear()
            made[name] = _tensors(model, name, scheme, dtypes)
        return [made[name][tensor]]

    def told(tensor: str, done: int, total: int) -> None:
        if progress:
            progress(f"writing {tensor}", total + done, 2 * total)

    write_shards(directory, plan_shards(modules), pieces, told)


def _float_dtypes(
    model: CodedModel, scheme: QuantScheme, matrices: list[str], vectors: dict[str, tuple[int]]
) -> dict[str, str]:
    """The type of every tensor that stays float.

    Forms that know float32 alone give norms back in what they came from, if all of them are exact there.
    """
    floats = {name: model.vector(name) for name in vectors}
    for name in matrices:
        if not scheme.kind(name).bits:
            matrix = model.matrix(name)
            if isinstance(matrix, np.ndarray):
                floats[f"{name}.weight"] = matrix
    wide = [values for values in floats.values() if values.dtype == np.float32]
    narrow = "BF16" if all(map(_is_bf16, wide)) else "F16" if all(map(_is_f16, wide)) else "F32"
    dtypes = {name: narrow if (dtype := stored_dtype(v)) == "F32" else dtype for name, v in floats.items()}
    return {f"{name}.weight": "F32" for name in matrices} | dtypes  # what is multiplied out


def _is_bf16(values: np.ndarray) -> bool:
    return all(np.array_equal(bf16_to_f32(f32_to_bf16(part)), part) for part in _blocks(values))


def _is_f16(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return all(np.array_equal(part.astype(np.float16), part) for part in _blocks(values))


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time."""
    for start in range(0, len(values), _ROWS):
        yield values[start : start + _ROWS]


def _tensors(model: CodedModel, name: str, scheme: QuantScheme, dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """A module's tensors by name."""
    if name in dtypes:
        values = as_stored(model.vector(name), dtypes[name])
        check_finite(name, values)
        return {name: values}
    kind, matrix = scheme.kind(name), model.matrix(name)
    if not kind.bits:
        values = as_stored(matrix.floats() if isinstance(matrix, Coded) else matrix, dtypes[f"{name}.weight"])
        check_finite(f"{name}.weight", values)
        return {f"{name}.weight": values}
    assert isinstance(matrix, Coded)
    coded, _ = with_positive_scales(name, matrix)
    assert coded is not None
    scales = scales_for(coded, kind.name)
    if kind.group_size is None and not name.startswith("model.layers."):
        scales = scales.reshape(-1)
    stored = scales if scheme.scale_dtype == "float32" else f32_to_bf16(scales)
    if kind.group_size is None:
        return {f"{name}.weight": coded.codes, f"{name}.weight_scale": stored}
    return {f"{name}.weight_packed": pack_int4(coded.codes), f"{name}.weight_scale": stored}


def _card(model: CodedModel, config: ModelConfig, taken: Taken, directory: Path, remark: str | None) -> str:
    made = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return model_card(CardFacts(
        source_name=model.path.resolve().name,
        source_path=model.path if model.path.is_dir() else directory,
        scheme=taken.scheme, kinds=describe_kinds(config, taken.scheme),
        method=f"codes and scales of {model.form}, taken over",
        scales="those of the tool that made them", is_measured=False, version=__version__,
        source_bytes=sum(path.stat().st_size for path in model.files), tensor_bytes=made,
        relative_error=None, worst=[], remark=remark,
    ))  # fmt: skip


def _write_metadata(model: CodedModel, taken: Taken, directory: Path) -> None:
    """Write llamita.json, with the hash of every file that is there."""
    sources = {path.name: sha256_file(path) for path in model.files}
    Metadata(
        llamita=__version__,
        scheme=taken.scheme,
        method=METHOD,
        settings={"form": model.form, "rotated": list(model.rotated)},
        seed=None,
        rotations=model.rotations,
        calibration=None,
        source=SourceRecord(str(model.path.resolve()), sources),
        float_layers=taken.float_layers,
        error=ErrorRecord(None, None, {}),
        files=file_table(directory),
    ).write(directory)
