"""Keep keys and values in an exported program, and attend to them: two ways, for two kinds of backends.

`LayerCache` runs ExecuTorch's own operators for language models, on any number of tokens at once: for CPUs, and for
GPUs by Vulkan. `StaticCache` has plain operators of one shape, for one token at a time, as compilers for neural
processors need them (Core ML, Qualcomm, MediaTek).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

DYNAMIC, STATIC = "llamita_dynamic_cache", "llamita_static_cache"  # names in transformers' registry of attention
_NEVER = -30000.0  # instead of minus infinity, which float16 arithmetic does not always survive


class LayerCache(nn.Module):
    """Keys and values of a layer, float32 (1, context, kv_heads, head_dim), as transformers updates a cache.

    Attributes:
        start: the position of this pass's first token, a number; set before each pass.
        window: positions that a query sees, its own included; 0 for all.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None

    def __init__(self, context: int, heads: int, head_dim: int, window: int = 0) -> None:
        super().__init__()
        self.window = window if window < context else 0
        self.register_buffer("positions", torch.arange(context) if self.window else None, persistent=False)
        self.register_buffer("keys", torch.zeros(1, context, heads, head_dim), persistent=False)
        self.register_buffer("values", torch.zeros(1, context, heads, head_dim), persistent=False)
        self.start: Any = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values (1, kv_heads, n, head_dim), and return the whole caches."""
        del layer
        torch.ops.llama.update_cache(keys.transpose(1, 2), self.keys, self.start)
        torch.ops.llama.update_cache(values.transpose(1, 2), self.values, self.start)
        return self.keys, self.values


class StaticCache(nn.Module):
    """Keys and values of a layer, float32 (1, kv_heads, context, head_dim), in plain operators.

    Attributes:
        start: the position of this pass's token, (1,) int64; set before each pass.
        window: positions that a query sees, its own included; 0 for all.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, context: int, heads: int, head_dim: int, window: int = 0) -> None:
        super().__init__()
        self.window = window if window < context else 0
        self.register_buffer("keys", torch.zeros(1, heads, context, head_dim), persistent=False)
        self.register_buffer("values", torch.zeros(1, heads, context, head_dim), persistent=False)
        self.start: Any = torch.zeros(1, dtype=torch.int64)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write the new token's keys and values (1, kv_heads, 1, head_dim), and return the whole caches."""
        del layer
        self.keys[:, :, self.start] = keys
        self.values[:, :, self.start] = values
        return self.keys, self.values


def attend(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Any, **options: Any) -> Any:
    """Return causal attention (1, n, heads, head_dim) of queries (1, heads, n, head_dim) on whole caches."""
    cache, scale, mask = module.cache, options["scaling"], None
    if cache.window:  # (n, context), added to the scores
        distance = cache.positions.narrow(0, cache.start, query.shape[2])[:, None] - cache.positions
        mask = torch.where((distance >= 0) & (distance < cache.window), 0.0, -torch.inf)
    is_causal = mask is None
    out = torch.ops.llama.custom_sdpa(query.transpose(1, 2), keys, values, cache.start, mask, 0.0, is_causal, scale)
    return out, None


def attend_plainly(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Any, **options: Any) -> Any:
    """Return the same as `attend` for one token's queries on static caches."""
    del mask
    kv_heads, context, head_dim = keys.shape[1:]
    grouped = query.reshape(1, kv_heads, -1, head_dim)  # heads that share keys are neighbours
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * options["scaling"]  # (1, kv_heads, group, context)
    is_unseen = torch.arange(context) > module.cache.start
    if module.cache.window:
        is_unseen = is_unseen | (torch.arange(context) <= module.cache.start - module.cache.window)
    weights = torch.softmax(scores + is_unseen.to(scores.dtype) * _NEVER, dim=-1)
    return torch.matmul(weights, values).reshape(1, 1, -1, head_dim), None


AttentionInterface.register(DYNAMIC, attend)
AttentionInterface.register(STATIC, attend_plainly)
