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
_QUADRATURE = 24  # points; the integrand is smooth


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
        InputError: NaN or infinity among the weights, with its place, or squares beyond float32.
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
        yield RoundedRows(codes, scales, *_sums(name, piece, error))


def _sums(name: str, piece: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """Squared error and energy of a piece of rows."""
    values = to_f32(piece)
    with np.errstate(over="ignore"):
        energy = np.einsum("ij,ij->i", values, values).sum(dtype=np.float64)
    if not np.isfinite(error.sum() + energy):
        raise InputError(
            f"{name}.weight: expected weights whose squares fit float32; the checkpoint is damaged"
        )
    return float(error.sum()), float(energy)


def _rule(scheme: QuantScheme) -> str:
    if scheme.scale_rule == "torchao":
        return "torchao" if scheme.scale_dtype == "float32" else "torchao_bf16"
    return "search"


def expected_energy(source: Checkpoint, name: str) -> F32:
    """The energy E[x²] to expect of each input of a linear layer, mean 1, from the weights alone.

    The output's squared error is Σ E[x_k²]·e_k² as far as inputs are uncorrelated, so an input with more
    energy deserves smaller errors. Behind a norm, x = gamma·n with n taken as normal of energy 1: gamma².
    o_proj averages values v = V·x, for every query head of its group: E[v²]. down_proj gets silu(g)·u, its
    factors taken as independent: E[silu(g)²]·E[u²].
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
        mean, variance = _output_moments(source, f"{layer}.self_attn.v_proj", gamma)
        values = (mean**2 + variance).reshape(config.kv_heads, -1)  # (kv_heads, head_dim)
        energy = np.repeat(values, config.heads // config.kv_heads, axis=0).reshape(-1)
    else:
        gamma = source.vector(f"{layer}.post_attention_layernorm.weight")
        mean, variance = _output_moments(source, f"{layer}.mlp.up_proj", gamma)
        energy = _silu_energy(*_output_moments(source, f"{layer}.mlp.gate_proj", gamma)) * (
            mean**2 + variance
        )
    average = energy.mean(dtype=np.float64)
    if not (np.isfinite(average) and average > 0):  # a layer without input: all inputs alike
        return np.ones(len(energy), np.float32)
    return np.maximum(energy / average, _LEAST_IMPORTANCE).astype(np.float32)


def _output_moments(source: Checkpoint, name: str, gamma: F32) -> tuple[F32, F32]:
    """Mean and variance of each output of y = W·(gamma·n) + b, read in pieces of rows."""
    weights = source.weight(name)
    variance = np.empty(len(weights), np.float32)
    step = max(1, _CHUNK // weights.shape[1])
    for start in range(0, len(weights), step):
        piece = to_f32(weights[start : start + step]) * gamma
        variance[start : start + step] = np.einsum("ij,ij->i", piece, piece)
    bias = source.bias(name)
    return np.zeros_like(variance) if bias is None else bias, variance


def _silu_energy(mean: F32, variance: F32) -> F32:
    """E[silu(g)²] of normal g, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
    g = mean[:, None] + np.sqrt(variance)[:, None] * points  # (outputs, points)
    silu = g / (1 + np.exp(-np.clip(g, -80, 80)))  # exp(80) is still far from float32's limit
    return ((silu**2) @ weights / weights.sum()).astype(np.float32)
