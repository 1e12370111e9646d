"""Read the checkpoint that `random_checkpoint.py` writes, in environments that do not have llamita."""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def bf16_tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor's name and bits, uint16 in its shape, straight from the mapped files."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name}: expected BF16, got {entry['dtype']}")
            begin, end = entry["data_offsets"]
            bits = np.frombuffer(data, np.uint16, (end - begin) // 2, start + begin)
            yield name, bits.reshape(entry["shape"])


def bits_to_f32(bits: np.ndarray) -> np.ndarray:
    """Return bf16 bits as float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def interleave_heads(bits: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k, (heads * dim, columns): from halves of a head (Hugging Face) to pairs (Meta)."""
    return bits.reshape(heads, 2, -1, bits.shape[1]).swapaxes(1, 2).reshape(bits.shape)
