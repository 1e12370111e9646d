"""Build a program of one forward pass from transformers' Llama, caches, and a packed model's codes and scales.

`forward(tokens, input_pos)` takes tokens int64 (1, n) and the position of the first, input_pos int64 (1,). It returns
the logits behind the last one, float32 (1, vocab). ExecuTorch's runner for text models calls it so. Codes and scales
become torchao's tensors as they are; nothing is quantized here.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from llamita.export.caches import DYNAMIC, STATIC, LayerCache, StaticCache
from llamita.export.embedding import embedding_of
from llamita.export.empty_llama import empty_llama, put
from llamita.export.source import codes_of
from llamita.imports.torchao import PER_TOKEN
from llamita.methods.blocks import NORMS
from llamita.models.names import EMBEDDING, HEAD, HEAD_NORMS
from llamita.models.packed import PackedModel
from llamita.models.peft import StoredAdapter
from llamita.models.weights import Int4Weight, Weight, bias_of
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import core_signs, factor

INT4: Any = vars(torch)["int4"]  # Torch's stubs lack it


class LoRALinear(nn.Module):
    """W·x + s·B·(A·x); A and B in float32."""

    def __init__(self, linear: nn.Module, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = _bare_linear(down), _bare_linear(up * scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (..., inputs) into (..., outputs)."""
        return self.linear(x) + self.up(self.down(x))


