"""The GGUF container: what is written is read, and damaged files are refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import write_small_gguf

from llamita.errors import InputError
from llamita.formats.gguf import GgufFile


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = GgufFile(write_small_gguf(tmp_path / "a.gguf"))
    assert {key: file.values[key] for key in "abcde"} == {"a": 3, "b": 1.5, "c": True, "d": "text", "e": ["x", "yy"]}
    np.testing.assert_array_equal(file.values["f"], [0, 1, 2])
    assert file.tensors["two"].shape == (2, 64)
    np.testing.assert_array_equal(file.read("two").ravel(), np.arange(136))
    assert file.tensors["two"].start % 32 == 0


def test_a_damaged_file_is_one_typed_error(tmp_path: Path) -> None:
    """Mutated and cut anywhere; what is read then lies within the file."""
    good, path = write_small_gguf(tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf"
    random, refused = np.random.default_rng(0), 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] = (0, 1, 127, 255, int(random.integers(256)))[random.integers(5)]
        path.write_bytes(data[: random.integers(len(data))] if random.random() < 0.3 else data)
        try:
            file = GgufFile(path)
        except InputError:
            refused += 1
            continue
        for name in file.tensors:
            file.read(name)
    assert refused > 500


@pytest.mark.parametrize(
    ("at", "form", "value", "told"),
    [
        (0, "4s", b"GGML", "another beginning"),
        (4, "<I", 9, "version: expected 2 or 3, got 9"),
        (8, "<Q", 1 << 60, "tensors: expected at most"),
        (16, "<Q", 1 << 60, "metadata: expected at most"),
        (24, "<Q", 1 << 60, "text: expected at most"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path, at: int, form: str, value: Any, told: str) -> None:
    path = write_small_gguf(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    with pytest.raises(InputError, match=told):
        GgufFile(path)
