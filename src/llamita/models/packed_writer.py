"""Write the files of a packed model: tensors in shards as they come, config.json, and the source's small files.

Memory holds one piece of a tensor, and scales that wait for their turn. llamita.json follows (`metadata.py`).
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.formats.safetensors import TensorWriter, header_bytes
from llamita.models.checkpoint import INDEX, SINGLE
from llamita.models.config import ModelConfig
from llamita.models.families import own_values, packed_type
from llamita.models.packed import Tensors, int8_tables, quantization_config, tensor_bytes
from llamita.models.weights import FloatSource
from llamita.numerics.affine import f32_to_bf16
from llamita.numerics.packing import CODES_PER_WORD
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import FileTable, is_companion, read_bytes, read_json, unreadable, write_bytes, write_json
from llamita.system.progress import Progress

SHARD_BYTES = 5_000_000_000  # Hugging Face's bound
_LARGEST_COMPANION = 128 * 2**20  # bytes; the largest tokenizer.json of a Llama takes 17 MB


def plan_shards(modules: dict[str, Tensors], shard_bytes: int = SHARD_BYTES) -> dict[str, Tensors]:
    """Return the tensors of each file, by its name and in its order; a module is never divided."""
    shards: list[Tensors] = [{}]
    for tensors in modules.values():
        if shards[-1] and tensor_bytes(shards[-1]) + tensor_bytes(tensors) > shard_bytes:
            shards.append({})
        shards[-1] |= tensors
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return {name: dict(sorted(shard.items(), key=alignment_order)) for name, shard in zip(names, shards, strict=True)}


def alignment_order(tensor: tuple[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return a tensor's place in its file (name, (dtype, shape)), which keeps the next one aligned to its elements."""
    name, (dtype, shape) = tensor
    if dtype == "I64":
        return 0  # first: 8-byte elements need a multiple of 8 before them
    if name.endswith("_scale") and math.prod(shape[1:]) == 1:
        return 2  # last: one bf16 scale a row, as int8 has; an odd number of rows ends at an odd multiple of 2
    return 1  # between: every other tensor is a multiple of 4 bytes long


def total_bytes(shards: dict[str, Tensors]) -> int:
    """Return the size of the weight files on disk, headers included."""
    return sum(header_bytes(tensors) + tensor_bytes(tensors) for tensors in shards.values())


class PackedWriter:
    """Write the weight files of a packed model; `put` takes modules in the order of the layout.

    Do not put `weight_shape` tensors: they follow from the layout.
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
        """Take some rows of a tensor: its pieces in order, the tensors of a shard in any order."""
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
        """Check that every tensor came; write the index if there are several files."""
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
        while self._order and self._order[0].endswith(".weight_shape"):
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
    progress: Progress = None,
) -> FileTable:  # fmt: skip
    """Write every tensor of these files in their order; return the table of the files.

    Args:
        pieces: gives a tensor's rows, some at a time; it is not called for `weight_shape` tensors.
    """
    writer = PackedWriter(directory, shards)
    names = [name for shard in shards.values() for name in shard]
    try:
        for done, name in enumerate(names):
            if progress:
                progress(name, done, len(names))
            if not name.endswith(".weight_shape"):
                for piece in pieces(name):
                    writer.put(name, piece)
        writer.finish()
    finally:
        writer.abandon()
    return writer.files


def write_config(
    directory: Path, hf_config: dict[str, Any], scheme: QuantScheme, rotations: Rotations
) -> dict[str, Any]:
    """Write the source's config.json with the scheme, so that transformers opens the model correctly or refuses it."""
    dropped = ("torch_dtype", "auto_map")  # the old name of dtype; code of a repository, which no Llama needs
    config = ModelConfig.from_hf(hf_config)
    values = {key: value for key, value in own_values(hf_config, config.family).items() if key not in dropped}
    values["dtype"] = "float32"  # otherwise transformers would round FP32 scales to bf16
    if int8_tables(config, scheme) or rotations.acts_at_run_time:
        # transformers would take a table's int8 codes for weights with only a warning, and leave out run-time
        # rotations. A type that it does not know makes it refuse.
        values |= {"model_type": packed_type(config.family), "architectures": ["LlamitaForCausalLM"]}
    values["quantization_config"] = quantization_config(config, scheme)
    return write_json(directory / "config.json", values)


def stored_rotations(rotations: Rotations) -> Rotations:
    """Return the rotations with the head's transform in bf16, as it is stored (cost: docs/reference/numerics.md)."""
    transform = rotations.head_transform
    if transform is None or transform.dtype != np.float32:
        return rotations
    return replace(rotations, head_transform=f32_to_bf16(transform))


def find_companions(source: Path) -> dict[str, str]:
    """Return the source's files that are copied next to the weights, with their new names; check that each can be read.

    Directories are left out: LICENSES/ of the REUSE layout holds the licences of a repository's code.

    Raises:
        InputError, RunError: a file is too large, is a link that leads elsewhere, or may not be read.
    """
    try:
        names = sorted(name for name in os.listdir(source) if not os.path.isdir(source / name))
    except OSError as error:
        raise unreadable(source, error) from None
    found = {name: name for name in names if is_companion(name)}
    if "README.md" in names and "SOURCE_README.md" not in found:
        found["README.md"] = "SOURCE_README.md"
    for name in found:
        read_bytes(source, name, _LARGEST_COMPANION)  # now, not after the weights have been rounded
    return found


def copy_config(source: FloatSource, directory: Path) -> None:
    """Write config.json for the tensors that a source gives: the file's own bytes, unless reading rewrote it."""
    if read_json(source.path, "config.json") == source.hf_config:
        write_bytes(directory / "config.json", read_bytes(source.path, "config.json"))
    else:
        write_json(directory / "config.json", source.hf_config)


def copy_companions(source: Path, directory: Path, names: dict[str, str]) -> FileTable:
    """Copy tokenizer, chat template, licence, use policy and attribution, and the card under another name."""
    return {
        new: write_bytes(directory / new, read_bytes(source, name, _LARGEST_COMPANION)) for name, new in names.items()
    }
