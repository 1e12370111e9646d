"""Tune codes and scales of a rounded block by gradients of the block's output.

After SignRound (Cheng et al. 2023, arXiv 2309.05516): each weight has a place on the line of codes that can move by
half a step, and each scale a factor. On the inputs that the quantized model gives it, the block comes nearer to what
the float model computes, so it also makes up for earlier errors. Tuning starts exactly at the given codes and scales
and keeps the best on held-out samples, so the result is never worse there.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llamita.methods.blocks import Block
from llamita.methods.blockwise import Rounded, RoundedBlock
from llamita.methods.settings import TuneSettings, settings_of
from llamita.methods.setup import Setup
from llamita.numerics.scheme import QuantScheme

_INSIDE = 0.499  # steps from its code at which a place may begin: it still rounds to that code
_LOWEST, _HIGHEST = -8.49, 7.49  # places that still round to a code
_SMALLEST_NORMAL = 2.0**-126
_MOMENTS = (0.9, 0.99)  # Adam's; the second is shorter than usual, because there are few steps
_TINY = 1e-12  # added to the root of Adam's second moment
_MEASURED_TOKENS = 2048  # tokens in a forward pass over held-out samples


def tune_block(block: RoundedBlock, scheme: QuantScheme, setup: Setup) -> dict[str, Rounded]:
    """Return codes and scales that bring the block's outputs nearer to the targets, by full module name.

    Scales are tuned first, then codes and scales: if a method has chosen the codes well, only the first may help.
    """
    settings = settings_of(TuneSettings, "tune", setup.settings)
    rounded = block.rounded
    if not rounded:  # no layer of the block is int4
        return {}
    for phase, rate in enumerate(settings.descents):
        random = np.random.default_rng([setup.seed, block.index, phase])
        rounded = _tune(replace(block, rounded=rounded), scheme, replace(settings, rate=rate), random)
    return rounded


def _tune(
    block: RoundedBlock, scheme: QuantScheme, settings: TuneSettings, random: np.random.Generator
) -> dict[str, Rounded]:
    """Return the best of one descent, or what it began with if nothing measured better."""
    held_out = max(1, len(block.inputs) // settings.held_out)
    learned = len(block.inputs) - held_out or 1  # a single sample is both
    layers = [_Layer(block, name, scheme, settings) for name in block.rounded]
    draws = _draws(learned, settings.samples, random)
    best, kept = measure(block.block, block.inputs[-held_out:], block.targets[-held_out:]), None
    for step in range(settings.steps):
        _descend(block, layers, next(draws), step, settings)
        if _is_checked(step, settings):
            now = measure(block.block, block.inputs[-held_out:], block.targets[-held_out:])
            if now < best:
                best, kept = now, {layer.name: layer.rounded() for layer in layers}
    for layer in layers:
        layer.release()
    return kept or block.rounded


def measure(block: Block, inputs: Tensor, targets: Tensor) -> float:
    """Return the squared error of the block's outputs, summed over channels, mean over tokens.

    Args:
        inputs: (samples, length, hidden).
        targets: likewise.
    """
    step = max(1, _MEASURED_TOKENS // inputs.shape[1])
    with torch.no_grad():
        parts = [
            _squared_error(block, inputs[start : start + step], targets[start : start + step])
            for start in range(0, len(inputs), step)
        ]
    return float(torch.stack(parts).sum(dtype=torch.float64)) / (inputs.shape[0] * inputs.shape[1])


def _squared_error(block: Block, inputs: Tensor, targets: Tensor) -> Tensor:
    return (block(inputs).float() - targets).square().sum()


def _is_checked(step: int, settings: TuneSettings) -> bool:
    left = settings.steps - 1 - step
    return left % max(1, settings.steps // (2 * settings.checks)) == 0 and left < settings.steps / 2


def _draws(samples: int, count: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield numbers of samples; all come once before any comes again."""
    order = np.empty(0, np.int64)
    while True:
        while len(order) < count:
            order = np.concatenate([order, random.permutation(samples)])
        yield np.sort(order[:count])
        order = order[count:]


