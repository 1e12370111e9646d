"""Round to nearest: each weight by itself, without calibration text. All other methods are compared with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llamita import _native
from llamita.errors import InputError
from llamita.methods.energy import check_energy, input_importance
from llamita.models.weights import FloatSource, check_finite
from llamita.numerics.affine import F32, dequantize, to_f32
from llamita.numerics.scheme import QuantScheme


@dataclass(frozen=True)
class RoundedRows:
    """Rounded rows of a module, one after the other.

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


RoundModule = Callable[[str], Iterator[RoundedRows]]  # a module's name to its rounded rows, in pieces


def rounder(source: FloatSource, scheme: QuantScheme) -> RoundModule:
    """Return the function that rounds a module of this model, by its name."""
    importance = input_importance(source) if scheme.scale_rule == "weighted" else {}
    return lambda name: _round_module(source, scheme, name, importance.get(name))


def _round_module(source: FloatSource, scheme: QuantScheme, name: str, importance: F32 | None) -> Iterator[RoundedRows]:
    """Yield the rows of a linear layer or table in int4 groups, or in int8 per channel.

    Raises:
        InputError: NaN or infinity among the weights, with its place, or squares beyond float32.
    """
    kind = scheme.kind(name)
    assert kind.bits, f"{name} stays float"
    for start, piece in source.rows(name):
        bits, group_size = kind.bits, kind.group_size or piece.shape[1]
        try:
            codes, scales, error = _native.round_weights(piece, bits, group_size, rule_of(scheme), importance)
        except ValueError as problem:
            check_finite(f"{name}.weight", piece, start)
            raise InputError(f"{name}.weight: {problem}") from None
        yield RoundedRows(codes, scales, *_sums(name, piece, start, error))


def _sums(name: str, piece: np.ndarray, first_row: int, error: np.ndarray) -> tuple[float, float]:
    """Return squared error and energy of a piece of rows."""
    values = to_f32(piece)
    with np.errstate(over="ignore"):
        energy = np.einsum("ij,ij->i", values, values).sum(dtype=np.float64)
    check_energy(name, piece, first_row, error.sum() + energy)
    return float(error.sum()), float(energy)


def errors_of(piece: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> tuple[float, float]:
    """Return Σ(w - ŵ)² and Σw² of rows of weights, for codes (rows, columns) and scales (rows, groups)."""
    values = to_f32(piece)
    lost = values - dequantize(codes, scales)
    return tuple(float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64)) for x in (lost, values))  # type: ignore[return-value]


def rule_of(scheme: QuantScheme) -> str:
    """Return the name of the native rule for a scheme's scales."""
    if scheme.scale_rule == "torchao":
        return "torchao" if scheme.scale_dtype == "float32" else "torchao_bf16"
    return "search"
