"""Logits of a source by Torch: float, or rounded to nearest with int8 activations; rotations act at run time."""

from typing import Any

import numpy as np
import torch

from llamita.methods import rtn
from llamita.methods.activations import quantize_activations
from llamita.methods.blocks import Block, rotary_tables
from llamita.methods.runtime_rotations import runtime_rotation
from llamita.models.names import linear_names
from llamita.models.weights import FloatSource
from llamita.numerics.affine import dequantize, to_f32
from llamita.numerics.scheme import QuantScheme


class _Rounded:
    """A source whose matrices are what their codes and scales stand for."""

    def __init__(self, source: FloatSource, scheme: QuantScheme) -> None:
        self._source, self._scheme = source, scheme
        self._round = rtn.rounder(source, scheme)  # type: ignore[arg-type]
        self._linears = linear_names(source.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def weight(self, name: str) -> np.ndarray:
        if name not in self._linears and not self._scheme.table_bits:
            return self._source.weight(name)
        return np.concatenate([dequantize(piece.codes, piece.scales) for piece in self._round(name)])


def logits_of(source: FloatSource, tokens: np.ndarray, scheme: QuantScheme | None = None) -> torch.Tensor:
    """float32 (samples, length, vocab) of tokens (samples, length)."""
    config, rotations = source.config, source.rotations
    model: Any = source if scheme is None else _Rounded(source, scheme)
    activations = None if scheme is None else quantize_activations
    rotary = rotary_tables(config, tokens.shape[1])
    table = _tensor(model.weight("model.embed_tokens"))
    with torch.no_grad():
        x = table[torch.from_numpy(tokens.astype(np.int64))]
        for layer in range(config.layers):
            x = Block(model, layer, rotary, activations, runtime_rotation(rotations))(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
        x = x * _tensor(source.vector("model.norm.weight"))
        if rotations.head_transform is not None:
            x = x @ _tensor(rotations.head_transform).T
        if scheme is not None and scheme.table_bits:
            x = quantize_activations(x)
        return x @ (table if config.tied else _tensor(model.weight("lm_head"))).T


def mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over tokens of KL(reference || logits), in nats."""
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(to_f32(array), np.float32))
