"""Compute in training what the engine will compute: layers that round their weights and inputs.

Forward: the codes nearest to the weights on fixed scales, and int8 activations per token. Backward: as if nothing
had been rounded (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432), except that weights beyond
the last code get no gradient (Esser et al. 2020, arXiv 1902.08153). Any method that quantizes chooses the scales,
before training.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llamita.methods.activations import quantize_activations
from llamita.numerics.affine import CODE_RANGE


class Switch:
    """Turns the rounding of all layers that share it on or off, at the same time."""

    def __init__(self, on: bool = True) -> None:
        self.on = on


def nearest(weight: Tensor, scales: Tensor) -> Tensor:
    """Divide weights by their scales and round, without a clamp to the codes' range: (rows, groups, group_size)."""
    return (weight.reshape(*scales.shape, -1) * (1.0 / scales)[..., None]).round_()


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, bits: int) -> Tensor:
        codes = nearest(weight, scales)
        lowest, highest = CODE_RANGE[bits]
        ctx.save_for_backward((codes >= lowest) & (codes <= highest))
        return codes.clamp_(lowest, highest).mul_(scales[..., None]).reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (is_inside,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient * is_inside.view(gradient.shape), None, None


def codes_of(weight: Tensor, scales: Tensor, bits: int) -> np.ndarray:
    """Return the codes that the forward pass uses: int8 (rows, columns).

    Args:
        weight: (rows, columns) float32.
        scales: (rows, groups) float32.
    """
    codes = nearest(weight.detach(), scales).clamp_(*CODE_RANGE[bits])
    return codes.to(torch.int8).reshape(weight.shape).cpu().numpy()


class SharedInput:
    """Rounds an input that several layers read (q, k and v do) only once: it knows the tensor by identity.

    It keeps nothing longer than the input itself.
    """

    def __init__(self) -> None:
        self._read: weakref.ref[Tensor] | None = None
        self._rounded: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., columns) rounded to int8 per token and dequantized; float32, also under autocast."""
        if self._rounded is None or self._read is None or self._read() is not x:
            self._rounded, self._read = quantize_activations(x.float()), weakref.ref(x, self._forget)
        return self._rounded

    def _forget(self, read: "weakref.ref[Tensor]") -> None:
        if self._read is read:
            self._rounded = None


class FakeQuantLinear(nn.Linear):
    """A linear layer that rounds its weights and inputs as it reads them; its parameters stay float.

    Attributes:
        bits: of its codes.
        scales: (outputs, groups) float32, a buffer.
        rotation: the run-time rotation (R4) of inputs before they are rounded; None for most layers.
    """

    scales: Tensor

    def __init__(
        self, linear: nn.Linear, bits: int, scales: Tensor, shared: SharedInput, switch: Switch,
        rotation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits
        self.register_buffer("scales", scales, persistent=False)  # the same in every checkpoint
        self._shared, self._switch, self.rotation = shared, switch, rotation

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        input = self.rotation(input.float()) if self.rotation else input
        if not self._switch.on:
            return functional.linear(input, self.weight, self.bias)
        weight = _Dequantized.apply(self.weight, self.scales, self.bits)
        return functional.linear(self._shared(input), weight, self.bias)


class FakeQuantEmbedding(nn.Embedding):
    """An embedding in int8 per row; it rounds only the rows that are looked up.

    Attributes:
        scales: (rows, 1) float32, a buffer.
    """

    scales: Tensor

    def __init__(self, embedding: nn.Embedding, scales: Tensor, switch: Switch) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight, self.bits = embedding.weight, 8
        self.register_buffer("scales", scales, persistent=False)
        self._switch = switch

    def forward(self, input: Tensor) -> Tensor:
        """Map token ids (...) to (..., hidden)."""
        if not self._switch.on:
            return functional.embedding(input, self.weight)
        used, places = torch.unique(input, return_inverse=True)
        rows = functional.embedding(used, self.weight)
        return functional.embedding(places, _Dequantized.apply(rows, self.scales[used], self.bits))
