"""The safetensors reader and writer: against the safetensors package, and against files that break a rule."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.errors import InputError
from llamita.formats.safetensors import DTYPES, TensorFile, TensorWriter, header_bytes

TENSORS = {
    "a": np.arange(6, dtype=np.int64).reshape(2, 3),
    "b": np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2),
    "c": np.arange(4, dtype=np.int8),
}
DECLARED = {"a": ("I64", (2, 3)), "b": ("F32", (4, 2)), "c": ("I8", (4,))}


def write(path: Path) -> str:
    writer = TensorWriter(path, DECLARED)
    for name, array in TENSORS.items():
        writer.write(name, array)
    return writer.finish()


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_we_read_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    extra = {**TENSORS, "scalar": np.array(3.5), "empty": np.zeros((0, 4), np.float16), "flag": np.array([True])}
    safetensors.numpy.save_file(extra, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.tensors.keys() == extra.keys()
    for name, array in extra.items():
        np.testing.assert_array_equal(file.read(name), array)
    file.close()


@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "I8"]), st.integers(1, 5), st.integers(1, 5)), max_size=5))
@settings(max_examples=30, deadline=None)
def test_what_is_written_in_pieces_is_read_as_a_whole(tmp_path_factory: pytest.TempPathFactory, shapes: list) -> None:
    rng = np.random.default_rng(0)
    shapes = sorted(shapes, key=lambda s: ["F32", "BF16", "I8"].index(s[0]))  # keeps every tensor aligned
    declared = {f"t{i}": (dtype, (rows, columns)) for i, (dtype, rows, columns) in enumerate(shapes)}
    arrays = {n: rng.integers(0, 100, shape).astype(DTYPES[dtype]) for n, (dtype, shape) in declared.items()}
    path = tmp_path_factory.mktemp("pieces") / "x.safetensors"
    writer = TensorWriter(path, declared)
    for name, array in arrays.items():
        for row in range(len(array)):
            writer.write(name, array[row : row + 1])
    assert writer.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size == writer.size == header_bytes(declared) + sum(a.nbytes for a in arrays.values())
    file = TensorFile(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)


def test_arrays_outlive_a_closed_file(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    array = file.read("b")
    file.close()
    np.testing.assert_array_equal(array, TENSORS["b"])
    assert not array.flags.writeable


def test_a_tensor_that_is_not_aligned_is_copied(tmp_path: Path) -> None:
    header = {"a": entry(), "b": entry("F32", (1,), (4, 8))}
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)  # data begins at an odd offset
    file = TensorFile(raw(tmp_path / "x.safetensors", text, bytes(4) + np.float32(1.5).tobytes()))
    assert file.read("b").tolist() == [1.5]
    assert file.read("b").flags.aligned


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"123", "truncated"),
        ({"a": entry()}, b"12345", "expected"),
        ({"a": entry(offsets=(0, 5))}, b"12345", "from its shape"),
        ({"a": entry(offsets=(4, 0))}, b"1234", "from its shape"),
        ({"a": entry(offsets=(-4, 0))}, b"1234", "two offsets"),
        ({"a": entry(offsets=(2**70, 2**70 + 4))}, b"1234", "hole"),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", "overlaps"),
        ({"a": entry(), "b": entry(offsets=(0, 4))}, b"1234", "overlaps"),
        ({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789", "hole"),
        ({"a": entry(offsets=(1, 5))}, b"12345", "hole"),
        ({"a": entry("F9")}, b"1234", "dtype"),
        ({"a": entry(["U8"])}, b"1234", "dtype"),
        ({"a": entry(shape=(2, -2))}, b"1234", "shape"),
        ({"a": entry(shape=(4.0,))}, b"1234", "shape"),
        ({"a": entry(shape=(True,), offsets=(0, 1))}, b"1", "shape"),
        ({"a": entry(shape=(2**62, 4))}, b"1234", "shape"),
        ({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, b"", "shape"),
        ({"a": entry(shape=(1,) * 100, offsets=(0, 1))}, b"1", "shape"),
        ({"a": {**entry(), "more": 1}}, b"1234", "keys"),
        ({"a": []}, b"1234", "keys"),
        ({"a": entry(offsets=(0, 4, 4))}, b"1234", "two offsets"),
        ([], b"", "object"),
        (b'{"a": ', b"", "JSON"),
        (b'{"a": NaN}', b"", "JSON"),
        (b"\xff\xfe", b"", "JSON"),
        (b'{"a":1,"a":2}', b"", "twice"),
        (b'{"\\ud800":1}', b"", "JSON"),
        (b"[" * 100_000, b"", "deeply"),
        (b'{"a":' * 100_000, b"", "deeply"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=message) as error:
        TensorFile(path)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize("length", [0, 3, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match=r"header"):
        TensorFile(raw(tmp_path / "x.safetensors", {"a": entry()}, b"1234", length))


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_files_too_short_for_a_header_are_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x07" * size)
    with pytest.raises(InputError, match="expected"):
        TensorFile(tmp_path / "x.safetensors")


def test_the_writer_takes_the_declared_tensors_only(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x.safetensors", DECLARED)
    with pytest.raises(ValueError, match="expected 48 bytes of a"):
        writer.write("b", TENSORS["b"])
    with pytest.raises(ValueError, match="int64"):
        writer.write("a", TENSORS["a"].astype(np.int32))
    writer.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match="more bytes"):
        writer.finish()
    writer.abandon()
