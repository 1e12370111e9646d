"""Read and write low-rank adapters in PEFT's format, adapter_config.json and adapter_model.safetensors, without PEFT.

LoRA: Hu et al. 2021, arXiv 2106.09685.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.safetensors import TensorFile, TensorWriter
from llamita.models.config import ModelConfig
from llamita.models.weights import FLOAT_DTYPES, check_finite, stored_dtype
from llamita.numerics.affine import to_f32
from llamita.system.files import exists_in, read_json, safe_path, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_RANK = 4096
_LARGEST_ALPHA = 1e6
_NAME = re.compile(r"base_model\.model\.model\.layers\.([0-9]{1,5})\.(\w+\.\w+)\.lora_([AB])\.(?:default\.)?weight")
# Keys of rank_pattern: names, or simple expressions; others could take for ever to match.
_SIMPLE = re.compile(r"[\w.*\\^$]{1,120}")
_MOST_STARS = 3
Strengths = Callable[[str], tuple[int, float]]  # from a module to its rank and scaling
_PLAIN: dict[str, Any] = {  # settings that can change the computation, with the value at which they do not
    "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None,
    "layer_replication": None, "lora_bias": False, "trainable_token_indices": None,
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
    strengths = _check_settings(settings, path)
    file = TensorFile(safe_path(path, WEIGHTS))
    found: dict[str, dict[str, np.ndarray]] = {}
    shapes = config.linear_shapes()
    for tensor, info in file.tensors.items():
        match = _NAME.fullmatch(tensor)
        if match is None or match[2] not in shapes or int(match[1]) >= config.layers:
            raise InputError(f"{path}: {shown(tensor, 100)}", "adapters of this model's linear layers")
        rows, columns = shapes[match[2]]
        rank, _ = strengths(f"model.layers.{int(match[1])}.{match[2]}")
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
        if config.query_factor != 1.0 and match[2].endswith("q_proj") and match[3] == "B":
            values = to_f32(values) * np.float32(config.query_factor)
        pair = found.setdefault(f"model.layers.{int(match[1])}.{match[2]}", {})
        if match[3] in pair:  # once with the adapter's name, once without
            raise InputError(f"{path}: {WEIGHTS}: {tensor}", "once", "it twice")
        pair[match[3]] = values
    if not found:
        raise InputError(f"{path}: {WEIGHTS}", "adapters", "none")
    for module, pair in found.items():
        if len(pair) != 2:
            raise InputError(f"{path}: {module}", "both lora_A and lora_B")
    return _alike({module: (pair["A"], pair["B"]) for module, pair in found.items()}, strengths)


def _alike(pairs: dict[str, tuple[np.ndarray, np.ndarray]], strengths: Strengths) -> StoredAdapter:
    """Return an adapter of one rank and one scaling; where modules differ, zeros and factors make up for it."""
    found = {module: strengths(module) for module in pairs}
    if len(set(found.values())) == 1:
        return StoredAdapter(pairs, *next(iter(found.values())))
    most, scaling = max(rank for rank, _ in found.values()), max(found.values(), key=lambda one: abs(one[1]))[1]
    alike = {}
    for module, (down, up) in pairs.items():
        rank, own = found[module]
        factor = np.float32(own / scaling if scaling else 0.0)
        wide = np.pad(to_f32(down), ((0, most - rank), (0, 0))), np.pad(to_f32(up) * factor, ((0, 0), (0, most - rank)))
        alike[module] = wide
    return StoredAdapter(alike, most, scaling)


def _check_settings(settings: dict[str, Any], path: Path) -> Strengths:
    """Return the function from a module to its rank and scaling; refuse settings that are not supported."""
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
    patterns: list[dict[str, Any]] = []
    for key, plain, check in (("rank_pattern", "r", _is_rank), ("alpha_pattern", "lora_alpha", _is_alpha)):
        pattern = settings.get(key) or {}
        given = [(plain, settings.get(plain))]
        given += [(key, value) for value in pattern.values()] if isinstance(pattern, dict) else [(key, pattern)]
        for where, value in given:
            if not check(value):
                expected = f"1 to {_LARGEST_RANK}" if check is _is_rank else "a number"
                raise InputError(f"{path}: {CONFIG}: {where}", expected, shown(value, 60))
        patterns.append(pattern)

    def strength(module: str) -> tuple[int, float]:
        rank = _matching(patterns[0], module, settings["r"])
        return rank, _matching(patterns[1], module, settings["lora_alpha"]) / (
            math.sqrt(rank) if settings.get("use_rslora") else rank
        )

    return strength


def _matching(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key that is the module's name or the end of it, as PEFT finds it."""
    for key, value in pattern.items():
        try:
            if _SIMPLE.fullmatch(key) is None or key.count("*") > _MOST_STARS:
                raise re.error("unknown")
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            expected = f"names, or expressions with at most {_MOST_STARS} stars, in rank_pattern and alpha_pattern"
            raise InputError(CONFIG, expected, shown(key, 60)) from None
    return default


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_ALPHA


def unscaled(module: str, up: np.ndarray, query_factor: float) -> np.ndarray:
    """Return B for the family's own weights, as files have it; see `ModelConfig.query_factor`."""
    if query_factor == 1.0 or not module.endswith("q_proj"):
        return np.asarray(up)
    return to_f32(np.asarray(up)) / np.float32(query_factor)


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
