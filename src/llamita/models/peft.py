"""Read and write low-rank adapters in PEFT's format, adapter_config.json and adapter_model.safetensors, without PEFT.

LoRA: Hu et al. 2021, arXiv 2106.09685.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.safetensors import TensorFile, TensorWriter
from llamita.models.config import ModelConfig
from llamita.models.weights import FLOAT_DTYPES, check_finite, stored_dtype
from llamita.system.files import exists_in, read_json, safe_path, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_RANK = 4096
_LARGEST_ALPHA = 1e6
_NAME = re.compile(r"base_model\.model\.model\.layers\.([0-9]{1,5})\.(\w+\.\w+)\.lora_([AB])\.(?:default\.)?weight")
_PLAIN: dict[str, Any] = {  # settings that can change the computation, with the value at which they do not
    "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layer_replication": None, "lora_bias": False, "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}  # fmt: skip


@dataclass(frozen=True)
class StoredAdapter:
    """Hold an adapter of a whole model as its files do: y = W·x + scaling·B·(A·x).

    Attributes:
        pairs: A (rank, inputs) and B (outputs, rank), floats as they are stored, by the module's full name.
        rank: of every pair.
        scaling: of every pair.
    """

    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    scaling: float


def read_adapter(path: Path, config: ModelConfig) -> StoredAdapter:
    """Read the adapter of a directory in PEFT's format.

    Raises:
        InputError: a setting is not supported, or a tensor is missing, unknown or of another shape.
        RunError: a file cannot be read.
    """
    if not exists_in(path, CONFIG):
        there = "a file" if path.is_file() else "a directory without it" if path.exists() else "no such directory"
        raise InputError(str(path), f"a directory with {CONFIG}, as PEFT writes adapters", there)
    settings = read_json(path, CONFIG)
    rank, scaling = _check_settings(settings, path)
    file = TensorFile(safe_path(path, WEIGHTS))
    found: dict[str, dict[str, np.ndarray]] = {}
    shapes = config.linear_shapes()
    for tensor, info in file.tensors.items():
        match = _NAME.fullmatch(tensor)
        if match is None or match[2] not in shapes or int(match[1]) >= config.layers:
            raise InputError(f"{path}: {shown(tensor, 100)}", "adapters of this model's linear layers")
        rows, columns = shapes[match[2]]
        expected = (rank, columns) if match[3] == "A" else (rows, rank)
        if info.dtype not in FLOAT_DTYPES or info.shape != expected:
            raise InputError(
                f"{path}: {tensor}",
                f"floats {expected}",
                f"{info.dtype} {info.shape}",
                "is this an adapter of another model?",
            )
        values = file.read(tensor)
        check_finite(tensor, values)
        pair = found.setdefault(f"model.layers.{int(match[1])}.{match[2]}", {})
        if match[3] in pair:  # once with the adapter's name, once without
            raise InputError(f"{path}: {WEIGHTS}: {tensor}", "once", "it twice")
        pair[match[3]] = values
    if not found:
        raise InputError(f"{path}: {WEIGHTS}", "adapters", "none")
    for module, pair in found.items():
        if len(pair) != 2:
            raise InputError(f"{path}: {module}", "both lora_A and lora_B")
    pairs = {module: (pair["A"], pair["B"]) for module, pair in found.items()}
    return StoredAdapter(pairs, rank, scaling)


def _check_settings(settings: dict[str, Any], path: Path) -> tuple[int, float]:
    """Return rank and scaling; refuse settings that are not supported."""
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: {CONFIG}: peft_type", "LORA", shown(settings.get("peft_type")))
    for name, plain in _PLAIN.items():
        value = settings.get(name, plain)
        if value != plain and value is not None:
            raise InputError(
                f"{path}: {CONFIG}: {name}", f"{plain!r}", shown(value, 60), "try merging it into its base with PEFT"
            )
    start = settings.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva"):  # others change the base, too
        raise InputError(
            f"{path}: {CONFIG}: init_lora_weights",
            "true",
            shown(start, 60),
            "try converting it to plain LoRA with PEFT",
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise InputError(f"{path}: {CONFIG}: r", f"1 to {_LARGEST_RANK}", shown(rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= _LARGEST_ALPHA:
        raise InputError(f"{path}: {CONFIG}: lora_alpha", "a number", shown(alpha))
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def write_adapter(adapter: StoredAdapter, base: str, layers: int, directory: Path) -> None:
    """Write an adapter into an empty directory.

    Args:
        base: the name of its model, for PEFT.
        layers: of that model. If some have no adapter, the others are named one by one: PEFT would make new adapters
            for them.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapter.pairs.items():
        for part, values in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    order = sorted(
        tensors, key=lambda name: -tensors[name].itemsize
    )  # widest elements first, which keeps every tensor aligned
    writer = TensorWriter(directory / WEIGHTS, {n: (stored_dtype(tensors[n]), tensors[n].shape) for n in order})
    try:
        for name in order:
            writer.write(name, tensors[name])
        writer.finish()
    finally:
        writer.abandon()
    kinds = {name.rpartition(".")[2] for name in adapter.pairs}
    write_json(directory / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": adapter.rank, "lora_alpha": adapter.scaling * adapter.rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(kinds if len(adapter.pairs) == layers * len(kinds) else adapter.pairs),
        "inference_mode": True, "init_lora_weights": True,
    })  # fmt: skip
