"""Read a float Llama in Hugging Face's format: config.json and safetensors, sharded or not, memory-mapped.

Every tensor of the architecture is checked for name, dtype and shape before anything is computed. Weights in FP8 are
widened to float32 as they are read.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llamita.errors import InputError, LlamitaError, shown
from llamita.formats.safetensors import DTYPES, TensorFile, TensorInfo
from llamita.models.config import ModelConfig
from llamita.models.families import PACKED, plain_config
from llamita.models.float8 import add_scales, is_float8, read_float8
from llamita.models.layout import Piece, layout_of
from llamita.models.names import EMBEDDING, HEAD, expected_tensors
from llamita.models.weights import FLOAT_DTYPES, WeightFile, check_finite, pieces_of
from llamita.numerics.affine import F32, to_f32
from llamita.numerics.float8 import FLOAT8, widen
from llamita.numerics.rotations import Rotations
from llamita.system.files import exists_in, read_json, safe_path, unreadable

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # in old checkpoints; recomputed
_MOST_NAMED = 3  # tensors named in one message
_ROWS = 1024  # of two tables compared at a time: a few MB


def open_tensor_files(directory: Path) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """Return the safetensors files of a directory by name, and the name of the file that holds each tensor.

    Raises:
        InputError: there is no such file, or the index is damaged or disagrees with the files.
    """
    if exists_in(directory, INDEX):
        index = read_json(directory, INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise InputError(f"{INDEX}: weight_map", "tensor names with their files")
        names = sorted({str(file) for file in index.values()})
        if any(not file.endswith(".safetensors") for file in names):
            raise InputError(f"{INDEX}: weight_map", "names of .safetensors files")
    elif exists_in(directory, SINGLE):
        index, names = None, [SINGLE]
    else:
        raise _no_weights(directory)
    # `safe_path` first: TensorFile would accept a name like ../other/model.safetensors
    files = {file: TensorFile(safe_path(directory, file)) for file in names}
    where = {tensor: file for file in names for tensor in files[file].tensors}
    if sum(len(file.tensors) for file in files.values()) != len(where):
        raise InputError(f"{INDEX}: a tensor is in two files")
    if index is not None and index != where:
        wrong = sorted(t for t in index.keys() | where.keys() if index.get(t) != where.get(t))
        raise InputError(f"{INDEX}: disagrees with the files about {_some(wrong)}")
    return files, where


def _no_weights(directory: Path) -> LlamitaError:
    """Return the error for a directory without safetensors; it names other weights there, with a hint."""
    try:
        endings = {path.suffix for path in directory.iterdir()}
    except OSError as error:
        return unreadable(directory, error)
    got, hint = "neither", None
    if endings & {".bin", ".pth", ".pt"}:
        got, hint = "pickled weights", "try llamita import, or the model's safetensors"
    elif ".gguf" in endings:
        got, hint = "GGUF", "try the float model"
    return InputError(str(directory), f"{SINGLE} or {INDEX}", got, hint)


class StoredTensors:
    """Read tensors by name, whichever file they are in: the shared part of readers of model directories."""

    path: Path
    files: Mapping[str, WeightFile]
    _where: dict[str, str]  # tensor to file

    def info(self, tensor: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor, by its full name."""
        return self.files[self._where[tensor]].tensors[tensor]

    def _read(self, tensor: str) -> np.ndarray:
        if tensor not in self._where:
            raise InputError(tensor, f"in {self.path}", "none")
        return self.files[self._where[tensor]].read(tensor)

    def close(self) -> None:
        """Unmap the files."""
        for file in self.files.values():
            file.close()


