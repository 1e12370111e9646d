"""Merge rotation matrices into a model's weights: products in float64, norms folded into the next layer first.

No mean is subtracted, because RMSNorm subtracts none. Tied tables stay tied, with a product M in front of the head.
"""

from dataclasses import dataclass

import numpy as np

from llamita.models.names import EMBEDDING, HEAD
from llamita.models.transformed import F64, Change, ModuleChange, TransformedSource
from llamita.models.weights import FloatSource
from llamita.numerics.hadamard import fast_hadamard
from llamita.numerics.rotations import NAMES, Rotations


@dataclass(frozen=True)
class RotationMatrices:
    """Orthogonal matrices R1 and R2, by which rows are multiplied; None where they are not used.

    Attributes:
        r1: float64 (hidden, hidden).
        r2: float64 (layers, head_dim, head_dim).
        r4_size: inputs of down_proj; None without R4.
    """

    r1: F64 | None
    r2: F64 | None
    r4_size: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The rotations in use."""
        used = {"R1": self.r1 is not None, "R2": self.r2 is not None, "R4": self.r4_size is not None}
        return tuple(name for name in NAMES if used[name])


def rotated(source: FloatSource, matrices: RotationMatrices, runtime: bool = True) -> TransformedSource:
    """Return the source with these rotations merged; its function is the same if R4 and M act at run time.

    Args:
        runtime: whether M may be used; if not, tied tables get one for the head.
    """
    config = source.config
    r1, changes, ones = matrices.r1, {}, set()
    for layer in range(config.layers):
        changes |= _block_changes(source, matrices, layer)
        if r1 is not None:
            norms = ("input_layernorm", "post_attention_layernorm")
            ones |= {f"model.layers.{layer}.{norm}.weight" for norm in norms}
    transform = None
    if r1 is not None:
        gamma = source.vector("model.norm.weight").astype(np.float64)
        changes[EMBEDDING] = ModuleChange(inputs=(_times_matrix(r1),))
        if config.tied and runtime:
            transform = (r1.T @ (gamma[:, None] * r1)).astype(np.float32)
        else:
            changes[HEAD] = ModuleChange(inputs=(_times(gamma), _times_matrix(r1)))
        ones.add("model.norm.weight")
    rotations = Rotations(matrices.names, matrices.r4_size, transform)
    untie = r1 is not None and not runtime
    return TransformedSource(source, changes, ones=ones, rotations=rotations, untie=untie)


def _block_changes(source: FloatSource, matrices: RotationMatrices, layer: int) -> dict[str, ModuleChange]:
    """Return what the rotations change in the linear layers of a block."""
    config, block = source.config, f"model.layers.{layer}"
    stream: tuple[Change, ...] = () if matrices.r1 is None else (_times_matrix(matrices.r1),)
    values: tuple[Change, ...] = ()
    if matrices.r2 is not None:
        values = (_times_matrix(matrices.r2[layer], config.head_dim),)

    def after(norm: str) -> tuple[Change, ...]:
        gamma = source.vector(f"{block}.{norm}.weight").astype(np.float64)
        return (_times(gamma), *stream) if stream else ()

    attention, mlp = after("input_layernorm"), after("post_attention_layernorm")
    changes = {
        "self_attn.q_proj": ModuleChange(inputs=attention),
        "self_attn.k_proj": ModuleChange(inputs=attention),
        "self_attn.v_proj": ModuleChange(inputs=attention, outputs=values),
        "self_attn.o_proj": ModuleChange(inputs=values, outputs=stream),
        "mlp.gate_proj": ModuleChange(inputs=mlp),
        "mlp.up_proj": ModuleChange(inputs=mlp),
        "mlp.down_proj": ModuleChange(inputs=(fast_hadamard,) if matrices.r4_size else (), outputs=stream),
    }
    return {f"{block}.{name}": change for name, change in changes.items() if change != ModuleChange()}


def _times(scales: F64) -> Change:
    return lambda x: x * scales


def _times_matrix(matrix: F64, head: int | None = None) -> Change:
    """Multiply rows by a matrix; with `head`, each run of that many values by itself."""
    if head is None:
        return lambda x: x @ matrix
    return lambda x: (x.reshape(*x.shape[:-1], -1, head) @ matrix).reshape(x.shape)
