"""What a rotated model does at run time, in Torch: the twin of `hadamard.py` that gradients pass through."""

from collections.abc import Callable

import torch
from torch import Tensor

from llamita.hadamard import butterflies, core_signs, factor
from llamita.rotations import Rotations


def online_transform(rotations: Rotations) -> Callable[[Tensor], Tensor] | None:
    """R4, for the inputs of down_proj (..., inputs); None where the model has none."""
    return None if rotations.r4_size is None else hadamard_transform


def hadamard_transform(x: Tensor) -> Tensor:
    """H·x / √n for every vector along the last axis, sums in the order of `hadamard.fast_hadamard`.

    Where K > 1 its K sums are left to Torch, whose order may differ in the last bits.
    """
    n = x.shape[-1]
    core, power = factor(n)
    y = butterflies(x.reshape(-1, core, 2**power), torch.stack)
    if core > 1:
        signs = torch.from_numpy(core_signs(core).copy()).to(x)
        y = torch.einsum("lk,bkj->blj", signs, y)
    return (y * float(torch.tensor(n**-0.5, dtype=x.dtype))).reshape(x.shape)