def _descend(block: RoundedBlock, layers: list["_Layer"], drawn: np.ndarray, step: int, settings: TuneSettings) -> None:
    """Take one step of Adam (Kingma and Ba 2014, arXiv 1412.6980) on all places and scales."""
    picked = torch.from_numpy(drawn)
    device = layers[0].places.device
    inputs, targets = block.inputs[picked].to(device), block.targets[picked].to(device)
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=_multiplies_bf16(device)):
        _squared_error(block.block, inputs, targets).backward()
    falling = (1 - step / settings.steps) / 100
    for layer in layers:
        layer.update(step, settings.rate * falling, settings.scale_rate * falling)


def _multiplies_bf16(device: torch.device) -> bool:
    """Return whether bf16 products are fast there; for gradients they are as good as float32 products."""
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cuda" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


class _Adam:
    """Moments of one tensor's gradient."""

    def __init__(self, values: Tensor) -> None:
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)

    def step(self, values: Tensor, gradient: Tensor, step: int, rate: float) -> None:
        """Move `values` against the gradient, by about `rate`."""
        one, two = _MOMENTS
        self.first.lerp_(gradient, 1 - one)
        self.second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        size = rate * (1 - two ** (step + 1)) ** 0.5 / (1 - one ** (step + 1))
        values.addcdiv_(self.first, self.second.sqrt().add_(_TINY), value=-size)


class _Layer:
    """A linear layer of the block while it is tuned.

    Attributes:
        name: its full module name.
        places: (outputs, groups, group_size) float32; rounded they are the codes.
        factors: (outputs, groups), logarithms of the factors of the given scales.
    """

    def __init__(self, block: RoundedBlock, name: str, scheme: QuantScheme, settings: TuneSettings) -> None:
        self.name, self._block, self._scheme = name, block.block, scheme
        self._linear = block.block.linears[name.removeprefix(f"{block.block.name}.")]
        given, weight = block.rounded[name], block.weights[name]
        self._scales = torch.from_numpy(given.scales).to(weight.device)
        codes = torch.from_numpy(given.codes).to(weight.device).float().reshape(*self._scales.shape, -1)
        wanted = weight.reshape(codes.shape) / self._scales[..., None]
        self.places = codes + settings.spread * (wanted - codes).clamp_(-_INSIDE, _INSIDE)
        self._low = (self.places - 0.5).clamp_(min=_LOWEST)
        self._high = (self.places + 0.5).clamp_(max=_HIGHEST)
        self.factors = torch.zeros_like(self._scales)
        self._place_moments = _Adam(self.places) if settings.rate else None
        self._factor_moments = _Adam(self.factors)
        self._show()

    def _show(self) -> None:
        """Put the current codes and scales into the block."""
        weight = (self._codes() * self._stored_scales()[..., None]).flatten(1)
        self._linear.weight = torch.nn.Parameter(weight)

    def _codes(self) -> Tensor:
        return self.places.round()

    def _stored_scales(self) -> Tensor:
        """Return scales (outputs, groups) float32 on the scheme's grid: finite, normal, positive."""
        scales = (self._scales * self.factors.exp()).clamp_(min=_SMALLEST_NORMAL)
        return scales.bfloat16().float() if self._scheme.scale_dtype == "bfloat16" else scales

    def update(self, step: int, rate: float, scale_rate: float) -> None:
        """Move against the gradient of the weights; rounding counts as passing it on unchanged."""
        codes, scales = self._codes(), self._stored_scales()
        gradient = self._linear.weight.grad.view_as(codes)
        self._factor_moments.step(self.factors, (gradient * codes).sum(-1) * scales, step, scale_rate)
        if self._place_moments is not None:
            self._place_moments.step(self.places, gradient.mul_(scales[..., None]), step, rate)
            torch.clamp(self.places, self._low, self._high, out=self.places)
        self._show()

    def rounded(self) -> Rounded:
        """Return the current codes and scales."""
        codes = self._codes().to(torch.int8).flatten(1)
        return Rounded(codes.cpu().numpy(), self._stored_scales().cpu().numpy())

    def release(self) -> None:
        """Leave the block without gradients."""
        self._linear.weight = torch.nn.Parameter(self._linear.weight.detach(), requires_grad=False)
