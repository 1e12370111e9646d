"""Low-rank adapters beside a model's weights: y = W·x + s·B·(A·x) (LoRA, Hu et al. 2021, arXiv 2106.09685).

Here they are not merged, so one copy of the quantized weights serves several, and a step may mix sequences of
different ones. A and B are PEFT's own files, read as they are stored; x is the float input of a layer, not
its int8 codes.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita import _native as ops
from llamita.errors import InputError
from llamita.formats.safetensors import TensorFile
from llamita.models.config import ModelConfig
from llamita.models.peft import CONFIG, WEIGHTS
from llamita.models.weights import FLOAT_DTYPES, ModelSource, check_finite
from llamita.quantize.lineage import changed_channels, is_trained_beside
from llamita.system.files import has, member, read_json

# The engine's linear layers, and those of a checkpoint that each is made of, in the order of its outputs.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_LARGEST_RANK = 4096
_LARGEST_ALPHA = 1e6
_PANEL = 16  # outputs that are computed together: kLanes of native/kernels/kernels.h
_NAME = re.compile(
    r"base_model\.model\.model\.layers\.([0-9]{1,5})\.(\w+\.\w+)\.lora_([AB])\.(?:default\.)?weight"
)
_PLAIN: dict[str, Any] = {  # settings that change what is computed, and where they do not
    "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layer_replication": None, "lora_bias": False, "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """Adapters of a whole model.

    Attributes:
        name: what requests call it.
        blocks: of every block, by the keys of FUSED; a layer that has none is missing.
    """

    name: str
    blocks: tuple[dict[str, ops.LowRank], ...]


@dataclass(frozen=True)
class StoredAdapter:
    """What a directory in PEFT's form holds.

    Attributes:
        pairs: A (rank, inputs) and B (outputs, rank) as they are stored, by the module's full name.
        scaling: what B·A is multiplied by.
    """

    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    scaling: float


Span = tuple[slice, Adapter]  # tokens of a step, and whose they are


def apply(spans: Sequence[Span], layer: int, fused: str, x: np.ndarray, out: np.ndarray) -> None:
    """Add to out (tokens, outputs) what the adapters of a step make of x (tokens, inputs)."""
    for tokens, adapter in spans:
        adapted = adapter.blocks[layer].get(fused)
        if adapted is not None:
            ops.low_rank(adapted, x[tokens], out[tokens])


def check_fits(source: ModelSource, adapters: Iterable[Path]) -> None:
    """See that this model reads and gives what the model did that adapters were trained on.

    Raises:
        InputError: it was rotated, or its channels were scaled, and some adapter knows nothing of that.
    """
    changed = changed_channels(source)
    if changed and not all(is_trained_beside(source, path) for path in adapters):
        raise InputError(
            f"adapters: expected a model whose channels are those of its source, got one changed by "
            f"{' and '.join(changed)}; try quantize --method qronos+tune --set tune.rate=0"
        )


def load_adapter(name: str, path: Path, config: ModelConfig) -> Adapter:
    """Adapters as the engine runs them; `name` is what requests will call them, errors as `read_adapter`."""
    stored = read_adapter(path, config)
    return Adapter(name, tuple(_block(config, layer, stored) for layer in range(config.layers)))


def read_adapter(path: Path, config: ModelConfig) -> StoredAdapter:
    """Adapters from a directory in PEFT's form.

    Raises:
        InputError: a setting that is not known here, or a tensor that is missing, unknown or of another
            shape.
        RunError: a file cannot be read.
    """
    if not has(path, CONFIG):
        there = "a file" if path.is_file() else "none" if not path.exists() else "a directory without it"
        raise InputError(f"{path}: expected a directory with {CONFIG}, as PEFT writes adapters, got {there}")
    settings = read_json(path, CONFIG)
    rank, scaling = _check_settings(settings, path)
    file = TensorFile(member(path, WEIGHTS))
    found: dict[str, dict[str, np.ndarray]] = {}
    shapes = config.linear_shapes()
    for tensor, info in file.tensors.items():
        match = _NAME.fullmatch(tensor)
        if match is None or match[2] not in shapes or int(match[1]) >= config.layers:
            raise InputError(f"{path}: {tensor[:100]!r}: expected adapters of this model's linear layers")
        rows, columns = shapes[match[2]]
        expected = (rank, columns) if match[3] == "A" else (rows, rank)
        if info.dtype not in FLOAT_DTYPES or info.shape != expected:
            raise InputError(
                f"{path}: {tensor}: expected floats {expected}, got {info.dtype} {info.shape}; "
                "is this an adapter of another model?"
            )
        values = file.read(tensor)
        check_finite(tensor, values)
        pair = found.setdefault(f"model.layers.{int(match[1])}.{match[2]}", {})
        if match[3] in pair:  # with and without the adapter's name
            raise InputError(f"{path}: {WEIGHTS}: expected {tensor} once, got it twice")
        pair[match[3]] = values
    if not found:
        raise InputError(f"{path}: {WEIGHTS}: expected adapters, got none")
    for module, pair in found.items():
        if len(pair) != 2:
            raise InputError(f"{path}: {module}: expected both lora_A and lora_B")
    return StoredAdapter({module: (pair["A"], pair["B"]) for module, pair in found.items()}, scaling)


def _check_settings(settings: dict[str, Any], path: Path) -> tuple[int, float]:
    """The rank, and what B·A·x is multiplied by."""
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: {CONFIG}: peft_type: expected LORA, got {settings.get('peft_type')!r}")
    for name, plain in _PLAIN.items():
        value = settings.get(name, plain)
        if value != plain and value is not None:
            raise InputError(f"{path}: {CONFIG}: {name}: expected {plain!r}, got {repr(value)[:60]}; "
                             "try merging it into its base with PEFT")  # fmt: skip
    begins = settings.get("init_lora_weights", True)
    if begins not in (True, False, "gaussian", "orthogonal", "eva"):  # others change the base, too
        raise InputError(f"{path}: {CONFIG}: init_lora_weights: expected true, got {repr(begins)[:60]}; "
                         "try converting it to plain LoRA with PEFT")  # fmt: skip
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise InputError(f"{path}: {CONFIG}: r: expected 1 to {_LARGEST_RANK}, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= _LARGEST_ALPHA:
        raise InputError(f"{path}: {CONFIG}: lora_alpha: expected a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _block(config: ModelConfig, layer: int, stored: StoredAdapter) -> dict[str, ops.LowRank]:
    """The adapters of one block."""
    shapes, block = config.linear_shapes(), {}
    for fused, names in FUSED.items():
        outputs = 0
        downs, ups = list[np.ndarray](), list[tuple[np.ndarray, int, int]]()
        for name in names:
            rows, module = shapes[name][0], f"model.layers.{layer}.{name}"
            if module in stored.pairs:
                down, up = stored.pairs[module]
                if downs and downs[0].dtype != down.dtype:
                    raise InputError(f"{module}: lora_A: expected its neighbours' dtype")
                downs.append(down)
                ups.append((_panels(up), outputs, rows))
            outputs += rows
        if downs:
            block[fused] = ops.LowRank(downs, ups, outputs, stored.scaling)
    return block


def _panels(up: np.ndarray) -> np.ndarray:
    """B (rows, rank) by 16 rows: (panels, rank, 16), zeros behind the last row."""
    rows, rank = up.shape
    whole = np.zeros((-(-rows // _PANEL) * _PANEL, rank), up.dtype)
    whole[:rows] = up
    return np.ascontiguousarray(whole.reshape(-1, _PANEL, rank).transpose(0, 2, 1))
