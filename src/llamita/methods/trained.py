"""Round a model that was trained with its rounding: the codes nearest to its weights, on the scales of training.

`finetune` writes such a checkpoint: float weights as in any other, and next to them the file SCALES, float32 (rows,
groups) for each module that is rounded. Nothing is chosen here, so the codes are those of training.
"""

from collections.abc import Iterator

import numpy as np

from llamita.errors import InputError
from llamita.formats.safetensors import TensorFile
from llamita.methods.rtn import RoundedRows, RoundModule, errors_of
from llamita.models.checkpoint import Checkpoint
from llamita.models.weights import FloatSource, check_finite, pieces_of
from llamita.numerics.affine import SMALLEST_NORMAL, bf16_to_f32, codes_at, f32_to_bf16, to_f32
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import exists_in, safe_path

SCALES = "training_scales.safetensors"


def rounder(source: FloatSource, scheme: QuantScheme) -> RoundModule:
    """Return the function that rounds a module of this model, by its name.

    Raises:
        InputError: the source was not trained so, or for another scheme.
    """
    if not isinstance(source, Checkpoint) or not exists_in(source.path, SCALES):
        raise InputError(
            "--method trained", f"{SCALES} next to the weights, as finetune writes it", hint="try another method"
        )
    scales = TensorFile(safe_path(source.path, SCALES))
    return lambda name: _round_module(source, scheme, scales, name)


def _round_module(source: FloatSource, scheme: QuantScheme, scales: TensorFile, name: str) -> Iterator[RoundedRows]:
    kind, weights = scheme.kind(name), source.weight(name)
    groups = weights.shape[1] // (kind.group_size or weights.shape[1])
    found = scales.tensors.get(name)
    if found is None or found.shape != (len(weights), groups):
        got = "none" if found is None else f"{found.shape}"
        raise InputError(f"{SCALES}: {name}", f"{(len(weights), groups)}", got, "try the preset of the training")
    given = _checked(scales.read(name), name, scheme)
    for start, piece in pieces_of(weights):
        check_finite(f"{name}.weight", piece, start)
        yield _rounded(to_f32(piece), given[start : start + len(piece)], kind.bits or 0)


def _checked(scales: np.ndarray, name: str, scheme: QuantScheme) -> np.ndarray:
    """Return the scales if they are valid: finite, normal, positive, on the scheme's grid."""
    is_good = scales.dtype == np.float32 and bool(np.isfinite(scales).all() and (scales >= SMALLEST_NORMAL).all())
    if is_good and scheme.scale_dtype == "bfloat16":
        is_good = np.array_equal(bf16_to_f32(f32_to_bf16(scales)), scales)
    if not is_good:
        raise InputError(f"{SCALES}: {name}", f"positive numbers in {scheme.scale_dtype}", "others")
    return scales


def _rounded(piece: np.ndarray, scales: np.ndarray, bits: int) -> RoundedRows:
    groups = piece.reshape(scales.size, -1)
    codes = codes_at(groups, scales.ravel(), bits).astype(np.int8).reshape(piece.shape)
    return RoundedRows(codes, scales, *errors_of(piece, codes, scales))
