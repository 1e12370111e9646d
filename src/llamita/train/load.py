"""Make transformers' model of a float model: its classes, and weights from any `FloatSource`."""

from typing import Any

import numpy as np
import torch
from torch import nn

from llamita.methods.architecture import class_of, transformers_config
from llamita.models.weights import FloatSource, check_finite
from llamita.numerics.affine import to_f32


def load_float(source: FloatSource) -> Any:
    """Return transformers' model in float32, on the CPU."""
    with torch.device("meta"):  # the weights follow, so nothing is drawn or takes memory twice
        model = class_of(source.config, "ForCausalLM")(transformers_config(source.config)).float()
    for name, _ in list(model.named_parameters()):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Parameter(_tensor(source, name)))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # has buffers, which a source does not
    model.tie_weights()
    return model.eval()


def load_weights(model: Any, source: FloatSource) -> None:
    """Replace the weights by those of a source of the same shape; a tied head has those of the embedding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_tensor(source, name))


def _tensor(source: FloatSource, name: str) -> torch.Tensor:
    is_matrix = name.endswith(".weight") and len(source.info(name).shape) > 1
    values = source.weight(name.removesuffix(".weight")) if is_matrix else source.vector(name)
    check_finite(name, values)
    return torch.from_numpy(np.array(to_f32(values)))
