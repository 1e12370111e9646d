"""Replace layers of a transformers Llama by fake-quantized ones, so that it computes what the packed model will."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamita.errors import InputError
from llamita.methods.blocks import STEPS
from llamita.methods.runtime_rotations import runtime_rotation
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.weights import FloatSource, Int4Weight, Int8Weight, ModelSource
from llamita.numerics.affine import CODE_RANGE, to_f32
from llamita.numerics.packing import unpack_int4
from llamita.numerics.rotations import Rotations
from llamita.train.fake_quant import FakeQuantEmbedding, FakeQuantLinear, SharedInput, Switch
from llamita.train.load import load_weights

_INSIDE = 0.49  # steps by which a weight may begin beyond the last code
_CROSSED = 0.25  # steps from its code at which a weight begins whose nearest code is another


def prepare(model: Any, rounded: ModelSource, floats: FloatSource | None = None) -> Switch:
    """Change linear layers and tables of a `LlamaForCausalLM` in place, so that its codes are those of `rounded`.

    Parameters become those of `floats`, except for weights whose nearest code is not the one in `rounded`. These move
    towards their code, and past the edge: on the edge itself, the first step would throw half of them back.

    Args:
        rounded: the same model quantized by any method.
        floats: the weights that were rounded, if they are not the model's own. They may have R4.

    Returns:
        the switch that turns the rounding of all layers on and off; it is on.

    Raises:
        InputError: the model has a rotation that training does not support.
    """
    rotations = Rotations() if floats is None else floats.rotations
    if set(rotations.names) - {"R4"}:
        raise InputError("start", "no rotation but R4", f"{', '.join(rotations.names)}", "try --set start=llamita")
    if floats is not None:
        load_weights(model, floats)
    switch, rotation = Switch(), runtime_rotation(rotations)
    for index, layer in enumerate(model.model.layers):
        for step in STEPS:
            shared = SharedInput()
            for name in step:
                weight = rounded.weight(f"model.layers.{index}.{name}")
                if not isinstance(weight, np.ndarray):
                    linear = layer.get_submodule(name)
                    codes, scales, bits = _unpack(weight)
                    _move_to_codes(linear, codes, scales, bits)
                    r4 = rotation if name == "mlp.down_proj" else None
                    layer.set_submodule(name, FakeQuantLinear(linear, bits, scales, shared, switch, r4))
    _prepare_tables(model, rounded, switch)
    return switch


def _prepare_tables(model: Any, rounded: ModelSource, switch: Switch) -> None:
    """Replace embedding and head; tied ones share their weights."""
    table = rounded.weight(EMBEDDING)
    if not isinstance(table, np.ndarray):
        codes, scales, bits = _unpack(table)
        embedding = model.model.embed_tokens
        _move_to_codes(embedding, codes, scales, bits)
        model.model.embed_tokens = FakeQuantEmbedding(embedding, scales, switch)
    head = table if rounded.config.tied else rounded.weight(HEAD)
    if not isinstance(head, np.ndarray):
        codes, scales, bits = _unpack(head)
        if not rounded.config.tied:
            _move_to_codes(model.lm_head, codes, scales, bits)
        model.lm_head = FakeQuantLinear(model.lm_head, bits, scales, SharedInput(), switch)


def _unpack(weight: Int4Weight | Int8Weight) -> tuple[Tensor, Tensor, int]:
    """Return codes (rows, columns) int8, scales (rows, groups) float32, and bits."""
    if isinstance(weight, Int4Weight):
        codes, bits = unpack_int4(np.asarray(weight.packed)), 4
    else:
        codes, bits = np.array(weight.codes), 8
    scales = np.array(to_f32(weight.scales)).reshape(len(codes), -1)
    return torch.from_numpy(codes), torch.from_numpy(scales), bits


def _move_to_codes(module: nn.Linear | nn.Embedding, codes: Tensor, scales: Tensor, bits: int) -> None:
    """Move weights in place, so that the nearest code of each is the one in `codes`."""
    weight = module.weight
    wanted = codes.to(weight.device).reshape(*scales.shape, -1).float()
    spacing = scales.to(weight.device)[..., None]
    lowest, highest = CODE_RANGE[bits]
    given = weight.detach().float().reshape(wanted.shape)
    steps = given * (1.0 / spacing)
    inside = steps.clamp(lowest - _INSIDE, highest + _INSIDE)  # beyond the last code there is no gradient
    moved = torch.where(inside.round() == wanted, inside, wanted + _CROSSED * (inside - wanted).sign())
    stays = (moved == steps) & (steps.round() == wanted)  # keep these bit for bit: s·(w/s) may differ from w
    with torch.no_grad():
        weight.copy_(torch.where(stays, given, moved * spacing).reshape(weight.shape))
