"""Read and write safetensors files without Torch.

The reader checks everything before use and maps the data, so that a file costs no memory; bf16 becomes uint16 bits.
The writer writes the header first, from declared shapes, then the data piece by piece, so that memory holds one piece.
Format: 8 bytes header length, JSON header, data without holes (huggingface.co/docs/safetensors).
"""

import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.system.files import LARGEST_JSON, map_file, parse_json, safe_path

# NumPy has no bf16 and no float8: these are integers with their bits.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
_LENGTH_BYTES = 8
_ALIGNMENT = 64  # bytes, of the first tensor in files that we write: a cache line and an AVX-512 register
_MOST_DIMENSIONS = 8
_LARGEST_DIMENSION = 2**40


@dataclass(frozen=True)
class TensorInfo:
    """Hold a tensor as the header declares it; `start` and `stop` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """Read a safetensors file; it is checked and memory-mapped when opened.

    Raises:
        InputError: the file breaks a rule of the format; the message names the rule and the tensor.
        RunError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = safe_path(path.parent, path.name)
        self._map: mmap.mmap | None = map_file(self.path, _LENGTH_BYTES, "a safetensors file")
        self.tensors, self.metadata = _read_header(self._map, path.name)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor as a read-only array on the mapped file; copy it only if it is not aligned."""
        assert self._map is not None, f"{self.path} is closed"
        info = self.tensors[name]
        array = np.ndarray(info.shape, DTYPES[info.dtype], self._map, info.start)
        return array if array.flags.aligned else array.copy()

    def forget(self) -> None:
        """Let the system drop the pages that were read; arrays read them again on use."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Release the file; it stays mapped until its last array is gone.

        Never call `mmap.close()`: NumPy holds a reference to the map but no lock on it, and reading an array on a
        closed map crashes the process.
        """
        self._map = None


def _read_header(data: mmap.mmap, where: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return the tensors by name, and the file's metadata."""
    size, length = len(data), int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > LARGEST_JSON:
        raise InputError(f"{where}: header", f"at most {LARGEST_JSON} bytes", f"{length}")
    if length > size - _LENGTH_BYTES:
        raise InputError(f"{where}: header", f"{length} bytes", f"a file of {size}", "is it truncated?")
    begin = _LENGTH_BYTES + length
    header = parse_json(data[_LENGTH_BYTES:begin], f"{where}: header")
    metadata = header.pop("__metadata__", None)
    tensors = {name: _tensor_info(values, begin, f"{where}: {name!r}") for name, values in header.items()}
    position = begin
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise InputError(f"{where}: {name!r}: data_offsets: {kind}")
        position = info.stop
    if position != size:
        raise InputError(where, f"{position} bytes from its header", f"{size}", "is it truncated?")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor_info(values: Any, begin: int, where: str) -> TensorInfo:
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise InputError(where, "the keys dtype, shape and data_offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: dtype", f"one of {', '.join(DTYPES)}", shown(dtype))
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS or max(shape, default=0) > _LARGEST_DIMENSION:
        raise InputError(f"{where}: shape", "a list of sizes", shown(shape))
    if not _are_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: data_offsets", "two offsets", shown(offsets))
    start, stop = offsets
    expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if stop - start != expected:
        raise InputError(where, f"{expected} bytes from its shape", f"{stop - start}")
    return TensorInfo(dtype, tuple(shape), begin + start, begin + stop)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


class TensorWriter:
    """Write a safetensors file: the declared tensors in their order, each in one or more pieces of rows.

    Args:
        path: a file that does not exist yet.
        tensors: name to (dtype as in `DTYPES`, shape), in the order of writing.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        header, self._pieces = _make_header(tensors)
        self._name, self._left, self._dtype = "", 0, np.dtype("u1")
        self._digest = hashlib.sha256()
        self.size = 0
        self._file = path.open("xb")
        self._put(header)

    def write(self, name: str, array: np.ndarray) -> None:
        """Append a piece of the current tensor."""
        if not self._left and self._pieces:
            self._name, self._dtype, self._left = self._pieces.pop(0)
        if name != self._name or array.dtype != self._dtype or array.nbytes > self._left:
            due = f"{self._left} bytes of {self._name} {self._dtype}"
            raise ValueError(f"expected {due}, got {array.nbytes} of {name} {array.dtype}")
        self._left -= array.nbytes
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def finish(self) -> str:
        """Flush to the disk and close; return the SHA-256 of the written bytes in hexadecimal."""
        if self._left or any(size for _, _, size in self._pieces):
            raise ValueError(f"expected {self._left} more bytes of {self._name}, then {self._pieces[:1]}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file unfinished."""
        self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.size += len(data)


def _make_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[tuple[str, np.dtype, int]]]:
    """Return the header's bytes, and name, dtype and size of each tensor in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    pieces, position = [], 0
    for name, (dtype, shape) in tensors.items():
        item = np.dtype(DTYPES[dtype])
        size = math.prod(shape) * item.itemsize
        # Readers that map the file, such as safetensors itself, need every tensor aligned.
        assert position % item.itemsize == 0, f"{name} would not be aligned"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        pieces.append((name, item, size))
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, pieces


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes before the data in a file of these tensors."""
    return len(_make_header(tensors)[0])
