"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) with static groups and activation order.

The error of a layer's output is tr(E H Eᵀ), with E = W - Q and H = mean of x xᵀ. With H = V Vᵀ, V upper triangular,
it is ‖E V‖², and column k of E V depends on columns up to k alone. So the value that is rounded is
w_k + Σ_{i<k} e_i V_ik / V_kk: GPTQ without the inverse of H. Scales are chosen before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita import _native
from llamita.methods.blockwise import LayerMethod, Layers, Rounded
from llamita.methods.rtn import rule_of
from llamita.methods.settings import GPTQ, Numbers, numbers_of
from llamita.numerics.scheme import QuantScheme

_LEAST = 1e-3  # of the mean energy: the search for scales ignores no input
_LEAF = 32  # columns rounded one by one between products of matrices


def layer_method(settings: dict[str, Any]) -> LayerMethod:
    """Return GPTQ as a method of the chain."""
    own = numbers_of(settings, "gptq", GPTQ)
    return LayerMethod(lambda layers, scheme: round_layers(layers, scheme, own))


def round_layers(layers: Layers, scheme: QuantScheme, settings: Numbers) -> dict[str, Rounded]:
    """Return codes and scales of layers that share an input; `settings` are those of `settings.GPTQ`."""
    weights = torch.cat(list(layers.weights.values()))  # (outputs, inputs)
    return round_target(layers, weights, scheme, settings)


def round_target(layers: Layers, target: Tensor, scheme: QuantScheme, settings: Numbers) -> dict[str, Rounded]:
    """Return codes and scales nearest to `target` (all outputs, inputs), one matrix above the other."""
    scales = search_scales(target, layers.hessian.diagonal(), scheme)
    damping, sweeps = settings["damping"], int(settings["sweeps"])
    codes = round_columns(target, torch.from_numpy(scales), layers.hessian, damping, sweeps).numpy()
    rounded, start = {}, 0
    for name, weight in layers.weights.items():
        rows = slice(start, start + len(weight))
        rounded[name] = Rounded(np.ascontiguousarray(codes[rows]), scales[rows])
        start = rows.stop
    return rounded


def search_scales(weights: Tensor, energy: Tensor, scheme: QuantScheme) -> np.ndarray:
    """Return scales (outputs, groups) float32 by the scheme's rule, squared errors weighted by measured energies."""
    rule = rule_of(scheme)
    importance = (energy / energy.mean()).clamp(min=_LEAST).float().numpy() if rule == "search" else None
    _, scales, _ = _native.round_weights(np.ascontiguousarray(weights.numpy()), 4, scheme.group_size, rule, importance)
    return scales


def round_columns(target: Tensor, scales: Tensor, hessian: Tensor, damping: float, sweeps: int = 0) -> Tensor:
    """Return codes int8 (outputs, inputs) of least error by GPTQ's greedy rule, inputs of most energy first.

    Args:
        target: (outputs, inputs) float32.
        scales: (outputs, groups) float32.
        hessian: (inputs, inputs), mean of x xᵀ; an input that was always 0 is rounded to nearest.
        sweeps: how often each code is then chosen again while the others are fixed.
    """
    inputs = target.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    ordered = hessian[order][:, order]
    weights = target.T[order]  # (inputs, outputs): each step reads and writes whole rows
    loop = _Loop(
        weights=weights,
        targets=weights.clone(),
        scales=scales.T.contiguous(),
        reciprocals=1 / scales.T.contiguous(),
        groups=(order // (inputs // scales.shape[1])).tolist(),
        feedback=feedback_matrix(ordered, damping),
        codes=torch.empty_like(weights),
    )
    _round_range(loop, 0, inputs)
    loop.feedback = torch.empty(0)  # free it: for a wide layer it is a quarter of a gigabyte
    damp(ordered, damping)
    for _ in range(sweeps):
        _sweep(loop, ordered)
    codes = torch.empty(weights.shape, dtype=torch.int8)
    codes[order] = loop.codes.to(torch.int8)
    return codes.T.contiguous()


def feedback_matrix(hessian: Tensor, damping: float) -> Tensor:
    """Return V_ik / V_kk of the damped H = V Vᵀ, V upper triangular: (inputs, inputs) float32."""
    matrix = hessian.flip(0, 1).double()  # V Vᵀ = H is L Lᵀ of H with rows and columns in reverse
    del hessian  # for a wide layer each of these is half a gigabyte
    damp(matrix, damping)
    matrix = torch.linalg.cholesky(matrix)
    matrix /= matrix.diagonal().clone()
    return matrix.float().flip(0, 1).contiguous()  # LAPACK stores by columns


def damp(hessian: Tensor, damping: float) -> None:
    """Add to the energy of each input a share of itself, in place; an input without energy gets 1.

    A share of the mean, which is usual, would drown most inputs where a few have nearly all the energy.
    """
    energy = hessian.diagonal()
    energy *= 1 + damping
    energy[energy == 0] = 1


@dataclass
class _Loop:
    """The arrays of the loop: inputs in the order in which they are rounded, (inputs, outputs) float32.

    Attributes:
        targets: the values to round; for inputs that are rounded, their errors.
        scales, reciprocals: (groups, outputs); `groups` has the group of each input.
    """

    weights: Tensor
    targets: Tensor
    scales: Tensor
    reciprocals: Tensor
    groups: list[int]
    feedback: Tensor
    codes: Tensor


def _round_range(loop: _Loop, start: int, stop: int) -> None:
    """Round inputs [start, stop) by halves, so that one product carries the errors of the first half to the second."""
    feedback, targets = loop.feedback, loop.targets
    if stop - start > _LEAF:
        middle = (start + stop) // 2
        _round_range(loop, start, middle)
        targets[middle:stop].addmm_(feedback[start:middle, middle:stop].T, targets[start:middle])
        _round_range(loop, middle, stop)
        return
    for k in range(start, stop):
        group, code = loop.groups[k], loop.codes[k]
        torch.mul(targets[k], loop.reciprocals[group], out=code).round_().clamp_(-8, 7)
        torch.addcmul(loop.weights[k], code, loop.scales[group], value=-1, out=targets[k])  # the error
        targets[k + 1 : stop].addr_(feedback[k, k + 1 : stop], targets[k])


def _sweep(loop: _Loop, hessian: Tensor) -> None:
    """Improve GPTQ's codes by coordinate descent (QuantEase, arXiv 2309.01885), one input after the other.

    Each weight goes where the errors of all others want it, so no step makes tr(E H Eᵀ) larger. `loop.targets` has the
    errors.
    """
    errors, inputs = loop.targets, len(loop.targets)
    pulls = hessian @ errors  # (inputs, outputs)
    for start in range(0, inputs, _LEAF):
        stop = min(start + _LEAF, inputs)
        changes = errors[start:stop].clone()
        for k in range(start, stop):
            group, code, old = loop.groups[k], loop.codes[k], changes[k - start]
            torch.addcdiv(loop.weights[k] - old, pulls[k], hessian[k, k], out=code)
            code.mul_(loop.reciprocals[group]).round_().clamp_(-8, 7)
            torch.addcmul(loop.weights[k], code, loop.scales[group], value=-1, out=errors[k])
            torch.sub(errors[k], old, out=old)
            pulls[k + 1 : stop].addr_(hessian[k, k + 1 : stop], old)
        pulls[stop:].addmm_(hessian[stop:, start:stop], changes)
