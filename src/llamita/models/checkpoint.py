"""A float Llama in Hugging Face form: config.json and safetensors, sharded or not, memory-mapped.

Also defines how weights travel between sources and engine (`Int4Weight`, `Int8Weight`, `ModelSource`).
Every tensor of the architecture is checked for name, dtype and shape before anything is computed.
"""

import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from llamita.errors import InputError, RunError
from llamita.formats.safetensors import DTYPES, TensorFile, TensorInfo
from llamita.imports.detect import form_of
from llamita.models.config import ModelConfig
from llamita.numerics.affine import to_f32
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import has, member, read_json

FLOAT_DTYPES = ("BF16", "F16", "F32")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_IGNORED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)  # old checkpoints; recomputed
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_MOST_NAMED = 3  # tensors named in one message
_FINITE_CHUNK = 2**22  # values tested at a time


@dataclass(frozen=True)
class Int4Weight:
    """A linear layer in int4: `packed` int32 (rows, columns/8), `scales` (rows, columns/group_size)."""

    packed: np.ndarray
    scales: np.ndarray  # float32, or uint16 holding bf16
    group_size: int


@dataclass(frozen=True)
class Int8Weight:
    """A table in int8 per channel: `codes` int8 (rows, columns), `scales` float32 or bf16 bits (rows,)."""

    codes: np.ndarray
    scales: np.ndarray


