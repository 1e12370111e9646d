"""GPTQ that also makes up for earlier rounding errors in the inputs (GPTAQ, arXiv 2504.02692; Qronos, 2505.11695).

It minimizes ‖R_f + W X_f - R_q - Q X_q‖²: float inputs X_f, inputs X_q of the quantized model, and the residual streams
R to which some layers add. Completing the square, that is GPTQ's objective around
W* = W + [W (X_f - X_q) X_qᵀ + (R_f - R_q) X_qᵀ] (X_q X_qᵀ + λI)⁻¹, plus a constant. Each correction is reduced by a
measured strength, because a sample only estimates the expectation.
"""

from typing import Any

import torch
from torch import Tensor

from llamita.methods import gptq
from llamita.methods.blockwise import LayerMethod, Layers, Rounded
from llamita.methods.settings import GPTQ, QRONOS, numbers_of
from llamita.numerics.scheme import QuantScheme


def layer_method(settings: dict[str, Any]) -> LayerMethod:
    """Return the corrected GPTQ as a method of the chain."""
    loop = numbers_of(settings, "gptq", GPTQ)
    own = numbers_of(settings, "qronos", QRONOS)

    def round_layers(layers: Layers, scheme: QuantScheme) -> dict[str, Rounded]:
        target = corrected_target(layers, own["strength"], own["residual"], own["ridge"])
        return gptq.round_target(layers, target, scheme, loop)

    return LayerMethod(round_layers, needs_cross=True)


def corrected_target(layers: Layers, strength: float, residual: float, ridge: float) -> Tensor:
    """Return W* of these layers, one above the other: (all outputs, inputs) float32."""
    weights = torch.cat(list(layers.weights.values()))
    assert layers.cross is not None
    missing = strength * (weights @ layers.cross)  # (outputs, inputs)
    if layers.residual is not None:
        missing += residual * layers.residual
    damped = layers.hessian.double()
    # A share of the mean. With a share of each input's own energy, a rare input would get a large weight by chance,
    # and its group a large scale.
    damped.diagonal().add_(ridge * float(damped.diagonal().mean()))
    lower = torch.linalg.cholesky(damped)
    correction = torch.cholesky_solve(missing.T.double(), lower).T
    return weights + correction.float()
