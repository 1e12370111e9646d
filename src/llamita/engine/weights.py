"""Repacks the weights of a model once, at load, into the order of the kernels.

Layers that read the same input (q, k, v; gate, up) become one native layer, so that a block costs four products
instead of seven. Float weights are not copied: they stay in the mapped file.
"""

from dataclasses import dataclass

import numpy as np

from llamita import _native
from llamita.errors import InputError
from llamita.models.names import HEAD_NORMS
from llamita.models.weights import Int4Weight, Int8Weight, ModelSource, bias_of
from llamita.numerics.hadamard import core_signs, factor

FLOAT_MATHS = ("f32", "bf16")  # how float layers are multiplied; the first is the reference


@dataclass(frozen=True)
class Part:
    """Native weights of one kind, which compute the columns `start` to `stop` of their layer's output.

    Gated weights are the only part of their layer and fill the first half of the columns.
    """

    weights: _native.Weights
    bias: np.ndarray | None  # float32 (stop - start,)
    start: int
    stop: int
    is_quantized: bool  # it takes int8 activations


@dataclass(frozen=True)
class Linear:
    """One linear layer or several fused ones, with a single part unless their kinds differ."""

    parts: tuple[Part, ...]
    takes_codes: bool  # some part takes int8 activations
    takes_floats: bool  # some part takes float32 activations

    @property
    def is_gated(self) -> bool:
        """True if gate and up are one product, of which only silu(gate) · up comes out."""
        return self.parts[0].weights.gated


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one transformer block."""

    attention_norm: np.ndarray  # float32 (hidden,)
    qkv: Linear
    head_norms: tuple[np.ndarray, np.ndarray] | None  # of queries and of keys, float32 (head_dim,) each
    attention_out: Linear
    mlp_norm: np.ndarray  # float32 (hidden,)
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class ModelWeights:
    """All weights of a model. With tied tables the head is the embedding."""

    embedding: _native.Weights
    blocks: tuple[BlockWeights, ...]
    norm: np.ndarray  # float32 (hidden,)
    head: Linear
    down_rotation: _native.Hadamard | None  # R4, applied to the inputs of down projections
    head_transform: _native.Weights | None  # float (hidden, hidden), applied to the inputs of the head

    @property
    def float_math(self) -> str:
        """How float layers are multiplied, "f32" or "bf16": the latter only if some layer is, on this processor."""
        layers = [self.head, *(x for b in self.blocks for x in (b.qkv, b.attention_out, b.gate_up, b.down))]
        return FLOAT_MATHS[any(part.weights.bf16_products for layer in layers for part in layer.parts)]


def load_weights(source: ModelSource, gated: bool = True, float_math: str = FLOAT_MATHS[0]) -> ModelWeights:
    """Read and repack every weight.

    Args:
        gated: compute gate, up and SwiGLU as one product. Then no adapter can add to gate or up.
        float_math: "bf16" rounds the inputs of bf16 layers to bf16 where the processor multiplies that.

    Raises:
        InputError: a tensor does not have the configuration's shape, or its group size does not divide its inputs.
    """
    config = source.config
    tables = (config.vocab_size, config.hidden_size)
    embedding = _linear(source, {"model.embed_tokens": tables}, has_bias=False, float_math=float_math)
    head = embedding if config.tied else load_head(source, float_math)
    blocks = tuple(load_block(source, i, gated, float_math) for i in range(config.layers))
    size, inputs = source.rotations.r4_size, config.intermediate_size
    if size not in (None, inputs):
        raise InputError("rotations: R4: size", f"{inputs}, the inputs of down_proj", f"{size}")
    return ModelWeights(
        embedding=embedding.parts[0].weights,
        blocks=blocks,
        norm=source.vector("model.norm.weight"),
        head=head,
        down_rotation=down_rotation(size) if size else None,
        head_transform=_head_transform(source),
    )


def down_rotation(inputs: int) -> _native.Hadamard:
    """Return R4 for down projections of this many inputs, whose weights hold the inverse transform."""
    core, _ = factor(inputs)
    return _native.Hadamard(inputs, core_signs(core) if core > 1 else None)


def _head_transform(source: ModelSource) -> _native.Weights | None:
    transform, hidden = source.rotations.head_transform, source.config.hidden_size
    if transform is None:
        return None
    if transform.shape != (hidden, hidden):
        raise InputError("lm_head.transform", f"shape {(hidden, hidden)}", f"{transform.shape}")
    return _native.wrap_float([transform])


def load_head(source: ModelSource, float_math: str = FLOAT_MATHS[0]) -> Linear:
    """Read a head that is not tied to the embedding; errors as in `load_weights`."""
    shape = (source.config.vocab_size, source.config.hidden_size)
    return _linear(source, {"lm_head": shape}, has_bias=False, float_math=float_math)


def load_block(source: ModelSource, index: int, gated: bool = True, float_math: str = FLOAT_MATHS[0]) -> BlockWeights:
    """Read one transformer block; errors as in `load_weights`."""
    config, prefix = source.config, f"model.layers.{index}"
    shapes = {f"{prefix}.{name}": shape for name, shape in config.linear_shapes().items()}

    def fused(*names: str, gated: bool = False) -> Linear:
        wanted = {f"{prefix}.{name}": shapes[f"{prefix}.{name}"] for name in names}
        return _linear(source, wanted, gated=gated, float_math=float_math)

    return BlockWeights(
        attention_norm=source.vector(f"{prefix}.input_layernorm.weight"),
        qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=_head_norms(source, prefix),
        attention_out=fused("self_attn.o_proj"),
        mlp_norm=source.vector(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=fused("mlp.gate_proj", "mlp.up_proj", gated=gated),
        down=fused("mlp.down_proj"),
    )


def _head_norms(source: ModelSource, block: str) -> tuple[np.ndarray, np.ndarray] | None:
    if not source.config.qk_norm:
        return None
    queries, keys = (source.vector(f"{block}.{norm}.weight") for norm in HEAD_NORMS)
    return queries, keys


def _linear(
    source: ModelSource,
    shapes: dict[str, tuple[int, int]],
    has_bias: bool = True,
    gated: bool = False,
    float_math: str = FLOAT_MATHS[0],
) -> Linear:
    """Read the named layers as one. Neighbours of the same kind are packed together, as gate and up if `gated`."""
    groups: list[list[str]] = []
    kinds: list[tuple[object, ...]] = []
    weights = {}
    for name, shape in shapes.items():
        weights[name] = source.weight(name)
        kind = _kind(name, weights[name], shape)
        if kinds and kind == kinds[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
            kinds.append(kind)
    parts, start = [], 0
    for names, kind in zip(groups, kinds, strict=True):
        together = [weights[name] for name in names]
        if kind[0] == "int4":
            native = _pack_int4(together, gated=gated and len(names) == 2)
        else:
            rounds = float_math == "bf16"
            native = _pack_int8(together) if kind[0] == "int8" else _native.wrap_float(together, rounds)
        bias = _joined_bias([bias_of(source, name) for name in names]) if has_bias else None
        parts.append(Part(native, bias, start, start + native.rows, is_quantized=kind[0] != "float"))
        start += native.rows
    quantized = [part.is_quantized for part in parts]
    return Linear(tuple(parts), takes_codes=any(quantized), takes_floats=not all(quantized))


def _kind(name: str, weight: Int4Weight | Int8Weight | np.ndarray, shape: tuple[int, int]) -> tuple[object, ...]:
    """Check the shape of a weight; return what must be equal in layers that are packed together."""
    if isinstance(weight, Int4Weight):
        found = (weight.packed.shape[0], weight.packed.shape[1] * 8)  # 8 codes in an int32
        kind = ("int4", weight.group_size, weight.scales.dtype)
        if shape[1] % weight.group_size:
            raise InputError(
                f"{name}.weight",
                f"inputs that are a multiple of the group size {weight.group_size}",
                f"{shape[1]}",
                "try a smaller group size",
            )
    elif isinstance(weight, Int8Weight):
        found, kind = weight.codes.shape, ("int8", weight.scales.dtype)
    else:
        found, kind = weight.shape, ("float", weight.dtype)
    if found != shape:
        raise InputError(f"{name}.weight", f"shape {shape}, by config.json", f"{found}")
    return kind


def _joined_bias(biases: list[np.ndarray | None]) -> np.ndarray | None:
    present = [bias for bias in biases if bias is not None]
    return np.ascontiguousarray(np.concatenate(present), dtype=np.float32) if present else None


def _pack_int4(weights: list[Int4Weight], gated: bool) -> _native.Weights:
    packed, scales = [w.packed for w in weights], [w.scales for w in weights]
    return _native.pack_w4(packed, scales, weights[0].group_size, gated)


def _pack_int8(weights: list[Int8Weight]) -> _native.Weights:
    if len(weights) == 1:
        return _native.pack_w8(weights[0].codes, weights[0].scales)
    codes = np.concatenate([w.codes for w in weights])
    return _native.pack_w8(codes, np.concatenate([w.scales for w in weights]))
