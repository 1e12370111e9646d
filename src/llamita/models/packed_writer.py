"""Writes what a packed directory holds: tensors in shards as they come, small files, llamita.json last.

Memory stays at one piece of a tensor and the scales that wait for their turn.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import RunError
from llamita.formats.safetensors import TensorWriter, header_bytes
from llamita.models.checkpoint import INDEX, SINGLE
from llamita.models.config import ModelConfig
from llamita.models.packed import METADATA, Tensors, int8_tables, quantization_config, tensor_bytes
from llamita.numerics.affine import f32_to_bf16
from llamita.numerics.packing import CODES_PER_WORD
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import is_companion, read_bytes

SHARD_BYTES = 5_000_000_000  # Hugging Face's own bound
_LARGEST_COMPANION = 128 * 2**20  # bytes; the largest tokenizer.json of a Llama takes 17 MB
FileTable = dict[str, dict[str, Any]]  # name to {"size": bytes, "sha256": hexadecimal}


def plan_shards(modules: dict[str, Tensors], shard_bytes: int = SHARD_BYTES) -> dict[str, Tensors]:
    """File name to its tensors in the order of the file; a module is never divided."""
    shards: list[Tensors] = [{}]
    for tensors in modules.values():
        if shards[-1] and tensor_bytes(shards[-1]) + tensor_bytes(tensors) > shard_bytes:
            shards.append({})
        shards[-1] |= tensors
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return {name: dict(sorted(shard.items(), key=_place)) for name, shard in zip(names, shards, strict=True)}


def _place(item: tuple[str, tuple[str, tuple[int, ...]]]) -> int:
    """Keeps every tensor aligned: 8-byte numbers first; one 2-byte scale for each row, as int8 has, whose
    rows may be odd in number, last; whatever lies between is a multiple of 4 bytes."""
    name, (dtype, shape) = item
    return 0 if dtype == "I64" else 2 if name.endswith("_scale") and math.prod(shape[1:]) == 1 else 1


def total_bytes(shards: dict[str, Tensors]) -> int:
    """Size of the weight files on disk, headers included."""
    return sum(header_bytes(tensors) + tensor_bytes(tensors) for tensors in shards.values())


class PackedWriter:
    """Writes the weight files of a packed directory; `put` takes modules in the order of the layout.

    `weight_shape` tensors follow from the layout and are not put.
    """

    def __init__(self, directory: Path, shards: dict[str, Tensors]) -> None:
        self._directory = directory
        self._shards = shards
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._todo = list(shards)
        self._order: list[str] = []
        self._left: dict[str, int] = {}
        self._writer: TensorWriter | None = None
        self.files: FileTable = {}

    def put(self, name: str, piece: np.ndarray) -> None:
        """A piece of rows of a tensor; pieces of one tensor come in order, tensors in any within a shard."""
        writer = self._writer or self._open_next()
        self._waiting.setdefault(name, []).append(piece)
        while self._order and self._order[0] in self._waiting:
            due = self._order[0]
            for part in self._waiting.pop(due):
                writer.write(due, part)
                self._left[due] -= part.nbytes
            if self._left[due]:
                return
            self._order.pop(0)
        if not self._order:
            self._close()

    def finish(self) -> None:
        """Check that every tensor came, and write the index if there are several files."""
        if self._todo or self._order or self._waiting:
            raise ValueError(f"expected more tensors: {(self._order or list(self._waiting) or self._todo)[0]}")
        if len(self._shards) > 1:
            weight_map = {tensor: file for file, tensors in self._shards.items() for tensor in tensors}
            total = sum(tensor_bytes(tensors) for tensors in self._shards.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.files[INDEX] = write_json(self._directory / INDEX, index)

    def abandon(self) -> None:
        """Close the file that was being written."""
        if self._writer is not None:
            self._writer.abandon()

    def _open_next(self) -> TensorWriter:
        tensors = self._shards[self._todo[0]]
        self._writer = writer = TensorWriter(self._directory / self._todo[0], tensors)
        self._order = list(tensors)
        self._left = {name: tensor_bytes({name: tensor}) for name, tensor in tensors.items()}
        while self._order and self._order[0].endswith(".weight_shape"):  # they follow from the layout
            name = self._order.pop(0)
            rows, words = tensors[name.replace("weight_shape", "weight_packed")][1]
            writer.write(name, np.array([rows, words * CODES_PER_WORD], np.int64))
        return writer

    def _close(self) -> None:
        assert self._writer is not None
        digest = self._writer.finish()
        self.files[self._todo.pop(0)] = {"size": self._writer.size, "sha256": digest}
        self._writer = None


def write_shards(
    directory: Path, shards: dict[str, Tensors], pieces: Callable[[str], Iterable[np.ndarray]],
    progress: Callable[[str, int, int], None] | None = None,
) -> FileTable:  # fmt: skip
    """Write every tensor of these files in their order; their table.

    Args:
        pieces: a tensor's rows, some at a time; `weight_shape` tensors are not asked for.
    """
    writer = PackedWriter(directory, shards)
    names = [name for shard in shards.values() for name in shard]
    try:
        for done, name in enumerate(names):
            if progress:
                progress(name, done, len(names))
            if not name.endswith(".weight_shape"):  # which the writer knows
                for piece in pieces(name):
                    writer.put(name, piece)
        writer.finish()
    finally:
        writer.abandon()
    return writer.files


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; its record for llamita.json."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a JSON object, one key a line; its record for llamita.json."""
    return write_bytes(path, _json(value))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_config(
    directory: Path, hf_config: dict[str, Any], scheme: QuantScheme, rotations: Rotations
) -> dict[str, Any]:
    """The source's config.json with the scheme added, so that transformers opens it right or not at all."""
    dropped = ("torch_dtype", "auto_map")  # the old name of dtype; code of a repository, which no Llama needs
    values = {key: value for key, value in hf_config.items() if key not in dropped}
    values["dtype"] = "float32"  # else transformers would round FP32 scales to bf16
    config = ModelConfig.from_hf(hf_config)
    if int8_tables(config, scheme) or rotations.is_online:
        # transformers would read the int8 codes of a table as weights and only warn, and leave out what
        # rotations need at run time; it knows no such type.
        values |= {"model_type": "llamita", "architectures": ["LlamitaForCausalLM"]}
    values["quantization_config"] = quantization_config(config, scheme)
    return write_json(directory / "config.json", values)


