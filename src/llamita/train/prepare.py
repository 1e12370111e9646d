"""A transformers Llama that computes what its quantized self will, with fake-quantized layers for its own."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamita.errors import InputError
from llamita.methods.blocks import STEPS
from llamita.methods.runtime_rotations import runtime_rotation
from llamita.models.weights import FloatSource, Int4Weight, Int8Weight, ModelSource
from llamita.numerics.affine import CODE_RANGE, to_f32
from llamita.numerics.packing import unpack_int4
from llamita.numerics.rotations import Rotations
from llamita.train.fake_quant import FakeQuantEmbedding, FakeQuantLinear, SharedInput, Switch

_TABLE, _HEAD = "model.embed_tokens", "lm_head"
_INSIDE = 0.49  # of a step, how far beyond the last code a weight may begin
_CROSSED = 0.25  # how far from its code a weight begins whose code is not the nearest, in steps


def prepare(model: Any, rounded: ModelSource, floats: FloatSource | None = None) -> Switch:
    """Change linear layers and tables of a `LlamaForCausalLM` in place, so that codes are those of `rounded`.

    Parameters become those of `floats`, but for weights whose nearest code is another: these move to their
    code's side, not to its very edge, from where the first step would throw half of them back.

    Args:
        rounded: the same model quantized, by whatever method.
        floats: what was rounded, where that is not the model's own weights. It may have R4.

    Returns:
        what turns the rounding of all layers on and off; it is on.

    Raises:
        InputError: the model is rotated in a way that training has not.
    """
    rotations = Rotations() if floats is None else floats.rotations
    if set(rotations.names) - {"R4"}:
        raise InputError("start", "no rotation but R4", f"{', '.join(rotations.names)}", "try --set start=llamita")
    if floats is not None:
        _take(model, floats)
    switch, online = Switch(), runtime_rotation(rotations)
    for index, layer in enumerate(model.model.layers):
        for step in STEPS:
            shared = SharedInput()
            for name in step:
                weight = rounded.weight(f"model.layers.{index}.{name}")
                if not isinstance(weight, np.ndarray):
                    linear = layer.get_submodule(name)
                    codes, scales, bits = _read(weight)
                    _move(linear, codes, scales, bits)
                    turn = online if name == "mlp.down_proj" else None
                    _set(layer, name, FakeQuantLinear(linear, bits, scales, shared, switch, turn))
    _prepare_tables(model, rounded, switch)
    return switch


def _prepare_tables(model: Any, rounded: ModelSource, switch: Switch) -> None:
    """Embedding and head, which are one where they are tied."""
    table = rounded.weight(_TABLE)
    if not isinstance(table, np.ndarray):
        codes, scales, bits = _read(table)
        embedding = model.model.embed_tokens
        _move(embedding, codes, scales, bits)
        model.model.embed_tokens = FakeQuantEmbedding(embedding, scales, switch)
    head = table if rounded.config.tied else rounded.weight(_HEAD)
    if not isinstance(head, np.ndarray):
        codes, scales, bits = _read(head)
        if not rounded.config.tied:
            _move(model.lm_head, codes, scales, bits)
        model.lm_head = FakeQuantLinear(model.lm_head, bits, scales, SharedInput(), switch)


def _take(model: Any, floats: FloatSource) -> None:
    """The weights of a source of the same shape; of a tied head, those of the embedding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = floats.vector(name) if parameter.ndim == 1 else floats.weight(name.removesuffix(".weight"))
            parameter.copy_(torch.from_numpy(np.array(to_f32(values))))


def _read(weight: Int4Weight | Int8Weight) -> tuple[Tensor, Tensor, int]:
    """Codes (rows, columns) int8, scales (rows, groups) float32, bits."""
    if isinstance(weight, Int4Weight):
        codes, bits = unpack_int4(np.asarray(weight.packed)), 4
    else:
        codes, bits = np.array(weight.codes), 8
    scales = np.array(to_f32(weight.scales)).reshape(len(codes), -1)
    return torch.from_numpy(codes), torch.from_numpy(scales), bits


def _move(module: nn.Linear | nn.Embedding, codes: Tensor, scales: Tensor, bits: int) -> None:
    weight = module.weight
    wanted = codes.to(weight.device).reshape(*scales.shape, -1).float()
    spacing = scales.to(weight.device)[..., None]
    lowest, highest = CODE_RANGE[bits]
    given = weight.detach().float().reshape(wanted.shape)
    steps = given * (1.0 / spacing)
    inside = steps.clamp(lowest - _INSIDE, highest + _INSIDE)  # beyond the last code there is no gradient
    beside = torch.where(inside.round() == wanted, inside, wanted + _CROSSED * (inside - wanted).sign())
    stays = (beside == steps) & (steps.round() == wanted)  # to the last bit, as s·(w/s) may not
    with torch.no_grad():
        weight.copy_(torch.where(stays, given, beside * spacing).reshape(weight.shape))


def _set(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(layer.get_submodule(parent), own, module)
