"""Other implementations of W4A8 against the engine, each layer on what the engine's layer read.

Float sums end in other bits on another CPU. Where an activation is next to a half of its token's scale,
these bits choose between two codes, and from there on models differ by steps of 1/255 of a range. So no
tolerance on the logits of whole models holds everywhere. Here no layer sees what a layer before it made of
its last bits: its own input is compared with the engine's and replaced by it, and its output with the exact
product. What may differ there follows from float32 and from the codes that are next to a half.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llamita import _native as ops
from llamita.engine.llm import LLM
from llamita.engine.model import LINEAR_INPUTS
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.weights import Int4Weight, Int8Weight, ModelSource, bias_of
from llamita.numerics.affine import quantize_activations, to_f32
from llamita.numerics.packing import unpack_int4

UNIT = 2.0**-24  # the relative error of rounding to float32 once
# Between two inputs that are replaced, a value passes some 400 roundings at most: attention scores of up to
# 10, sums over 32 dimensions, in an exponent, then a sum over 40 tokens. All of them in one direction would
# be 400 units of the largest value. What a mistake of one code makes is some 60,000.
NOISE = 1024 * UNIT
# Codes are rounded from at most 255 steps, in four roundings: the scale, its reciprocal, the product, a sum.
TIE = 4 * 255 * UNIT
_AROUND = 8  # roundings of a product that are not its sum: weights and activations multiplied out, a bias

READERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Passed:
    """What passed the engine.

    Attributes:
        inputs: of every linear layer and the head by name, before rounding: float32 (tokens, columns).
        logits: float32 (tokens, vocab).
    """

    inputs: dict[str, np.ndarray]
    logits: np.ndarray

    def last(self, first: int) -> "Passed":
        """The same for another model whose head sees the tokens from `first` on alone."""
        return Passed(self.inputs | {HEAD: self.inputs[HEAD][first:]}, self.logits[first:])


def watch(llm: LLM, ids: Any, adapter: str | None = None) -> Passed:
    """Run the engine over token ids (length,) or (samples, length), whose tokens follow each other then."""
    parts = [_watch(llm, np.array(row, np.int32), adapter) for row in np.atleast_2d(np.asarray(ids))]
    inputs = {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    return Passed(inputs, np.concatenate([part.logits for part in parts]))


def _watch(llm: LLM, ids: np.ndarray, adapter: str | None) -> Passed:
    model, inputs = llm.model, {}
    stream = np.empty(0, np.float32)
    cache = llm.new_sequence(len(ids))
    cache.adapter = None if adapter is None else llm.adapters[adapter]
    for number, view in enumerate(model.watch([(cache, ids)])):
        stream = view.stream.copy()
        for place in LINEAR_INPUTS if view.inputs else ():
            for name in READERS[place]:
                inputs[f"model.layers.{number - 1}.{name}"] = view.inputs[place].copy()
    hidden, weights = np.empty_like(stream), model.weights
    ops.rmsnorm(stream, weights.norm, llm.config.norm_eps, hidden)
    inputs[HEAD] = hidden
    if weights.head_transform is not None:
        inputs[HEAD] = np.empty_like(hidden)
        ops.linear(weights.head_transform, hidden, inputs[HEAD])
    return Passed(inputs, model._head(stream, None).copy())


class Guide:
    """Compares what layers read and write with the engine's, and gives them the engine's in place of it.

    Args:
        source: of the codes and scales that all have.
        orders: by name, of a layer's outputs in the other model, where it is another.
    """

    def __init__(self, source: ModelSource, passed: Passed, orders: Mapping[str, np.ndarray] | None = None) -> None:
        self._source, self._passed, self._orders = source, passed, orders or {}
        self._seen = dict.fromkeys(passed.inputs, 0)  # rows that each layer has written

    def read(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """The engine's input of this layer, in place of its own (..., columns), before rounding."""
        x = self._rows(name, own)
        found = own.detach().numpy().reshape(x.shape)
        assert np.abs(found - x).max() <= NOISE * np.abs(x).max(), f"input of {name}"
        return torch.from_numpy(x).reshape(own.shape)

    def write(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """The exact output of this layer, in place of its own (..., rows)."""
        x = self._rows(name, own)
        self._seen[name] += len(x)
        exact, allowed = self._product(name, x)
        found = own.detach().numpy().reshape(exact.shape)
        assert (np.abs(found - exact) <= allowed).all(), f"output of {name}"
        return torch.from_numpy(exact.astype(np.float32)).reshape(own.shape)

    def finish(self) -> None:
        """See that every layer has had all tokens, and the engine's logits are those of its head's input."""
        assert self._seen == {name: len(x) for name, x in self._passed.inputs.items()}
        order = self._orders.get(HEAD, slice(None))
        exact, allowed = self._product(HEAD, self._passed.inputs[HEAD])
        assert (np.abs(self._passed.logits[:, order] - exact) <= allowed).all(), "the engine's logits"

    def _rows(self, name: str, own: torch.Tensor) -> np.ndarray:
        count = own.numel() // own.shape[-1]
        return self._passed.inputs[name][self._seen[name] :][:count]

    def _product(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 (tokens, rows): the product with the codes of x, and how far another may be from it."""
        tied = name == HEAD and self._source.config.tied
        weight = self._source.weight(EMBEDDING if tied else name)
        order = self._orders.get(name, slice(None))
        values = values_of(weight)[order]
        stored = None if name == HEAD else bias_of(self._source, name)
        bias = np.zeros(len(values)) if stored is None else stored.astype(np.float64)[order]
        read, at_half = _rounded(x) if not isinstance(weight, np.ndarray) else (x.astype(np.float64), None)
        sizes = np.abs(read) @ np.abs(values).T + np.abs(bias)
        # A sum of n products in any order is within n units of the sum of their sizes (Higham 2002, (3.5)).
        allowed = (x.shape[1] + _AROUND) * UNIT * sizes
        if at_half is not None:
            allowed += at_half @ np.abs(values).T
        return read @ values.T + bias, allowed


def values_of(weight: Int4Weight | Int8Weight | np.ndarray) -> np.ndarray:
    """float64 (rows, columns)."""
    if isinstance(weight, np.ndarray):
        return to_f32(weight).astype(np.float64)
    codes = unpack_int4(weight.packed) if isinstance(weight, Int4Weight) else np.asarray(weight.codes)
    scales = to_f32(weight.scales).astype(np.float64).reshape(len(codes), -1)
    return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def _rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64: x (tokens, columns) as its codes stand for it, and a step wherever x is next to a half."""
    codes, scales, zeros = quantize_activations(x)
    wide = scales.astype(np.float64)[:, None]
    steps = x / wide
    at_half = np.abs(steps - np.floor(steps) - 0.5) <= TIE
    return (codes.astype(np.float64) - zeros[:, None]) * wide, at_half * wide


@contextmanager
def guided(
    modules: Mapping[str, Any], source: ModelSource, passed: Passed,
    orders: Mapping[str, np.ndarray] | None = None,
) -> Iterator[None]:  # fmt: skip
    """While the other model runs, take its linear layers along the engine; fail where one differs.

    Args:
        modules: the other model's by the engine's names, as they read what is then rounded.
    """
    guide, hooks = Guide(source, passed, orders), []

    def attach(name: str, module: Any) -> None:
        turn = getattr(module, "rotation", None)
        if turn is None:
            hooks.append(module.register_forward_pre_hook(lambda _, given: (guide.read(name, given[0]),)))
        else:  # of `FakeQuantLinear`: it rotates what it is given
            module.rotation = lambda x: guide.read(name, turn(x))
        hooks.append(module.register_forward_hook(lambda _module, _given, out: guide.write(name, out)))

    for name, module in modules.items():
        attach(name, module)
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
    guide.finish()


def linear_modules(model: Any, source: ModelSource) -> dict[str, Any]:
    """Those of a model with transformers' names."""
    shapes = source.config.linear_shapes()
    names = [f"model.layers.{i}.{name}" for i in range(source.config.layers) for name in shapes]
    return {name: model.get_submodule(name) for name in [*names, HEAD]}
