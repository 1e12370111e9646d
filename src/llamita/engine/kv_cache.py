"""The KV cache of one sequence: its keys and values, its length, its rotary frequencies."""

import numpy as np

from llamita import _native
from llamita.engine.adapters import Adapter
from llamita.engine.rope import rope_frequencies
from llamita.models.config import ModelConfig

KV_DTYPES = ("f32", "f16", "int8")


class SequenceCache:
    """Keys and values of one sequence in every layer, in native memory that grows as tokens come.

    Args:
        config: gives the shapes and the rotary frequencies.
        capacity: the most tokens it can hold.
        kv_dtype: "f32", "f16", or "int8" with a scale and a zero point for each token and head.
        declared_length: the length that the sequence may reach. Dynamic scaling and LongRoPE depend on it. It is
            fixed at the start, so that the order of work cannot change a result.
    """

    def __init__(self, config: ModelConfig, capacity: int, kv_dtype: str, declared_length: int) -> None:
        frequencies = rope_frequencies(config.rope, config.head_dim, declared_length)
        self.native = _native.KVCache(
            config.layers, config.kv_heads, config.head_dim, capacity, kv_dtype, frequencies,
            config.rope.attention_factor,
        )  # fmt: skip
        self.capacity = capacity
        self.length = 0
        self.adapter: Adapter | None = None  # used to compute the keys and values; set before the first step

    def copy_prefix(self, source: "SequenceCache", tokens: int) -> None:
        """Replace the content by the first tokens of another sequence of the same model.

        Args:
            source: has the same kv_dtype and, under dynamic rotary scaling, the same frequencies.
            tokens: at most source.length and this cache's capacity.

        Raises:
            ValueError: the caches do not match, or there are too many tokens.
        """
        if tokens > source.length:
            raise ValueError(f"tokens: expected at most {source.length}, got {tokens}")
        self.native.copy_prefix(source.native, tokens)
        self.length = tokens

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block: `prefixes.BLOCK` positions of every layer and head."""
        return self.native.block_nbytes

    def read_block(self, index: int, out: np.ndarray) -> None:
        """Copy block `index` to out, uint8 (block_nbytes,). What tokens beyond `length` left there is copied, too."""
        self.native.read_block(index, out)

    def write_block(self, index: int, block: np.ndarray) -> None:
        """Replace block `index` by what `read_block` gave of a cache of the same model and kv_dtype."""
        self.native.write_block(index, block)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for the whole capacity. Tokens so far may fill less."""
        return self.native.nbytes
