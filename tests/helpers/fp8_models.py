"""Checkpoints in FP8 as people have them, made of float ones; Torch makes the codes and says what they mean."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_file

from llamita.formats.safetensors import TensorWriter
from llamita.models.checkpoint import open_tensor_files
from llamita.numerics.affine import f32_to_bf16, to_f32

_ARGS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax"}
_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def _compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {**_ARGS, "strategy": strategy, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": _INPUTS}}
    cache = {**_ARGS, "strategy": "tensor"}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": cache}  # fmt: skip


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
# By form: quantization_config, the name of the scales, and what has one of its own.
FORMS: dict[str, tuple[dict[str, Any] | None, str, str]] = {
    "ct tensor": (_compressed("tensor"), "weight_scale", "tensor"),
    "ct channel": (_compressed("channel"), "weight_scale", "channel"),
    "ct block": (_compressed("block", block_structure=[48, 40]), "weight_scale", "block"),
    "fp8 block": ({**_FP8, "fmt": "e4m3", "weight_block_size": [48, 40], "modules_to_not_convert": ["lm_head"]},
                  "weight_scale_inv", "block"),
    "fp8 tensor": ({**_FP8, "weight_block_size": None}, "weight_scale_inv", "scalar"),
    "autofp8": ({**_FP8, "activation_scheme": "static", "ignored_layers": ["lm_head"]}, "weight_scale", "scalar"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
               "weight_scale", "channel"),
    "cast": (None, "", ""),
}  # fmt: skip
BLOCK = (48, 40)  # of the forms with blocks; divides no matrix here


def as_fp8(
    source: Path, directory: Path, form: str, *, dtype: str = "F8_E4M3", scales: str = "F32",
    block: tuple[int, int] = BLOCK, shards: int = 1,
) -> Path:  # fmt: skip
    """Write a checkpoint in FP8, and next to it, in `directory`-twin, the same values in F32.

    Args:
        dtype: of linear layers; of all tensors in the form "cast".
        scales: the dtype of scales.
    """
    quantization, part, kind = FORMS[form]
    files, where = open_tensor_files(source)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    twin: dict[str, np.ndarray] = {}
    for name, file in sorted(where.items()):
        stored = files[file].tensors[name].dtype
        values = files[file].read(name)
        module, is_linear = name.removesuffix(".weight"), name.endswith("proj.weight")
        if form == "cast":
            codes, twin[name] = _encode(to_f32(values), dtype, None, (1, 1))
            tensors[name] = (dtype, codes)
        elif is_linear:
            scale, shared = _scales(to_f32(values), kind, block, dtype)
            scale = f32_to_bf16(scale) if scales == "BF16" else scale
            grid = to_f32(scale).reshape(-1, -(-values.shape[1] // shared[1]))
            codes, twin[name] = _encode(to_f32(values), dtype, grid, shared)
            tensors[name], tensors[f"{module}.{part}"] = (dtype, codes), (scales, scale)
            one = np.ones(1, np.float32)
            tensors[f"{module}.input_scale"] = ("F32", one)
            if module.endswith("k_proj"):
                tensors[f"{module.removesuffix('k_proj')}k_scale"] = tensors[f"{module}.k_scale"] = ("F32", one)
        else:
            tensors[name], twin[name] = (stored, values), to_f32(values)
    config = json.loads((source / "config.json").read_text("utf-8"))
    for made, settings in ((directory, quantization), (Path(f"{directory}-twin"), None)):
        made.mkdir()
        if settings is not None and block != BLOCK:
            settings = json.loads(json.dumps(settings).replace(str(list(BLOCK)), str(list(block))))
        more = {} if settings is None else {"quantization_config": settings}
        (made / "config.json").write_text(json.dumps({**config, **more}))
        for path in source.glob("tokenizer*"):
            shutil.copy(path, made)
    write_file(Path(f"{directory}-twin") / "model.safetensors", twin, "F32")
    _write(directory, tensors, shards)
    return directory


def write_mixed(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file of tensors of several dtypes."""
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    writer = TensorWriter(path, {name: (tensors[name][0], tensors[name][1].shape) for name in order})
    for name in order:
        writer.write(name, tensors[name][1])
    writer.finish()


def _write(directory: Path, tensors: dict[str, tuple[str, np.ndarray]], shards: int) -> None:
    if shards == 1:
        return write_mixed(directory / "model.safetensors", tensors)
    names, weight_map = list(tensors), {}  # a matrix and its scales come into different files
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_mixed(directory / file, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _scales(values: np.ndarray, kind: str, block: tuple[int, int], dtype: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Return scales as they are stored, and the rows and columns that share one."""
    rows, columns = values.shape
    shared = {"channel": (1, columns), "block": block}.get(kind, (rows, columns))
    grid = np.empty((-(-rows // shared[0]), -(-columns // shared[1])), np.float32)
    for i, j in np.ndindex(grid.shape):
        part = values[i * shared[0] : (i + 1) * shared[0], j * shared[1] : (j + 1) * shared[1]]
        grid[i, j] = np.abs(part).max() / {"F8_E4M3": 448, "F8_E5M2": 57344}[dtype]
    shape = {"scalar": (), "tensor": (1,)}.get(kind, grid.shape)
    return grid.reshape(shape), shared


def _encode(
    values: np.ndarray, dtype: str, grid: np.ndarray | None, shared: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes, and what they stand for: Torch's values times the scales in float64, rounded once to float32."""
    torch = pytest.importorskip("torch", reason="it has the types of FP8")
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    factors = np.ones((1, 1))
    if grid is not None:
        rows, columns = np.indices(values.shape)
        factors = grid[rows // shared[0], columns // shared[1]].astype(np.float64)
    factors = factors if values.ndim == 2 else factors[0]
    codes = torch.from_numpy((values / factors).astype(np.float32)).to(kind)
    exact = codes.double().numpy() * factors
    return codes.view(torch.uint8).numpy(), exact.astype(np.float32)
