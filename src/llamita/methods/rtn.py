"""Round to nearest: every weight by itself, no calibration text. The yardstick of all other methods."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llamita import _native
from llamita.affine import F32, to_f32
from llamita.checkpoint import Checkpoint, check_finite, table_names
from llamita.errors import InputError
from llamita.scheme import QuantScheme

_CHUNK = 2**22  # weights rounded at a time: 16 MB as float32
_LEAST_IMPORTANCE = 0.01  # of the mean: no input may be given up, for activations have outliers


@dataclass(frozen=True)
class RoundedRows:
    """Consecutive rows of a module, rounded.

    Attributes:
        codes: int8 (rows, columns).
        scales: float32 (rows, groups), on the scheme's grid.
        squared_error: the sum of squared differences to the weights.
        energy: the sum of the squared weights.
    """

    codes: np.ndarray
    scales: np.ndarray
    squared_error: float
    energy: float


def round_module(source: Checkpoint, scheme: QuantScheme, name: str) -> Iterator[RoundedRows]:
    """The rows of a linear layer in int4 groups, or of a table in int8 per channel, in pieces.

    Raises:
        InputError: NaN or infinity among the weights, with its place.
    """
    weights = source.weight(name)  # (rows, columns), mapped
    columns = weights.shape[1]
    is_table = name in table_names(source.config)
    bits, group_size = (8, columns) if is_table else (4, scheme.group_size)
    importance = None
    if scheme.scale_rule == "weighted" and not is_table:
        importance = expected_energy(source, name)
    step = max(1, _CHUNK // columns)
    for start in range(0, len(weights), step):
        piece = weights[start : start + step]
        try:
            codes, scales, error = _native.round_weights(piece, bits, group_size, _rule(scheme), importance)
        except ValueError as problem:
            check_finite(f"{name}.weight", piece, start)
            raise InputError(f"{name}.weight: {problem}") from None
        values = to_f32(piece)
        energy = np.einsum("ij,ij->i", values, values).sum(dtype=np.float64)
        yield RoundedRows(codes, scales, float(error.sum()), float(energy))


def _rule(scheme: QuantScheme) -> str:
    if scheme.scale_rule == "torchao":
        return "torchao" if scheme.scale_dtype == "float32" else "torchao_bf16"
    return "search"


def expected_energy(source: Checkpoint, name: str) -> F32:
    """The energy E[x²] to expect of each input of a linear layer, mean 1, from the weights alone.

    The output's squared error is Σ E[x_k²]·e_k² as far as inputs are uncorrelated, so an input with more
    energy deserves smaller errors. Behind a norm x = γ·n with n of unit energy: γ². o_proj averages values
    v = V·(γ·n): ‖V_k·γ‖², for every query head of its group. down_proj gets silu(g)·u, whose energy
    grows with that of both gate and up: the product of theirs.
    """
    config = source.config
    block, _, linear = name.rpartition(".")
    layer = block.rpartition(".")[0]  # "model.layers.N"
    if linear in ("q_proj", "k_proj", "v_proj"):
        energy = source.vector(f"{layer}.input_layernorm.weight") ** 2
    elif linear in ("gate_proj", "up_proj"):
        energy = source.vector(f"{layer}.post_attention_layernorm.weight") ** 2
    elif linear == "o_proj":
        gamma = source.vector(f"{layer}.input_layernorm.weight")
        values = _output_energy(source, f"{layer}.self_attn.v_proj", gamma).reshape(config.kv_heads, -1)
        energy = np.repeat(values, config.heads // config.kv_heads, axis=0).reshape(-1)
    else:
        gamma = source.vector(f"{layer}.post_attention_layernorm.weight")
        gate, up = (_output_energy(source, f"{layer}.mlp.{side}_proj", gamma) for side in ("gate", "up"))
        energy = gate * up
    mean = energy.mean(dtype=np.float64)
    if not (np.isfinite(mean) and mean > 0):  # a layer without input: all inputs alike
        return np.ones(len(energy), np.float32)
    return np.maximum(energy / mean, _LEAST_IMPORTANCE).astype(np.float32)


def _output_energy(source: Checkpoint, name: str, gamma: F32) -> F32:
    """E[y²] of each output of y = W·(γ·n) + b for n of unit energy, in pieces of rows."""
    weights = source.weight(name)
    energy = np.empty(len(weights), np.float32)
    step = max(1, _CHUNK // weights.shape[1])
    for start in range(0, len(weights), step):
        piece = to_f32(weights[start : start + step]) * gamma
        energy[start : start + step] = np.einsum("ij,ij->i", piece, piece)
    bias = source.bias(name)
    return energy if bias is None else energy + bias * bias
