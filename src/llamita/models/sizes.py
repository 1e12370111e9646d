"""Predict files, sizes and float layers of a packed model from a model's shape, before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass

from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.names import expected_tensors, linear_names, table_names
from llamita.models.packed import layout, tensor_bytes
from llamita.models.packed_writer import SHARD_BYTES, plan_shards, total_bytes
from llamita.numerics.scheme import QuantScheme


@dataclass(frozen=True)
class Plan:
    """List what quantizing will make. Sizes in bytes.

    Attributes:
        source_bytes: tensors of the float model.
        tensor_bytes: tensors of the packed model.
        file_bytes: its weight files, headers included.
        files: names of the weight files.
        rounded_weights: number of weights that are rounded.
        float_layers: layers left in float, and why.
    """

    source_bytes: int
    tensor_bytes: int
    file_bytes: int
    files: list[str]
    linear_layers: int
    rounded_weights: int
    float_layers: dict[str, str]

    @property
    def ratio(self) -> float:
        """Return the size after over the size before."""
        return self.tensor_bytes / self.source_bytes


def make_plan(
    config: ModelConfig,
    scheme: QuantScheme,
    float_dtype: Callable[[str], str],
    shard_bytes: int = SHARD_BYTES,
    transform: str | None = None,
    source_bytes: int | None = None,
) -> Plan:
    """Return the plan for a model of this shape whose tensors have these dtypes, given as for `layout`.

    Args:
        source_bytes: size of the model before its transforms, which can untie its tables; by default the size of
            this shape.

    Raises:
        InputError: the group size does not divide a layer's inputs.
    """
    modules = layout(config, scheme, float_dtype, transform)
    shards = plan_shards(modules, shard_bytes)
    shapes = table_names(config) | linear_names(config)
    rounded = [rows * columns for name, (rows, columns) in shapes.items() if scheme.kind(name).bits]
    if not rounded:
        raise InputError("--keep-float", "patterns that leave something to round", "all layers")
    return Plan(
        source_bytes=float_bytes(config, float_dtype) if source_bytes is None else source_bytes,
        tensor_bytes=sum(tensor_bytes(tensors) for tensors in modules.values()),
        file_bytes=total_bytes(shards),
        files=list(shards),
        linear_layers=len(linear_names(config)),
        rounded_weights=sum(rounded),
        float_layers={name: _why_float(name, scheme) for name in shapes if not scheme.kind(name).bits},
    )


def _why_float(name: str, scheme: QuantScheme) -> str:
    if name in scheme.layers:
        return "asked for"
    return f"preset {scheme.name} keeps embedding and head in float"


def float_bytes(config: ModelConfig, float_dtype: Callable[[str], str]) -> int:
    """Return the bytes of the float model's tensors in these dtypes."""
    return tensor_bytes({name: (float_dtype(name), shape) for name, shape in expected_tensors(config).items()})
