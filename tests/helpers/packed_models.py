"""Packed models of tiny checkpoints: how to make them, compare their weights, and edit their llamita.json."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from rotated import RotatedCheckpoint
from tiny import make_checkpoint

from llamita.models.checkpoint import Checkpoint, open_tensor_files
from llamita.models.metadata import sealed
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.numerics.affine import dequantize, quantize_activations, to_f32
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.quantize.pipeline import quantize

needs_transformers = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("transformers", "compressed_tensors")),
    reason="transformers or compressed-tensors is not installed",
)

# ---- making them ---------------------------------------------------------------------------------


def pack(folder: Path, scheme: str | QuantScheme = "llama3.2", group_size: int | None = None,
         shard_bytes: int = 10**9, **checkpoint: Any) -> Path:  # fmt: skip
    """Write a checkpoint to folder/src, round it to nearest, and return the packed model, folder/out.

    Args:
        scheme: a preset's name, which `group_size` may change, or a scheme.
        checkpoint: options of `make_checkpoint`.
    """
    source = Checkpoint(make_checkpoint(folder / "src", **checkpoint))
    scheme = make_scheme(scheme, group_size) if isinstance(scheme, str) else scheme
    quantize(source, "src", folder / "out", scheme, shard_bytes=shard_bytes)
    return folder / "out"


def pack_rotated(folder: Path, names: tuple[str, ...] = ("R1", "R4"), preset: str = "llama3.2",
                 family: str = "llama32", **checkpoint: Any) -> Path:  # fmt: skip
    """Do as `pack` does, but rotate the checkpoint first, by the plain formulas."""
    source = RotatedCheckpoint(make_checkpoint(folder / "src", family, **checkpoint), names)
    quantize(source, "src", folder / "out", make_scheme(preset))
    return folder / "out"


def pack_by_command(folder: Path, family: str = "llama32", *options: object, **checkpoint: Any) -> Path:
    """Write a checkpoint to folder/model, run `llamita quantize` on it, and return folder/packed."""
    model = make_checkpoint(folder / "model", family, **checkpoint)
    assert run("quantize", model, "-o", folder / "packed", *options) == 0
    return folder / "packed"


def write_base_and_packed(root: Path, preset: str) -> Path:
    """Write a float model, root/base, and packed models of it by group size, root/g128 and root/g32."""
    source = make_checkpoint(root / "base")
    for group in (128, 32):
        quantize(Checkpoint(source), str(source), root / f"g{group}", make_scheme(preset, group))
    return root


# ---- reading and comparing them ------------------------------------------------------------------


def tensors_of(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Return type, shape and bytes of every tensor."""
    files, where = open_tensor_files(directory)
    found = {name: files[file].tensors[name] for name, file in where.items()}
    return {n: (i.dtype, i.shape, files[where[n]].read(n).tobytes()) for n, i in found.items()}


def assert_same_weight(found: Any, expected: Any) -> None:
    """Check that two weights are of one type and have the same codes and scales, or the same floats."""
    assert type(found) is type(expected)
    if isinstance(expected, Int4Weight):
        assert found.group_size == expected.group_size
        np.testing.assert_array_equal(found.packed, expected.packed)
        np.testing.assert_array_equal(found.scales, expected.scales)
    elif isinstance(expected, Int8Weight):
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)
    else:
        np.testing.assert_array_equal(found, expected)
    assert getattr(found, "scales", np.zeros(0, np.float32)).dtype in (np.uint16, np.float32)


def float_weight(weight: Any) -> np.ndarray:
    """Return the weights that a quantized module represents, float32."""
    if isinstance(weight, Int4Weight):
        return dequantize(unpack_int4(weight.packed), weight.scales)
    return dequantize(weight.codes, weight.scales) if isinstance(weight, Int8Weight) else to_f32(weight)


def fake_quantize_input(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round the input of a Torch module to int8 for each token; a forward pre-hook."""
    import torch

    x = arguments[0].numpy()
    rows = x.reshape(-1, x.shape[-1])
    return (torch.from_numpy(dequantize(*quantize_activations(rows)).reshape(x.shape)), *arguments[1:])


# ---- editing them --------------------------------------------------------------------------------


def reseal(directory: Path, **changes: Any) -> None:
    """Change llamita.json (config.json's record always) and give it the right hash of itself."""
    values = json.loads((directory / "llamita.json").read_text()) | changes
    del values["self_sha256"]
    config = (directory / "config.json").read_bytes()
    if isinstance(values.get("files"), dict):
        values["files"]["config.json"] = {"size": len(config), "sha256": hashlib.sha256(config).hexdigest()}
    (directory / "llamita.json").write_bytes(sealed(values))