class Checkpoint(StoredTensors):
    """Read a float model on disk; satisfies `FloatSource` and `ModelSource`.

    Raises:
        InputError: a file is missing or damaged, the architecture is not supported, or a tensor is missing,
            unexpected, or of the wrong dtype or shape.
        RunError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if exists_in(path, "adapter_config.json") and not exists_in(path, "config.json"):
            raise InputError(str(path), "a model", "adapters", f"try --adapter {path} with their base")
        if path.is_dir() and not exists_in(path, "config.json"):
            raise InputError(str(path), "a model directory", "one without config.json")
        stored = read_json(path, "config.json")
        self.hf_config = dict(plain_config(stored))
        own = self.hf_config.pop("quantization_config", None)
        quantization = stored.get("quantization_config") or own  # a model of text and images may have it with its text
        self.config = ModelConfig.from_hf(self.hf_config)
        self.scheme, self.rotations = None, Rotations()
        if self.hf_config["model_type"].startswith(PACKED):
            raise InputError(
                f"{path}: llamita.json",
                "next to packed weights",
                "none",
                "try copying the directory again, whole, or its float source",
            )
        if quantization is not None and not is_float8(quantization):
            raise InputError(
                f"{path}: config.json: quantization_config", "a float model", _method(quantization), "try its source"
            )
        float8 = None if quantization is None else read_float8(quantization)
        self.files, self._where = open_tensor_files(path)
        self._layout, self._was_cast = layout_of(stored, self._where), float8 is None
        if float8 is not None:
            infos = {name: info for file in self.files.values() for name, info in file.tensors.items()}
            self._layout = add_scales(self._layout, expected_tensors(self.config), infos, float8)
        self._check()

    def _check(self) -> None:
        expected = expected_tensors(self.config)
        found = {name for name in self._where if not (_IGNORED.fullmatch(name) or self._layout.is_ignored(name))}
        if self.config.tied and f"{HEAD}.weight" in found:
            self._check_tied_head()
            found.remove(f"{HEAD}.weight")
        needed = {stored for name in expected for stored in self._layout.piece(name).needed}
        check_names(needed, found, "is tie_word_embeddings right?")
        for name, shape in expected.items():
            info = self.info(name)
            if info.dtype not in FLOAT_DTYPES:
                raise InputError(f"{name}: dtype", f"one of {', '.join(FLOAT_DTYPES)}", info.dtype)
            if info.shape != shape:
                raise InputError(f"{name}: shape", f"{shape} from config.json", f"{info.shape}")

    def _check_tied_head(self) -> None:
        """Check that a tied head, which some tools write again, is the embedding: another would be silently lost."""
        table, head = (super(Checkpoint, self)._read(f"{name}.weight") for name in (EMBEDDING, HEAD))
        same = table.shape == head.shape and table.dtype == head.dtype
        for start in range(0, len(table) if same and table.ndim == 2 else 0, _ROWS):
            same = same and np.array_equal(table[start : start + _ROWS], head[start : start + _ROWS])
        if not same:
            raise InputError(
                f"{HEAD}.weight",
                "the embedding again (tie_word_embeddings is true)",
                "other values",
                "try tie_word_embeddings: false in config.json",
            )

    def info(self, tensor: str) -> TensorInfo:
        """Return dtype and shape in which `weight` and `stored_vector` give a tensor of the architecture."""
        piece = self._layout.piece(tensor)
        info = super().info(piece.stored)
        info = replace(info, shape=piece.shape(info.shape))
        is_widened = info.dtype in FLOAT8 and (piece.scale is not None or self._was_cast)
        is_scaled = piece.factor != 1.0 and info.dtype in FLOAT_DTYPES
        return replace(info, dtype="F32") if is_widened or is_scaled else info

    def remark(self) -> str | None:
        """Say what a user should know of the weights before they are rounded; None if nothing."""
        return None

    def stored_bytes(self) -> int:
        """Return the bytes that the architecture's tensors take in the files, scales of FP8 included."""
        pieces = map(self._layout.piece, expected_tensors(self.config))
        infos = [super(Checkpoint, self).info(stored) for stored in {name for piece in pieces for name in piece.needed}]
        return sum(info.stop - info.start for info in infos)

    def made_bytes(self) -> int:
        """Return the bytes of the matrices that are made as they are read, so that no file holds them in memory."""
        matrices = [tensor for tensor, shape in expected_tensors(self.config).items() if len(shape) > 1]
        infos = [self.info(tensor) for tensor in matrices if not self._is_mapped(tensor)]
        return sum(np.dtype(DTYPES[info.dtype]).itemsize * math.prod(info.shape) for info in infos)

    def _is_mapped(self, tensor: str) -> bool:
        piece = self._layout.piece(tensor)
        return piece.factor == 1.0 and super().info(piece.stored).dtype not in FLOAT8

    def _read(self, tensor: str) -> np.ndarray:
        piece = self._layout.piece(tensor)
        values = super()._read(piece.stored)
        values = values if piece.rows is None else values[slice(*piece.rows)]
        dtype = super().info(piece.stored).dtype
        if dtype in FLOAT8:
            first_row = 0 if piece.rows is None else piece.rows[0]
            values = widen(values, dtype, self._scales(piece), piece.block or (1, 1), first_row)
        return piece.scaled(values)

    def _scales(self, piece: Piece) -> F32 | None:
        """Return the scales of an FP8 matrix (row blocks, column blocks), None if it has none."""
        if piece.scale is None or piece.block is None:
            return None
        scales = to_f32(super()._read(piece.scale))
        if not (np.isfinite(scales) & (scales >= 0)).all():  # a block of zeros may have 0
            raise InputError(piece.scale, "finite scales, none below 0", "others", "the checkpoint is damaged")
        columns = super().info(piece.stored).shape[1]
        return scales.reshape(-1, -(-columns // piece.block[1]))

    def weight(self, name: str) -> np.ndarray:
        """Return a matrix (rows, columns), float32, float16 or bf16 bits; mapped unless it is made as it is read."""
        return self._read(f"{name}.weight")

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a matrix in pieces of rows, each with the number of its first row."""
        return pieces_of(self.weight(name))

    def vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias, float32 (length,)."""
        return to_f32(self.stored_vector(name))

    def stored_vector(self, name: str) -> np.ndarray:
        """Return a norm's weight or a bias (length,) as it is stored; check that it is finite."""
        vector = self._read(name)
        check_finite(name, vector)
        return vector


def _method(quantization: object) -> str:
    """Return the name of the quantization method in config.json."""
    named = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return shown(named, 40) if named else "a quantized one"


def check_names(expected: set[str], found: set[str], hint: str) -> None:
    """Raise InputError with the names of missing or unexpected tensors; `hint` is for a missing head."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        try_this = hint if missing[0].startswith(HEAD) else None
        raise InputError(_some(missing), "by config.json, missing from the files", hint=try_this)
    if extra:
        raise InputError(f"{_some(extra)}: unexpected for the architecture in config.json")


def _some(names: list[str]) -> str:
    """Return the first few names, for a message."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(repr(name)[1:-1] for name in names[:_MOST_NAMED]) + more