class RotatedLinear(nn.Module):
    """A linear layer behind the run-time rotation R4, H·x / √n, for orders that are a power of two times K."""

    signs: Tensor | None
    rows: Tensor
    columns: Tensor

    def __init__(self, linear: nn.Module, size: int, is_static: bool) -> None:
        super().__init__()
        self.linear, (self.core, power), self.is_static = linear, factor(size), is_static
        self.length = 2**power
        matrix = None
        if self.core > 1:
            matrix = torch.from_numpy(core_signs(self.core).astype(np.float32)) * self.core**-0.5
        self.register_buffer("signs", matrix, persistent=False)
        if is_static:  # H of 2^a·2^b is the Kronecker product of those of 2^a and 2^b
            self.register_buffer("rows", hadamard(2 ** (power // 2)), persistent=False)
            self.register_buffer("columns", hadamard(2 ** (power - power // 2)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (..., size) into (..., outputs)."""
        y = x.reshape(*x.shape[:-1], self.core, self.length)
        y = self._plainly(y) if self.is_static else torch.ops.llama.fast_hadamard_transform(y)
        if self.signs is not None:
            y = torch.matmul(self.signs, y)
        return self.linear(y.reshape(x.shape))

    def _plainly(self, y: Tensor) -> Tensor:
        """Transform the last axis by two small matrices, which every backend can multiply by."""
        parts = y.reshape(*y.shape[:-1], len(self.rows), len(self.columns))
        return torch.matmul(torch.matmul(self.rows, parts), self.columns).reshape(y.shape)


def hadamard(order: int) -> Tensor:
    """Return Sylvester's matrix of a power of two over the root of its order, float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * order**-0.5


class Program(nn.Module):
    """A forward pass with caches; see the head of this file.

    Attributes:
        context: tokens that the caches hold.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, llama: Any, head: nn.Module, context: int, is_static: bool) -> None:
        super().__init__()
        self.model, self.head, self.context, self.is_static = llama.model, head, context, is_static
        with torch.no_grad():
            cos, sin = llama.model.rotary_emb(torch.zeros(1, 1), torch.arange(context)[None])
        self.register_buffer("cos", cos[0].contiguous(), persistent=False)  # (context, head_dim)
        self.register_buffer("sin", sin[0].contiguous(), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Turn tokens (1, n) from position input_pos (1,) on into logits (1, vocab); static programs have n = 1."""
        start: Any = input_pos
        if not self.is_static:
            start = input_pos[0].item()
            torch._check(start >= 0)
            torch._check(start + tokens.shape[1] <= self.context)
        turns = tuple(self._rows(table, start, tokens.shape[1]) for table in (self.cos, self.sin))
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            cache = layer.self_attn.cache
            cache.start = start
            x = layer(x, attention_mask=None, position_embeddings=turns, past_key_values=cache)
        return self.head(self.model.norm(x[:, -1]))

    def _rows(self, table: Tensor, start: Any, count: Any) -> Tensor:
        """Return the rows of a table for these positions, (1, count, head_dim)."""
        return (table.index_select(0, start) if self.is_static else table.narrow(0, start, count))[None]


def make_program(
    packed: PackedModel, context: int, adapter: StoredAdapter | None = None, embedding_bits: int = 8,
    *, is_static: bool = False, activations: str | None = PER_TOKEN,
) -> Program:  # fmt: skip
    """Return a packed model as a program.

    Args:
        context: tokens that the caches hold.
        adapter: an adapter to compute next to the weights, unmerged.
        embedding_bits: 8, or 4 to round an int8 embedding further.
        is_static: use plain operators and one token at a time; see `caches`.
        activations: how they are rounded before a linear layer; None leaves them float.
    """
    llama = empty_llama(packed, STATIC if is_static else DYNAMIC)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config)  # with values: the other is empty
    cache_class = StaticCache if is_static else LayerCache
    for index, layer in enumerate(llama.model.layers):
        window = packed.config.window_of(index)
        layer.self_attn.cache = cache_class(context, packed.config.kv_heads, packed.config.head_dim, window)
        for name in packed.config.linear_shapes():
            module = f"model.layers.{index}.{name}"
            put(layer, name, _linear_of(packed, module, adapter, activations, is_static))
        for name in NORMS + (HEAD_NORMS if packed.config.qk_norm else ()):
            layer.get_submodule(name).weight = _parameter(packed.vector(f"model.layers.{index}.{name}.weight"))
    llama.model.norm.weight = _parameter(packed.vector("model.norm.weight"))
    llama.model.embed_tokens = embedding_of(packed, embedding_bits)
    return Program(llama, _head_of(packed, activations), context, is_static).eval()


def _linear_of(
    packed: PackedModel, name: str, adapter: StoredAdapter | None, activations: str | None, is_static: bool
) -> nn.Module:
    linear: nn.Module = _linear(packed.weight(name), bias_of(packed, name), activations)
    if packed.rotations.r4_size and name.endswith(".down_proj"):
        linear = RotatedLinear(linear, packed.rotations.r4_size, is_static)
    if adapter is not None and name in adapter.pairs:
        down, up = (torch.from_numpy(np.array(to_f32(one))) for one in adapter.pairs[name])
        linear = LoRALinear(linear, down, up, adapter.scaling)
    return linear


def _head_of(packed: PackedModel, activations: str | None) -> nn.Module:
    head = _linear(packed.weight(EMBEDDING if packed.config.tied else HEAD), None, activations)
    transform = packed.rotations.head_transform
    if transform is None:
        return head
    return nn.Sequential(_bare_linear(torch.from_numpy(np.array(to_f32(transform)))), head)


def _linear(weight: Weight, bias: np.ndarray | None, activations: str | None) -> nn.Linear:
    """Return a linear layer with these codes or floats for its weights."""
    linear = _bare_linear(tensor_of(weight, activations))
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear


def tensor_of(weight: Weight, activations: str | None) -> Tensor:
    """Return a matrix as torchao's tensor of codes and scales, or in float32.

    Args:
        activations: how they are rounded before they meet codes, in torchao's words; None leaves them float.
    """
    if isinstance(weight, np.ndarray):
        return torch.from_numpy(np.array(to_f32(weight)))
    codes, dtype = codes_of(weight), INT4 if isinstance(weight, Int4Weight) else torch.int8
    scales = torch.from_numpy(np.array(to_f32(weight.scales)).reshape(len(codes), -1))
    return IntxUnpackedToInt8Tensor(
        torch.from_numpy(codes), scales, torch.zeros(scales.shape, dtype=torch.int8), dtype,
        (1, codes.shape[1] // scales.shape[1]), torch.float32, activations,
    )  # fmt: skip


def _bare_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _parameter(vector: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(vector)), requires_grad=False)
