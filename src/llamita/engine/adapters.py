"""Low-rank adapters beside a model's weights: y = W·x + s·B·(A·x) (LoRA, Hu et al. 2021, arXiv 2106.09685).

Here they are not merged, so one copy of the quantized weights serves several, and a step may mix sequences of
different ones. A and B are PEFT's own files, read as they are stored; x is the float input of a layer, not
its int8 codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamita import _native as ops
from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.peft import StoredAdapter

# The engine's linear layers, and those of a checkpoint that each is made of, in the order of its outputs.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_PANEL = 16  # outputs that are computed together: kLanes of native/kernels/kernels.h


@dataclass(frozen=True)
class Adapter:
    """Adapters of a whole model.

    Attributes:
        name: what requests call it.
        blocks: of every block, by the keys of FUSED; a layer that has none is missing.
    """

    name: str
    blocks: tuple[dict[str, ops.LowRank], ...]


Span = tuple[slice, Adapter]  # tokens of a step, and whose they are


def apply(spans: Sequence[Span], layer: int, fused: str, x: np.ndarray, out: np.ndarray) -> None:
    """Add to out (tokens, outputs) what the adapters of a step make of x (tokens, inputs)."""
    for tokens, adapter in spans:
        adapted = adapter.blocks[layer].get(fused)
        if adapted is not None:
            ops.low_rank(adapted, x[tokens], out[tokens])


def prepare_adapter(name: str, stored: StoredAdapter, config: ModelConfig) -> Adapter:
    """Return an adapter in the engine's layout; `name` is what requests call it.

    Raises:
        InputError: matrices that one operation computes together have different dtypes.
    """
    return Adapter(name, tuple(_block(config, layer, stored) for layer in range(config.layers)))


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
                    raise InputError(f"{module}: lora_A", "its neighbours' dtype")
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
