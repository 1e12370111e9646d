"""One decoder layer at a time in float32: the modules of transformers, run in the four steps of calibration.

A step is a group of linear layers that read the same input. A block returns that input, so that a group can be rounded
when those before it in the block already are. A block of the quantized model rounds the activations in front of each
linear layer, as the engine does.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamita import _native
from llamita.methods.architecture import class_of, transformers_config, window_mask
from llamita.methods.rtn import rule_of
from llamita.models.config import ModelConfig
from llamita.models.names import HEAD_NORMS
from llamita.models.weights import FloatSource, bias_of, check_finite
from llamita.numerics.affine import dequantize, to_f32
from llamita.numerics.scheme import QuantScheme

STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
Activations = Callable[[Tensor], Tensor]


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position, each (1, length, head_dim)."""
    embedding = class_of(config, "RotaryEmbedding")(transformers_config(config))
    return embedding(torch.zeros(1), torch.arange(length)[None])


def embed(source: FloatSource, tokens: np.ndarray, scheme: QuantScheme | None) -> Tensor:
    """Return the hidden states before the first block, (samples, length, hidden) float32.

    Args:
        tokens: int32 (samples, length).
        scheme: rounds the table as in the quantized model; None keeps it in float.
    """
    used, places = np.unique(tokens, return_inverse=True)
    rows = source.weight("model.embed_tokens")[used]
    if scheme is not None and scheme.kind("model.embed_tokens").bits == 8:
        codes, scales, _ = _native.round_weights(rows, 8, rows.shape[1], rule_of(scheme), None)
        rows = dequantize(codes, scales)
    table = torch.from_numpy(np.ascontiguousarray(to_f32(rows)))
    return table[torch.from_numpy(places.reshape(tokens.shape))]


class Block:
    """A decoder layer with weights and hidden states in float32.

    Attributes:
        linears: its linear layers by their name within the block, weights (outputs, inputs) float32.
    """

    def __init__(
        self, source: FloatSource, index: int, rotary: tuple[Tensor, Tensor],
        activations: Activations | None = None, rotation: Activations | None = None,
        floats: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Read layer `index` of the source.

        Args:
            activations: the change of each input of a linear layer; None for no change.
            rotation: the run-time rotation of down_proj's inputs, before that change.
            floats: linear layers that stay float, by their name within the block; their inputs do not change.

        Raises:
            InputError: weights that are not finite.
        """
        self.name, config = f"model.layers.{index}", source.config
        with torch.device("meta"):  # the weights follow, so nothing is drawn or takes memory twice
            self.layer: Any = class_of(config, "DecoderLayer")(transformers_config(config), index).eval()
        self.linears: dict[str, Any] = {name: self.layer.get_submodule(name) for step in STEPS for name in step}
        for name, linear in self.linears.items():
            self.set_weight(name, _weight(source, f"{self.name}.{name}"))
            bias = bias_of(source, f"{self.name}.{name}")
            linear.bias = None if bias is None else _parameter(torch.from_numpy(bias.copy()))
        for norm in NORMS + (HEAD_NORMS if config.qk_norm else ()):
            vector = source.vector(f"{self.name}.{norm}.weight")
            self.layer.get_submodule(norm).weight = _parameter(torch.from_numpy(np.array(vector, np.float32)))
        self.layer.self_attn.o_proj = nn.Identity()  # attention returns the input of o_proj
        self._rotary = rotary
        self._mask = window_mask(config.window_of(index), rotary[0].shape[1])
        self._activations = activations or _same
        self._rotation = rotation or _same
        self._floats = set(floats)
        for name in self._floats - {"self_attn.o_proj", "mlp.down_proj"}:
            self.linears[name].register_forward_pre_hook(lambda *_: self._normed)

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace a linear layer's weight, (outputs, inputs) float32."""
        self.linears[name].weight = _parameter(weight)

    def weight(self, name: str) -> Tensor:
        """Return a linear layer's weight, (outputs, inputs) float32."""
        return self.linears[name].weight.detach()

    def inputs(self, step: int, states: Tensor) -> Tensor:
        """Return what the rounded linear layers of a step read, activations rounded: (samples, length, inputs).

        Args:
            states: the residual stream at the beginning of the block, or for the last two steps between attention and
                MLP; (samples, length, hidden).
        """
        return self._activations(self._float_inputs(step, states))

    def _float_inputs(self, step: int, states: Tensor) -> Tensor:
        """Return the same before its last rounding, as a float layer reads it."""
        layer = self.layer
        norm = layer.input_layernorm if step < 2 else layer.post_attention_layernorm
        self._normed = norm(states)
        if step in (0, 2):
            return self._normed
        x = self._activations(self._normed)
        if step == 1:
            return layer.self_attn(x, position_embeddings=self._rotary, attention_mask=self._mask)[0]
        gated = layer.mlp.act_fn(self.linears["mlp.gate_proj"](x)) * self.linears["mlp.up_proj"](x)
        return self._rotation(gated)

    def _output(self, name: str, step: int, states: Tensor) -> Tensor:
        """Return the output of the only linear layer of a step."""
        read = self._float_inputs if name in self._floats else self.inputs
        return self.linears[name](read(step, states))

    def after_attention(self, before: Tensor) -> Tensor:
        """Return the residual stream between attention and MLP."""
        return before + self._output("self_attn.o_proj", 1, before)

    def after_mlp(self, middle: Tensor) -> Tensor:
        """Return the residual stream at the end."""
        return middle + self._output("mlp.down_proj", 3, middle)

    def __call__(self, before: Tensor) -> Tensor:
        """Run the whole block, differentiable in `before` and in its weights."""
        return self.after_mlp(self.after_attention(before))


def _weight(source: FloatSource, name: str) -> Tensor:
    stored = source.weight(name)
    check_finite(f"{name}.weight", stored)
    return torch.from_numpy(np.array(to_f32(stored), np.float32))


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _same(x: Tensor) -> Tensor:
    return x
