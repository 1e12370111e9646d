"""Rotations at run time in Torch: the twin of `numerics/hadamard.py` that passes gradients."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita import _native
from llamita.numerics.hadamard import butterflies, core_signs, factor
from llamita.numerics.rotations import Rotations


def runtime_rotation(rotations: Rotations) -> Callable[[Tensor], Tensor] | None:
    """Return R4, for the inputs of down_proj (..., inputs); None if the model has none."""
    return None if rotations.r4_size is None else hadamard_transform


def hadamard_transform(x: Tensor) -> Tensor:
    """Return H·x / √n for each vector along the last axis, with sums in the order of `hadamard.fast_hadamard`.

    On the CPU the engine's kernel computes it, in float32 for every dtype of x, so the bits are the engine's. On other
    devices Torch computes the K sums of an order K > 1, and its order may change the last bits.
    """
    if x.device.type == "cpu" and x.dtype != torch.float64:
        return _OnEngine.apply(x)  # type: ignore[no-any-return]
    n = x.shape[-1]
    core, power = factor(n)
    y = butterflies(x.reshape(-1, core, 2**power), torch.stack)
    if core > 1:
        signs = torch.from_numpy(core_signs(core).copy()).to(x)
        y = torch.einsum("lk,bkj->blj", signs, y)
    return (y * float(torch.tensor(n**-0.5, dtype=x.dtype))).reshape(x.shape)


class _OnEngine(torch.autograd.Function):
    """Compute H·x / √n; as H is orthogonal up to a factor, the gradient of x is Hᵀ·(the output's) / √n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return _multiplied(x, is_transposed=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return _multiplied(gradients[0], is_transposed=True)


def _multiplied(x: Tensor, is_transposed: bool) -> Tensor:
    rows = np.ascontiguousarray(x.detach().float().reshape(-1, x.shape[-1]).numpy())
    out = np.empty_like(rows)
    _native.hadamard(_transform(x.shape[-1], is_transposed), rows, out)
    return torch.from_numpy(out).reshape(x.shape).to(x.dtype)


@lru_cache
def _transform(n: int, is_transposed: bool) -> _native.Hadamard:
    core, _ = factor(n)
    if core == 1:
        return _native.Hadamard(n)  # Sylvester's matrices are symmetric
    signs = core_signs(core)
    return _native.Hadamard(n, np.ascontiguousarray(signs.T) if is_transposed else signs)
