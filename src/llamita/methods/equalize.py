"""Scale pairs of channels against each other so that both sides round well; the model's function does not change.

Channel c of v_proj's output (or up_proj's) is multiplied by s_c, and the column of o_proj (or down_proj) that reads it
is divided by s_c. Groups of int4 absorb the change of the writer's rows. But the columns of a group share a scale, and
so do the activations of a token, so s_c weighs the column's energy against the energy of its activation. This is
cross-layer equalization (Nagel et al., arXiv 1906.04721) with energies instead of ranges, and without data.
"""

import numpy as np

from llamita.errors import InputError
from llamita.methods.energy import input_energies
from llamita.methods.settings import numbers_of
from llamita.methods.setup import Setup
from llamita.models.config import ModelConfig
from llamita.models.transformed import F64, Change, ModuleChange, TransformedSource
from llamita.models.weights import FloatSource
from llamita.numerics.affine import to_f32

_BALANCE = 0.75  # 1 makes all columns equal, 0 all activations; chosen by measurement (docs/reference/methods.md)


def transform(source: FloatSource, setup: Setup) -> TransformedSource:
    """Return the source with v and o, and up and down, equalized; every weight is read once.

    Raises:
        InputError: the source is rotated, which mixes the channels of a pair, or a setting is given.
    """
    numbers_of(setup.settings, "equalize", {})
    if source.rotations.names:
        raise InputError("--method", "equalize before spinquant", "equalize after it", "try equalize+spinquant")
    energies = input_energies(source)
    changes: dict[str, ModuleChange] = {}
    for layer in range(source.config.layers):
        block = f"model.layers.{layer}"
        for writer, reader in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
            name = f"{block}.{reader}"
            energy, columns = energies[name].astype(np.float64), _column_energy(source, name)
            if reader == "self_attn.o_proj":
                scales = pair_scales(*(_of_values(x, source.config) for x in (energy, columns)))
                inputs = _of_queries(scales, source.config)
            else:
                scales = inputs = pair_scales(energy, columns)
            changes[f"{block}.{writer}"] = ModuleChange(outputs=(_times(scales),))
            changes[name] = ModuleChange(inputs=(_times(1 / inputs),))
    return TransformedSource(source, changes)


def pair_scales(energy: F64, columns: F64) -> F64:
    """Return the factor of each channel (channels,), from the energy of its activation and of the column that reads it.

    Halfway, both would become equal in each channel. A channel that is never written or never read keeps its scale.
    The geometric mean of the channels does not change, because only their proportion matters.
    """
    scales = np.ones(len(energy))
    alive = (energy > 0) & (columns > 0)
    log = _BALANCE * np.log(columns[alive]) - (1 - _BALANCE) * np.log(energy[alive])
    if log.size:
        scales[alive] = np.exp((log - log.mean()) / 2)  # energies are squares
    return scales


def _column_energy(source: FloatSource, name: str) -> F64:
    """Return the sum of squares of each column of a matrix."""
    total = np.zeros(source.info(f"{name}.weight").shape[1])
    for _, piece in source.rows(name):
        total += np.square(to_f32(piece).astype(np.float64)).sum(axis=0)
    return total


def _of_values(x: F64, config: ModelConfig) -> F64:
    """Map o_proj's inputs to the value channels that feed them: the mean over the query heads of a group."""
    return x.reshape(config.kv_heads, -1, config.head_dim).mean(axis=1).reshape(-1)


def _of_queries(x: F64, config: ModelConfig) -> F64:
    """Map value channels to o_proj's inputs: each key/value head serves a group of query heads."""
    groups = config.heads // config.kv_heads
    return np.repeat(x.reshape(config.kv_heads, 1, -1), groups, axis=1).reshape(-1)


def _times(scales: F64) -> Change:
    return lambda x: x * scales