class ModelSource(Protocol):
    """Where the engine gets a model's weights; module names are those of Hugging Face, without `.weight`."""

    path: Path
    config: ModelConfig

    @property
    def scheme(self) -> QuantScheme | None:
        """How the weights are rounded, None for a float model."""
        ...

    @property
    def rotations(self) -> Rotations:
        """What was rotated in the weights, and what the engine has to do about it."""
        ...

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        """A linear layer or table; float ones as (rows, columns) float32, float16 or bf16 bits."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight as float32 (columns,); the name ends in `.weight`."""
        ...

    def bias(self, name: str) -> np.ndarray | None:
        """The bias of a module as float32 (rows,), None where the architecture has none."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


def resolve(name: str | Path) -> Path:
    """The directory of a model: "embedded", a directory, or a hub name, which is downloaded.

    Raises:
        InputError: neither a directory nor a possible hub name.
        RunError: the hub's model is gated, missing or out of reach.
    """
    if str(name) == "embedded":
        directory = Path(__file__).parents[1] / "embedded"
        if not has(directory, "config.json"):
            raise RunError("embedded: this installation has no embedded model; try installing llamita again")
        return directory
    path = Path(name)
    if os.path.exists(name):  # not Path.exists, which raises for a name that is too long
        if not os.path.isdir(name) and form_of(path) is None:
            raise InputError(f"{name}: expected a model directory, got a file")
    elif not str(name):
        raise InputError(
            "model: expected a model directory, 'embedded' or a hub name like owner/model, got ''"
        )
    elif not is_hub_name(name):
        raise InputError(f"{name}: expected a model directory, 'embedded' or a hub name like owner/model")
    else:
        path = import_module("llamita.imports.hub").download(name)
    if form_of(path) is not None:
        return import_module("llamita.imports.cache").converted(path)
    if has(path, "model.pte") and not has(path, "config.json"):
        raise InputError(
            f"{name}: expected a model, got an ExecuTorch program, which is not read back; "
            "try what it was exported from"
        )
    return path


def is_hub_name(name: str | Path) -> bool:
    """Whether this can be a model's name on the hub, owner/model, and is nothing on this disk."""
    return isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def linear_names(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear layer of the blocks: full module name to (rows, columns), in order of use."""
    shapes = config.linear_shapes()
    return {f"model.layers.{i}.{name}": shapes[name] for i in range(config.layers) for name in shapes}


def table_names(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Embedding and, where it is not tied to it, head: module name to (rows, columns)."""
    names = ["model.embed_tokens"] if config.tied else ["model.embed_tokens", "lm_head"]
    return {name: (config.vocab_size, config.hidden_size) for name in names}


def vector_names(config: ModelConfig) -> dict[str, tuple[int]]:
    """Norm weights and biases: full tensor name to (length,)."""
    names: dict[str, tuple[int]] = {}
    for i in range(config.layers):
        block = f"model.layers.{i}"
        names[f"{block}.input_layernorm.weight"] = (config.hidden_size,)
        names[f"{block}.post_attention_layernorm.weight"] = (config.hidden_size,)
        for linear, (rows, _) in config.linear_shapes().items():
            if config.has_bias(linear):
                names[f"{block}.{linear}.bias"] = (rows,)
    names["model.norm.weight"] = (config.hidden_size,)
    return names


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the float architecture: full name to shape."""
    matrices = {**table_names(config), **linear_names(config)}
    return {f"{name}.weight": shape for name, shape in matrices.items()} | vector_names(config)


def open_tensor_files(directory: Path) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """The safetensors files of a directory by name, and the file that holds each tensor.

    Raises:
        InputError: no such file, a bad index, or an index that disagrees with the files.
    """
    if has(directory, INDEX):
        index = read_json(directory, INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise InputError(f"{INDEX}: weight_map: expected tensor names with their files")
        names = sorted({str(file) for file in index.values()})
        if any(not file.endswith(".safetensors") for file in names):
            raise InputError(f"{INDEX}: weight_map: expected names of .safetensors files")
    elif has(directory, SINGLE):
        index, names = None, [SINGLE]
    else:
        raise InputError(f"{directory}: expected {SINGLE} or {INDEX}, found {_other_weights(directory)}")
    # member first: TensorFile would take the directory from a name like ../other/model.safetensors
    files = {file: TensorFile(member(directory, file)) for file in names}
    where = {tensor: file for file in names for tensor in files[file].tensors}
    if sum(len(file.tensors) for file in files.values()) != len(where):
        raise InputError(f"{INDEX}: a tensor lies in two files")
    if index is not None and index != where:
        wrong = sorted(t for t in index.keys() | where.keys() if index.get(t) != where.get(t))
        raise InputError(f"{INDEX}: disagrees with the files about {_some(wrong)}")
    return files, where


def _other_weights(directory: Path) -> str:
    """What is there instead, and what to do about it."""
    try:
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise RunError(f"{directory}: cannot be read: {error.strerror}") from None
    if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        return "pickled weights, which are not loaded; try the model's safetensors"
    return "GGUF; try the float model" if any(name.endswith(".gguf") for name in names) else "neither"


class Checkpoint:
    """A float model on disk; satisfies `ModelSource`.

    Raises:
        InputError: a file is missing or broken, the architecture is not supported, or a tensor is missing,
            unexpected, or of the wrong dtype or shape.
        RunError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if has(path, "adapter_config.json") and not has(path, "config.json"):
            raise InputError(f"{path}: expected a model, got adapters; try --adapter {path} with their base")
        self.hf_config = read_json(path, "config.json")
        self.config = ModelConfig.from_hf(self.hf_config)
        self.scheme, self.rotations = None, Rotations()
        if self.hf_config["model_type"] == "llamita":
            raise InputError(
                f"{path}: llamita.json: expected beside packed weights, found none; "
                "try copying the directory again, whole, or its float source"
            )
        if self.hf_config.get("quantization_config") is not None:
            raise InputError(
                f"{path}: config.json: quantization_config: expected a float model, got "
                f"{_method(self.hf_config['quantization_config'])}; try its source"
            )
        self.files, self._where = open_tensor_files(path)
        self._check()

    def _check(self) -> None:
        expected = expected_tensors(self.config)
        found = {name for name in self._where if not _IGNORED.fullmatch(name)}
        if self.config.tied and "lm_head.weight" in found:
            self._check_tied_head()
            found.remove("lm_head.weight")
        check_names(set(expected), found, "is tie_word_embeddings right?")
        for name, shape in expected.items():
            info = self.info(name)
            if info.dtype not in FLOAT_DTYPES:
                raise InputError(
                    f"{name}: dtype: expected one of {', '.join(FLOAT_DTYPES)}, got {info.dtype}"
                )
            if info.shape != shape:
                raise InputError(f"{name}: shape: expected {shape} from config.json, got {info.shape}")

    def _check_tied_head(self) -> None:
        """Some tools write the tied head a second time; a different one would be silently lost."""
        table, head = self._read("model.embed_tokens.weight"), self._read("lm_head.weight")
        same = table.shape == head.shape and table.dtype == head.dtype
        for start in range(
            0, len(table) if same and table.ndim == 2 else 0, 1024
        ):  # rows: a few MB at a time
            same = same and np.array_equal(table[start : start + 1024], head[start : start + 1024])
        if not same:
            raise InputError(
                "lm_head.weight: expected the embedding again (tie_word_embeddings is true), got other "
                "values; try tie_word_embeddings: false in config.json"
            )

    def info(self, tensor: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, by its full name."""
        return self.files[self._where[tensor]].tensors[tensor]

    def _read(self, tensor: str) -> np.ndarray:
        if tensor not in self._where:
            raise InputError(f"{tensor}: expected in {self.path}, found none")
        return self.files[self._where[tensor]].read(tensor)

    def weight(self, name: str) -> np.ndarray:
        """(rows, columns) float32, float16 or bf16 bits, on the mapped file."""
        return self._read(f"{name}.weight")

    def vector(self, name: str) -> np.ndarray:
        """(length,) float32."""
        return to_f32(self.stored_vector(name))

    def stored_vector(self, name: str) -> np.ndarray:
        """(length,) as stored, found finite."""
        vector = self._read(name)
        check_finite(name, vector)
        return vector

    def bias(self, name: str) -> np.ndarray | None:
        """(rows,) float32, None where the architecture has none."""
        return self.vector(f"{name}.bias") if self.config.has_bias(name.split(".", 3)[-1]) else None

    def close(self) -> None:
        """Unmap the files."""
        for file in self.files.values():
            file.close()


def _method(quantization: object) -> str:
    """The name of a way to quantize, from a stranger's file."""
    named = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return repr(named)[:40] if named else "a quantized one"


def check_names(expected: set[str], found: set[str], hint: str) -> None:
    """Raise InputError naming tensors that are missing or unexpected; `hint` goes with a missing head."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        try_this = f"; {hint}" if missing[0].startswith("lm_head") else ""
        raise InputError(f"{_some(missing)}: expected by config.json, missing from the files{try_this}")
    if extra:
        raise InputError(f"{_some(extra)}: unexpected for the architecture in config.json")


def check_finite(name: str, array: np.ndarray, first_row: int = 0) -> None:
    """Raise InputError at the first NaN or infinity, with its place; `first_row` is added to its row."""
    rows = array.reshape(len(array), -1)
    step = max(1, _FINITE_CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        bad = _not_finite(rows[start : start + step])
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            place = f"row {first_row + start + row}, column {column}"
            raise InputError(
                f"{name}: expected finite weights, got NaN or infinity at {place}; the checkpoint is damaged"
            )


def _not_finite(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        return (array & np.uint16(0x7F80)) == 0x7F80  # bf16: all exponent bits set
    return ~np.isfinite(array)


def transform_dtype(rotations: Rotations) -> str | None:
    """The safetensors name of the dtype of the head's transform, None where there is none."""
    transform = rotations.head_transform
    return None if transform is None else stored_dtype(transform)


def stored_dtype(array: np.ndarray) -> str:
    """The safetensors name of an array's dtype; uint16 means bf16."""
    return next(name for name in ("BF16", *DTYPES) if np.dtype(DTYPES[name]) == array.dtype)


def _some(names: list[str]) -> str:
    """A few names for a message; the first is the one to look at."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(repr(name)[1:-1] for name in names[:_MOST_NAMED]) + more
