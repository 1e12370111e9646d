"""How much energy to expect of every input of every linear layer, from the weights alone.

The squared error of a layer's output is Σ_k E[x_k²]·e_k² as far as its inputs are uncorrelated, so an
input with more energy deserves smaller errors e_k. Without data E[x²] is found by following it through
the network, as variance propagation does for initialization (Glorot and Bengio 2010): every value is
taken as independent and of mean zero. The residual stream's energy starts as the embedding's and grows
by what each layer writes; a norm brings its mean to 1.
"""

import numpy as np

from llamita.affine import F32, to_f32
from llamita.checkpoint import ModelSource
from llamita.errors import InputError

_CHUNK = 2**22  # weights converted at a time: 16 MB as float32
_ATTENTION_SHARE = 0.5  # of a value's energy that is left after averaging over tokens; between 0 and 1
_QUADRATURE = 32  # points of the Gauss-Hermite rule for E[silu(g)²]
_LEAST = 0.01  # of the mean: no input may be given up, for activations have outliers


def expected_energies(source: ModelSource) -> dict[str, F32]:
    """E[x²] of the inputs of every linear layer by name, each float32 (inputs,) with mean 1.

    Reads every weight once.
    """
    config = source.config
    energies: dict[str, F32] = {}
    stream = _column_energy(source, "model.embed_tokens")  # (hidden,)
    for layer in (f"model.layers.{i}" for i in range(config.layers)):
        inputs = _after_norm(source, f"{layer}.input_layernorm", stream)
        energies |= {f"{layer}.self_attn.{name}_proj": inputs for name in "qkv"}
        values = _output_energy(source, f"{layer}.self_attn.v_proj", inputs).reshape(config.kv_heads, -1)
        # Each kv head serves several query heads, whose inputs of o_proj stand one after the other.
        inputs = np.repeat(values, config.heads // config.kv_heads, axis=0).reshape(-1) * _ATTENTION_SHARE
        energies[f"{layer}.self_attn.o_proj"] = inputs
        stream = stream + _output_energy(source, f"{layer}.self_attn.o_proj", inputs)
        inputs = _after_norm(source, f"{layer}.post_attention_layernorm", stream)
        energies |= {f"{layer}.mlp.{name}_proj": inputs for name in ("gate", "up")}
        gate, up = (_output_energy(source, f"{layer}.mlp.{name}_proj", inputs) for name in ("gate", "up"))
        inputs = _silu_energy(gate) * up
        energies[f"{layer}.mlp.down_proj"] = inputs
        stream = stream + _output_energy(source, f"{layer}.mlp.down_proj", inputs)
    return {name: _normalized(energy) for name, energy in energies.items()}


def _after_norm(source: ModelSource, name: str, stream: F32) -> F32:
    """x = γ·n, where n is the stream brought to a mean energy of 1."""
    mean = stream.mean(dtype=np.float64)
    if not np.isfinite(mean) or mean <= 0:
        raise InputError(f"{name}: expected a residual stream with finite energy above zero, got {mean}")
    gamma = source.vector(f"{name}.weight")
    return np.float32(1 / mean) * stream * gamma * gamma


def _output_energy(source: ModelSource, name: str, inputs: F32) -> F32:
    """E[y²] (outputs,) of y = W·x + b for E[x²] = inputs."""
    weights = source.weight(name)
    assert isinstance(weights, np.ndarray)  # a float model: methods begin with nothing else
    energy = np.empty(len(weights), np.float32)
    step = max(1, _CHUNK // weights.shape[1])
    for start in range(0, len(weights), step):
        piece = to_f32(weights[start : start + step])
        energy[start : start + step] = np.square(piece) @ inputs
    bias = source.bias(name)
    return energy if bias is None else energy + bias * bias


def _column_energy(source: ModelSource, name: str) -> F32:
    """Mean square of each column of a table, as if its rows came equally often: (columns,)."""
    table = source.weight(name)
    assert isinstance(table, np.ndarray)
    total = np.zeros(table.shape[1], np.float32)
    step = max(1, _CHUNK // table.shape[1])
    for start in range(0, len(table), step):
        total += np.square(to_f32(table[start : start + step])).sum(axis=0)
    return total / np.float32(len(table))


def _silu_energy(gate: F32) -> F32:
    """E[silu(g)²] for Gaussian g of energy `gate`, each (outputs,)."""
    points, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
    g = np.sqrt(gate)[:, None] * points.astype(np.float32)  # (outputs, points)
    silu = g / (1 + np.exp(-g))
    return (np.square(silu) @ (weights / weights.sum())).astype(np.float32)


def _normalized(energy: F32) -> F32:
    mean = energy.mean(dtype=np.float64)
    if not np.isfinite(mean) or mean <= 0:  # a layer that nothing reaches: all inputs alike
        return np.ones(len(energy), np.float32)
    return np.maximum(energy / mean, _LEAST).astype(np.float32)
