"""Count the work of a model from its shape: multiply-adds, and bytes that must be read.

These are the numerators of every fraction of a limit. They count what the arithmetic needs; the padding of an
implementation, activations and norms are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llamita import _native
from llamita.models.config import ModelConfig
from llamita.models.names import TRANSFORM, linear_names, table_names
from llamita.models.packed import layout, tensor_bytes
from llamita.numerics.scheme import QuantScheme

_MEASURED_CACHE = 1024  # tokens of the cache that is measured: whole blocks of every layout


@dataclass(frozen=True)
class Work:
    """The work of one token.

    Attributes:
        linear: multiply-adds of the blocks' linear layers.
        head: multiply-adds of the head and its transform; a prompt needs them for its last token only.
        attention: multiply-adds for each token that is attended to: scores, and the sum of values.
        weight_bytes: weights and scales of linear layers, head and its transform, as they are stored.
        cache_bytes: keys and values of one token in all layers.
    """

    linear: int
    head: int
    attention: int
    weight_bytes: int
    cache_bytes: int

    def prompt(self, tokens: int) -> int:
        """Return the multiply-adds of the linear layers for a prompt, and of the head for its last token."""
        return self.linear * tokens + self.head

    def prompt_attention(self, tokens: int) -> int:
        """Return the multiply-adds of causal attention over a prompt: token t attends to t tokens."""
        return self.attention * (tokens * (tokens + 1) // 2)

    def decode_bytes(self, prompt_tokens: int, new_tokens: int, batch: int = 1) -> float:
        """Return the bytes read in a step over `batch` sequences, on average over the tokens after a prompt."""
        attended = prompt_tokens + (new_tokens + 1) / 2
        return self.weight_bytes + batch * self.cache_bytes * attended

    def decode_multiply_adds(self, batch: int = 1) -> int:
        """Return the multiply-adds of linear layers and head in a step over `batch` sequences."""
        return batch * (self.linear + self.head)


def count_work(
    config: ModelConfig,
    scheme: QuantScheme | None,
    kv_dtype: str,
    float_dtype: Callable[[str], str] = lambda _name: "BF16",
    transform: str | None = None,
) -> Work:
    """Return the work of a model of this shape; its float tensors are stored in the dtypes that `layout` takes.

    Raises:
        InputError: the scheme's groups do not fit the shape.
    """
    linear = sum(rows * columns for rows, columns in linear_names(config).values())
    return Work(
        linear=linear,
        head=config.vocab_size * config.hidden_size + (config.hidden_size**2 if transform else 0),
        attention=2 * config.layers * config.heads * config.head_dim,
        weight_bytes=_weight_bytes(config, scheme, float_dtype, transform),
        cache_bytes=cache_bytes_per_token(config, kv_dtype),
    )


def _weight_bytes(
    config: ModelConfig, scheme: QuantScheme | None, float_dtype: Callable[[str], str], transform: str | None
) -> int:
    head = [*table_names(config)][-1]  # with tied weights the embedding
    read = [*linear_names(config), head]
    if scheme is None:
        shapes = linear_names(config) | table_names(config)
        return tensor_bytes({name: (float_dtype(f"{name}.weight"), shapes[name]) for name in read})
    modules = layout(config, scheme, float_dtype, transform)
    read += [TRANSFORM] if transform else []
    tensors = {name: tensor for module in read for name, tensor in modules[module].items()}
    return tensor_bytes({name: t for name, t in tensors.items() if not name.endswith(".weight_shape")})


def cache_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Return the bytes of keys and values of one token in all layers, as the native cache lays them out."""
    frequencies = np.zeros(config.head_dim // 2, np.float32)
    cache = _native.KVCache(
        config.layers, config.kv_heads, config.head_dim, _MEASURED_CACHE, kv_dtype, frequencies, 1.0
    )
    return cache.nbytes // _MEASURED_CACHE
