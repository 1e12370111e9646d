"""Int8 activations in Torch, in float32: the same codes as `affine.quantize_activations`.

Rounded layers read rounded inputs in use, so they are calibrated on them. Gradients pass through the rounding as if
it were not there (Bengio et al. 2013, arXiv 1308.3432): each token has its own range, so nothing is cut off.
"""

from typing import Any

import torch
from torch import Tensor

_SMALLEST_NORMAL = 2.0**-126


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (..., columns), scales and zero points (..., 1) of each token, all as float32.

    Args:
        x: (..., columns) float32.
    """
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    scales = ((high - low) / 255).clamp_(min=_SMALLEST_NORMAL)
    zero_points = (-128 - torch.round(low / scales)).clamp_(-128, 127)
    codes = (x * (1.0 / scales)).round_().add_(zero_points).clamp_(-128, 127)
    return codes, scales, zero_points


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        codes, scales, zero_points = activation_codes(x)
        return codes.sub_(zero_points).mul_(scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


def quantize_activations(x: Tensor) -> Tensor:
    """Return x (..., columns) float32 as its int8 codes per token represent it; the gradient passes unchanged."""
    return _Quantize.apply(x)  # type: ignore[no-any-return]
