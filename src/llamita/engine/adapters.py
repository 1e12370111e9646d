"""Applies low-rank adapters next to a model's weights: y = W·x + s·B·(A·x) (LoRA, arXiv 2106.09685).

They are not merged, so one copy of the quantized weights serves several adapters, and a step may mix sequences with
different ones. A and B are read from PEFT's files as they are stored; x is a layer's float input, not its int8 codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamita import _native as ops
from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.peft import StoredAdapter

# Each linear layer of the engine, with the layers of a checkpoint that it fuses, in the order of its outputs.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_PANEL = 16  # outputs computed together: kLanes of native/kernels/kernels.h


@dataclass(frozen=True)
class Adapter:
    """An adapter in the engine's layout.

    Attributes:
        name: the name that requests give it.
        blocks: for every block its low-rank pairs by the keys of FUSED, without layers that are not adapted.
    """

    name: str
    blocks: tuple[dict[str, ops.LowRank], ...]


Span = tuple[slice, Adapter]  # tokens of a step, and their adapter


def add_adapters(spans: Sequence[Span], layer: int, fused: str, x: np.ndarray, out: np.ndarray) -> None:
    """Add the adapters' products of x (tokens, inputs) to out (tokens, outputs)."""
    for tokens, adapter in spans:
        adapted = adapter.blocks[layer].get(fused)
        if adapted is not None:
            ops.low_rank(adapted, x[tokens], out[tokens])


def prepare_adapter(name: str, stored: StoredAdapter, config: ModelConfig) -> Adapter:
    """Bring an adapter into the engine's layout.

    Raises:
        InputError: layers that are fused have matrices of different dtypes.
    """
    return Adapter(name, tuple(_block(config, layer, stored) for layer in range(config.layers)))


def _block(config: ModelConfig, layer: int, stored: StoredAdapter) -> dict[str, ops.LowRank]:
    """Return the low-rank pairs of one block, by the keys of FUSED."""
    shapes, block = config.linear_shapes(), {}
    for fused, names in FUSED.items():
        outputs = 0
        downs, ups = list[np.ndarray](), list[tuple[np.ndarray, int, int]]()
        for name in names:
            rows, module = shapes[name][0], f"model.layers.{layer}.{name}"
            if module in stored.pairs:
                down, up = stored.pairs[module]
                if downs and downs[0].dtype != down.dtype:
                    raise InputError(f"{module}: lora_A", "the dtype of the layers that are fused with it")
                downs.append(down)
                ups.append((_panels(up), outputs, rows))
            outputs += rows
        if downs:
            block[fused] = ops.LowRank(downs, ups, outputs, stored.scaling)
    return block


def _panels(up: np.ndarray) -> np.ndarray:
    """Lay out B (rows, rank) in panels of 16 rows: (panels, rank, 16), with zeros after the last row."""
    rows, rank = up.shape
    whole = np.zeros((-(-rows // _PANEL) * _PANEL, rank), up.dtype)
    whole[:rows] = up
    return np.ascontiguousarray(whole.reshape(-1, _PANEL, rank).transpose(0, 2, 1))
