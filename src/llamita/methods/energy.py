"""Estimate the energy of each input of each linear layer from the weights alone.

The squared error of a layer's output is Σ_k E[x_k²]·e_k² if its inputs are uncorrelated, so an input with more energy
deserves smaller errors e_k. Without data, E[x²] is followed through the network, as variance propagation does for
initialization (Glorot and Bengio 2010); all values count as independent and of mean zero. The energy of the residual
stream starts as the embedding's and grows by what each layer writes; a norm brings its mean to 1.
"""

import numpy as np

from llamita.errors import InputError
from llamita.models.weights import FloatSource, bias_of, check_finite
from llamita.numerics.affine import F32, to_f32

_ATTENTION_SHARE = 0.5  # of a value's energy left after averaging over tokens; between 0 and 1
_QUADRATURE = 32  # points of the Gauss-Hermite rule for E[silu(g)²]
_TRUST = 0.5  # exponent: energies are estimates, and full trust in them makes models worse
_LEAST = 0.01  # of the mean: activations have outliers, so no input is ignored


def input_importance(source: FloatSource) -> dict[str, F32]:
    """Return how much each input of each linear layer counts, by the layer's name: float32 (inputs,) with mean 1.

    Reads every weight once.
    """
    return {name: _importance(energy) for name, energy in input_energies(source).items()}


def input_energies(source: FloatSource) -> dict[str, F32]:
    """Return the expected E[x²] of each input of each linear layer, by the layer's name: float32 (inputs,)."""
    config = source.config
    energies: dict[str, F32] = {}
    stream = _column_energy(source, "model.embed_tokens")  # (hidden,)
    for layer in (f"model.layers.{i}" for i in range(config.layers)):
        inputs = _after_norm(source, f"{layer}.input_layernorm", stream)
        energies |= {f"{layer}.self_attn.{name}_proj": inputs for name in "qkv"}
        _, values = _output_moments(source, f"{layer}.self_attn.v_proj", inputs)
        # Each kv head serves several query heads, whose inputs of o_proj follow one another.
        inputs = _ATTENTION_SHARE * np.repeat(
            values.reshape(config.kv_heads, -1), config.heads // config.kv_heads, axis=0
        ).reshape(-1)
        energies[f"{layer}.self_attn.o_proj"] = inputs
        stream = stream + _output_moments(source, f"{layer}.self_attn.o_proj", inputs)[1]
        inputs = _after_norm(source, f"{layer}.post_attention_layernorm", stream)
        energies |= {f"{layer}.mlp.{name}_proj": inputs for name in ("gate", "up")}
        gate = _output_moments(source, f"{layer}.mlp.gate_proj", inputs)
        _, up = _output_moments(source, f"{layer}.mlp.up_proj", inputs)
        inputs = _silu_energy(*gate) * up
        energies[f"{layer}.mlp.down_proj"] = inputs
        stream = stream + _output_moments(source, f"{layer}.mlp.down_proj", inputs)[1]
    return energies


def _after_norm(source: FloatSource, name: str, stream: F32) -> F32:
    """Return E[x²] of x = gamma·n, where n is the stream brought to a mean energy of 1."""
    mean = stream.mean(dtype=np.float64)
    # Only an embedding of zeros has no energy, and all its channels are alike.
    normed = stream / np.float32(mean) if mean > 0 else np.ones_like(stream)
    gamma = source.vector(f"{name}.weight")
    return normed * gamma * gamma


def _output_moments(source: FloatSource, name: str, inputs: F32) -> tuple[F32, F32]:
    """Return mean and energy E[y²], each (outputs,), of y = W·x + b for E[x²] = inputs."""
    energy = np.empty(source.info(f"{name}.weight").shape[0], np.float32)
    for start, piece in source.rows(name):
        with np.errstate(over="ignore", invalid="ignore"):
            part = np.square(to_f32(piece)) @ inputs
        check_energy(name, piece, start, part)
        energy[start : start + len(piece)] = part
    bias = bias_of(source, name)
    return (np.zeros_like(energy), energy) if bias is None else (bias, energy + bias * bias)


def check_energy(name: str, piece: np.ndarray, first_row: int, energy: np.ndarray) -> None:
    """Raise InputError for NaN or infinity among the weights, or squares beyond float32."""
    if not np.isfinite(energy).all():
        check_finite(f"{name}.weight", piece, first_row)
        raise InputError(f"{name}.weight", "weights whose squares fit float32", hint="the checkpoint is damaged")


def _column_energy(source: FloatSource, name: str) -> F32:
    """Return the mean square of each column of a table, as if all its rows came equally often: (columns,)."""
    rows, columns = source.info(f"{name}.weight").shape
    total = np.zeros(columns, np.float32)
    for start, piece in source.rows(name):
        with np.errstate(over="ignore", invalid="ignore"):
            total += np.square(to_f32(piece)).sum(axis=0)
        check_energy(name, piece, start, total)
    return total / np.float32(rows)


def _silu_energy(mean: F32, energy: F32) -> F32:
    """Return E[silu(g)²] of normal g with this mean and E[g²], each (outputs,)."""
    points, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
    deviation = np.sqrt(np.maximum(energy - mean * mean, 0))
    g = mean[:, None] + deviation[:, None] * points.astype(np.float32)  # (outputs, points)
    silu = g / (1 + np.exp(-np.clip(g, -80, 80)))  # exp(80) is still far from float32's limit
    return (np.square(silu) @ (weights / weights.sum())).astype(np.float32)


def _importance(energy: F32) -> F32:
    """Return how much the squared error of each input counts: a root of its energy, with mean 1."""
    root = energy**_TRUST
    mean = root.mean(dtype=np.float64)
    if not np.isfinite(mean) or mean <= 0:  # nothing reaches the layer: all inputs count the same
        return np.ones(len(energy), np.float32)
    return np.maximum(root / mean, _LEAST).astype(np.float32)
