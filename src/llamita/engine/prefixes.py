"""Caches of sequences that ended, kept for those that begin the same way."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llamita.engine.adapters import Adapter
from llamita.engine.kv_cache import SequenceCache, rope_frequencies
from llamita.models.config import RopeConfig

SHORTEST = 16  # tokens worth sharing; fewer are computed about as fast
BLOCK = 128  # positions that a cache takes memory for together: kKeyBlock of native/kernels/kernels.h
_LOSS = 32  # tokens that a kept cache may lose when it is taken over


class Prefix(NamedTuple):
    """Tokens and the cache that holds them, of a sequence that runs or ended."""

    ids: np.ndarray  # int32 (tokens,), what the cache holds at least
    cache: SequenceCache
    declared_length: int  # that its rotary frequencies were made for
    positions: int  # that the cache has taken memory for

    @property
    def adapter(self) -> Adapter | None:
        """Whose keys and values it holds."""
        return self.cache.adapter


def whole_blocks(tokens: int) -> int:
    """Positions that a cache of so many tokens takes memory for."""
    return -(-tokens // BLOCK) * BLOCK


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences share at their beginning."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


class PrefixCache:
    """Kept caches, least recently used first.

    Args:
        limit: positions that they may take together.
        rope, head_dim: of the model.
    """

    def __init__(self, limit: int, rope: RopeConfig, head_dim: int) -> None:
        self._limit = limit
        self._rope, self._head_dim = rope, head_dim
        self._kept: list[Prefix] = []

    @property
    def positions(self) -> int:
        """How many the kept caches take."""
        return sum(prefix.positions for prefix in self._kept)

    def keep(self, prefix: Prefix) -> None:
        """Keep a cache that nobody writes to any more, in place of those that hold no more than it does."""
        if len(prefix.ids) < SHORTEST or prefix.positions > self._limit:
            return
        shared = [self.shared(prefix, kept.ids, kept.declared_length, kept.adapter) for kept in self._kept]
        if any(length == len(prefix.ids) for length in shared):
            return
        pairs = zip(self._kept, shared, strict=True)
        self._kept = [*(kept for kept, length in pairs if length < len(kept.ids)), prefix]
        self.shrink(self._limit)

    def shrink(self, positions: int) -> None:
        """Drop the least recently used until the others take no more than this."""
        while self._kept and self.positions > positions:
            del self._kept[0]

    def find(
        self, ids: np.ndarray, declared_length: int, running: Iterable[Prefix], adapter: Adapter | None = None
    ) -> tuple[Prefix | None, int]:
        """What shares the longest beginning with a sequence, kept or running, and the length of that."""
        best, longest = None, SHORTEST - 1
        for prefix in (*reversed(self._kept), *running):
            length = self.shared(prefix, ids, declared_length, adapter)
            if length > longest:
                best, longest = prefix, length
        return best, longest if best else 0

    def take(self, prefix: Prefix, tokens: int, declared_length: int, room: int) -> SequenceCache | None:
        """The cache of a kept prefix for a sequence that begins with `tokens` of it, if it may be had.

        A cache without room, or with more memory than the sequence declares, is to be copied. So is one
        with many more tokens, which another sequence may want, unless it could not stay anyway: `room`
        is the positions that kept caches may take beside the sequence.
        """
        at = next((i for i, kept in enumerate(self._kept) if kept is prefix), None)
        if at is None:
            return None
        del self._kept[at]
        fits = prefix.cache.capacity >= declared_length and prefix.positions <= whole_blocks(declared_length)
        if fits and (len(prefix.ids) - tokens <= _LOSS or prefix.positions > room):
            return prefix.cache
        self._kept.append(prefix)  # just used
        return None

    def shared(self, prefix: Prefix, ids: np.ndarray, declared_length: int, adapter: Adapter | None = None) -> int:
        """Tokens whose keys and values are those of a sequence with these ids, length and adapter, too."""
        if prefix.adapter is not adapter:
            return 0
        length = common_length(prefix.ids, ids)
        if length < SHORTEST or self._rope.kind != "dynamic" or prefix.declared_length == declared_length:
            return length
        lengths = (prefix.declared_length, declared_length)
        theirs, ours = (rope_frequencies(self._rope, self._head_dim, n) for n in lengths)
        return length if np.array_equal(theirs, ours) else 0