def stored_rotations(rotations: Rotations) -> Rotations:
    """Rotations as they are stored: the head's transform in bf16 (docs/reference/numerics.md has what that costs)."""
    transform = rotations.head_transform
    if transform is None or transform.dtype != np.float32:
        return rotations
    return replace(rotations, head_transform=f32_to_bf16(transform))


def write_metadata(directory: Path, values: dict[str, Any]) -> None:
    """llamita.json: `values` after a line with the hash of all other bytes of the file."""
    rest = _json(values).removeprefix(b"{\n")
    digest = hashlib.sha256(b"{\n" + rest).hexdigest()
    write_bytes(directory / METADATA, b'{\n  "self_sha256": "' + digest.encode() + b'",\n' + rest)


def find_companions(source: Path) -> dict[str, str]:
    """Files of the source that travel with the weights, and their names beside them; each can be read.

    Directories are left out: LICENSES/ of the REUSE layout holds the licences of a repository's code.

    Raises:
        InputError, RunError: one is too large, a link that leads elsewhere, or may not be read.
    """
    try:
        names = sorted(name for name in os.listdir(source) if not os.path.isdir(source / name))
    except OSError as error:
        raise RunError(f"{source}: cannot be read: {error.strerror}") from None
    found = {name: name for name in names if is_companion(name)}
    if "README.md" in names and "SOURCE_README.md" not in found:
        found["README.md"] = "SOURCE_README.md"
    for name in found:
        read_bytes(source, name, _LARGEST_COMPANION)  # now, not after the weights have been rounded
    return found


def copy_companions(source: Path, directory: Path, names: dict[str, str]) -> FileTable:
    """Copy tokenizer, chat template, licence, use policy and attribution; the card by another name."""
    return {
        new: write_bytes(directory / new, read_bytes(source, name, _LARGEST_COMPANION)) for name, new in names.items()
    }
