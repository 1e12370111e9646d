"""Int8 activations as Torch computes them in float32: the same codes as `affine.quantize_activations`.

Layers that are rounded must be calibrated on what they will see, which is the rounded input. Gradients
pass through the rounding as if it were not there (Bengio et al. 2013, arXiv 1308.3432): the range is that
of the token itself, so nothing is ever cut off.
"""

from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST_NORMAL = 2.0**-126


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., columns), scales and zero points (..., 1) of every token, all as float32.

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
    """(..., columns) float32 as its int8 codes stand for it, per token; its gradient is the identity's."""
    return _Quantize.apply(x)  # type: ignore[no-any-return]


class FakeQuantLinear(nn.Linear):
    """A linear layer over dequantized weights whose input is rounded to int8 per token."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) float32 to (..., outputs)."""
        return super().forward(quantize_activations(input))
