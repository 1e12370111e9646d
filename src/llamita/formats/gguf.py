"""Read and write GGUF files: llama.cpp's container of metadata and tensors (ggml/docs/gguf.md, version 3).

The reader checks every count, length and offset against the file before it uses them, and maps the data. Integers and
floats are little-endian.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.system.files import map_file

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32  # weights that share a scale in Q4_0 and Q8_0
# `struct` formats of value types, in the order of their numbers; 8 is a string, 9 an array.
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")
_STRING, _ARRAY = 8, 9
_INT32, _UINT32, _FLOAT32, _BOOL = 5, 4, 6, 7
_DTYPES = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "", "", "<u8", "<i8", "<f8")
# Types of tensors: number, weights in a block, bytes of a block.
KINDS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "F64": (28, 1, 8),
    "Q4_0": (2, BLOCK, 18), "Q4_1": (3, BLOCK, 20), "Q5_0": (6, BLOCK, 22), "Q5_1": (7, BLOCK, 24),
    "Q8_0": (8, BLOCK, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, BLOCK, 18), "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, BLOCK, 17), "NVFP4": (40, 64, 36),
}  # fmt: skip
_NAMES = {number: name for name, (number, _, _) in KINDS.items()}
_MOST_DIMENSIONS = 4
_MOST_STRINGS = 1 << 20  # in an array: a Python string takes about 60 bytes, however short
_LARGEST_NAME = 4096
_LARGEST_ALIGNMENT = 1 << 16
_LONGEST = 100  # characters of a name from the file in a message


@dataclass(frozen=True)
class GgufTensor:
    """Hold a tensor as the file declares it; `start` and `stop` are byte offsets in the file."""

    kind: str
    shape: tuple[int, ...]  # outermost first, as in NumPy; the file has the reverse order
    start: int
    stop: int


class GgufFile:
    """Read a GGUF file; it is checked and mapped when opened.

    Attributes:
        values: metadata by key: numbers, texts, NumPy arrays of numbers, lists of texts.
        tensors: by name.
        header_bytes: how many bytes say all of these.

    Raises:
        InputError: the file breaks a rule of the format, or has a kind of tensor that is not known here.
        RunError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = map_file(path, len(MAGIC), "a GGUF file")
        self._at = 0
        try:
            self._read_header()
        except InputError as error:
            self._data.close()
            raise error.within(path.name) from None

    def read(self, name: str) -> np.ndarray:
        """Return a tensor's bytes: uint8 (rows, bytes of a row), or (bytes,) of a vector."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, tensor.stop - tensor.start, tensor.start)
        return flat.reshape(tensor.shape[0], -1) if len(tensor.shape) > 1 else flat

    def forget(self) -> None:
        """Let the system drop the pages that were read; arrays read them again on use."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Release the file; arrays from `read` keep it mapped until they are gone."""
        self.tensors = {}

    def _read_header(self) -> None:
        if self._take(len(MAGIC)) != MAGIC:
            raise InputError("header", "a GGUF file", "another beginning")
        version = self._number("<I")
        if version not in (2, VERSION):
            raise InputError("version", f"2 or {VERSION}", f"{version}")
        tensors, values = self._number("<Q"), self._number("<Q")
        self._check_count("tensors", tensors, 8 + 4 + 8 + 4 + 8)
        self._check_count("metadata", values, 8 + 4 + 1)
        self.values: dict[str, Any] = {}
        for _ in range(values):
            key = self._text(_LARGEST_NAME)
            if key in self.values:
                raise InputError(shown(key, _LONGEST), "once", "twice")
            self.values[key] = self._value(key)
        declared = [self._declared() for _ in range(tensors)]
        self.header_bytes = self._at
        self.tensors = self._placed(declared)

    def _declared(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._text(_LARGEST_NAME)
        count = self._number("<I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise InputError(shown(name, _LONGEST), f"1 to {_MOST_DIMENSIONS} dimensions", f"{count}")
        shape = tuple(self._number("<Q") for _ in range(count))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if number not in _NAMES:
            raise InputError(
                shown(name, _LONGEST),
                f"one of {', '.join(KINDS)}",
                f"ggml's type {number}",
                "try the model in F16, BF16 or Q8_0",
            )
        return name, _NAMES[number], shape, offset

    def _placed(self, declared: Iterable[tuple[str, str, tuple[int, ...], int]]) -> dict[str, GgufTensor]:
        alignment = self.values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= _LARGEST_ALIGNMENT or alignment % 8:
            raise InputError("general.alignment", "a multiple of 8", shown(alignment))
        begin = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in declared:
            _, block, width = KINDS[kind]
            count = math.prod(shape)
            if name in found or count <= 0 or shape[-1] % block or offset % alignment:
                raise InputError(
                    shown(name, _LONGEST),
                    f"once, in whole blocks of {block}, at a multiple of {alignment}",
                    f"{shape} at {offset}",
                )
            start = begin + offset
            stop = start + count // block * width
            if stop > len(self._data):
                raise InputError(
                    shown(name, _LONGEST),
                    f"within {len(self._data)} bytes",
                    f"an end at {stop}",
                    "is the file truncated?",
                )
            found[name] = GgufTensor(kind, shape, start, stop)
        ends = 0
        for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
            if tensor.start < ends:
                raise InputError(shown(name, _LONGEST), "separate data", "another tensor's")
            ends = tensor.stop
        return found

    def _value(self, key: str) -> Any:
        kind = self._number("<I")
        if kind == _STRING:
            return self._text(len(self._data))
        if kind != _ARRAY:
            return self._number(self._format(key, kind))
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            self._check_count(key, count, 8)
            if count > _MOST_STRINGS:
                raise InputError(key[:_LONGEST], f"at most {_MOST_STRINGS} texts", f"{count}")
            return [self._text(len(self._data)) for _ in range(count)]
        width = struct.calcsize(self._format(key, kind))
        self._check_count(key, count, width)
        return np.frombuffer(self._take(count * width), _DTYPES[kind])

    def _format(self, key: str, kind: int) -> str:
        if kind >= len(_SCALARS) or not _SCALARS[kind]:
            raise InputError(key[:_LONGEST], "a value, a text or an array of these", f"type {kind}")
        return _SCALARS[kind]

    def _check_count(self, what: str, count: int, width: int) -> None:
        left = len(self._data) - self._at
        if count * width > left:
            raise InputError(
                what[:_LONGEST],
                f"at most {left // width}, for which the file has room",
                f"{count}",
                "is it truncated or damaged?",
            )

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            raise InputError("text", f"at most {limit} bytes", f"{length}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise InputError("text", "UTF-8", "other bytes") from None

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise InputError("header", f"{count} bytes more at {self._at}", "the end of the file")
        data = self._data[self._at : self._at + count]
        self._at += count
        return data


def write_gguf(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Iterator[tuple[str, np.ndarray]],
) -> None:  # fmt: skip
    """Write a file, one tensor in memory at a time.

    Args:
        values: metadata: numbers (uint32, float32 or bool in the file), texts, lists of texts, arrays of
            int32 or float32.
        tensors: kind and shape by name, in the order of `data`.
        data: each tensor's name and its bytes, as an array of any type.
    """
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(values)))
        for key, value in values.items():
            _write_text(file, key)
            _write_value(file, value)
        offset = 0
        for name, (kind, shape) in tensors.items():
            number, block, width = KINDS[kind]
            _write_text(file, name)
            file.write(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset))
            offset += -(-math.prod(shape) // block * width // ALIGNMENT) * ALIGNMENT
        _pad(file)
        for (name, (kind, shape)), (given, array) in zip(tensors.items(), data, strict=True):
            _, block, width = KINDS[kind]
            assert name == given, f"{given} where {name} was declared"
            assert array.nbytes == math.prod(shape) // block * width, f"{name}: {array.nbytes} bytes"
            file.write(np.ascontiguousarray(array).data)
            _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _write_text(file: IO[bytes], text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<Q", len(data)) + data)


def _write_value(file: IO[bytes], value: Any) -> None:
    if isinstance(value, str):
        file.write(struct.pack("<I", _STRING))
        _write_text(file, value)
    elif isinstance(value, list):
        file.write(struct.pack("<IIQ", _ARRAY, _STRING, len(value)))
        for text in value:
            _write_text(file, text)
    elif isinstance(value, np.ndarray):
        number = {"i": _INT32, "f": _FLOAT32}[value.dtype.kind]
        file.write(struct.pack("<IIQ", _ARRAY, number, len(value)) + value.astype(_DTYPES[number]).tobytes())
    else:
        number = _BOOL if isinstance(value, bool) else _FLOAT32 if isinstance(value, float) else _UINT32
        file.write(struct.pack("<I", number) + struct.pack(_SCALARS[number], value))
