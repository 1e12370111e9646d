"""Keeps the caches of ended sequences for sequences that begin in the same way."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llamita.engine.adapters import Adapter
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.rope import rope_frequencies
from llamita.models.rope import RopeConfig

SHORTEST = 16  # tokens worth sharing; fewer are computed about as fast
BLOCK = 128  # a cache takes memory for this many positions at a time: kKeyBlock of native/kernels/kernels.h
_GROWTH = 4  # capacity of a cache, in times the sequence's declared length
_LOSS = 32  # tokens that a kept cache may lose when another sequence continues in it


class SavedOwner(NamedTuple):
    """An owner whose name was not saved, only a salted hash of it."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, owner: str, salt: bytes) -> "SavedOwner":
        """Return what is saved of an owner."""
        return cls(salt, hashlib.sha256(salt + owner.encode("utf-8", "surrogatepass")).digest())


Owner = str | SavedOwner | None


def is_same_owner(a: Owner, b: Owner) -> bool:
    """Return whether two owners are the same; of two saved ones, whether that can be seen."""
    if isinstance(a, str) and isinstance(b, SavedOwner):
        a = SavedOwner.of(a, b.salt)
    elif isinstance(a, SavedOwner) and isinstance(b, str):
        b = SavedOwner.of(b, a.salt)
    return a == b


class Prefix(NamedTuple):
    """Tokens of a running or ended sequence, and its cache, which holds at least these."""

    ids: np.ndarray  # int32 (tokens,)
    cache: SequenceCache
    declared_length: int  # its rotary frequencies were made for this length
    positions: int  # it has taken memory for this many
    owner: Owner = None  # only this one's sequences may begin with it

    @property
    def adapter(self) -> Adapter | None:
        """The adapter with which the keys and values were computed."""
        return self.cache.adapter


def whole_blocks(tokens: int) -> int:
    """Round tokens up to the positions that a cache takes memory for."""
    return -(-tokens // BLOCK) * BLOCK


def capacity_for(declared_length: int, most: int) -> int:
    """Return a cache's capacity in tokens, at most `most`.

    Memory is taken as tokens come, so capacity is cheap, and the next turn of a chat need not copy.
    """
    return min(most, _GROWTH * max(BLOCK, declared_length))


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences share at their beginning."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


class PrefixCache:
    """The kept caches of one model, least recently used first.

    Attributes:
        limit: the most positions of all together.
    """

    def __init__(self, limit: int, rope: RopeConfig, head_dim: int) -> None:
        self.limit = limit
        self._rope, self._head_dim = rope, head_dim
        self._kept: list[Prefix] = []

    @property
    def positions(self) -> int:
        """The positions that all kept caches take memory for."""
        return sum(prefix.positions for prefix in self._kept)

    def all(self) -> list[Prefix]:
        """Return them, the least recently used first."""
        return list(self._kept)

    def keep(self, prefix: Prefix) -> None:
        """Keep a cache that is not written to any more, and drop those whose tokens it holds too."""
        if len(prefix.ids) < SHORTEST or prefix.positions > self.limit:
            return
        shared = [self.shared(prefix, k.ids, k.declared_length, k.adapter, k.owner) for k in self._kept]
        if any(length == len(prefix.ids) for length in shared):
            return
        pairs = zip(self._kept, shared, strict=True)
        self._kept = [*(kept for kept, length in pairs if length < len(kept.ids)), prefix]
        self.shrink(self.limit)

    def shrink(self, positions: int) -> None:
        """Drop the least recently used until the others take at most this many positions."""
        while self._kept and self.positions > positions:
            del self._kept[0]

    def find(
        self,
        ids: np.ndarray,
        declared_length: int,
        running: Iterable[Prefix],
        adapter: Adapter | None = None,
        owner: Owner = None,
    ) -> tuple[Prefix | None, int]:
        """Return the kept or running prefix with the longest common beginning, and the length of that.

        None and 0 if nothing shares SHORTEST tokens.
        """
        best, longest = None, SHORTEST - 1
        for prefix in (*reversed(self._kept), *running):
            length = self.shared(prefix, ids, declared_length, adapter, owner)
            if length > longest:
                best, longest = prefix, length
        return best, longest if best else 0

    def take(self, prefix: Prefix, tokens: int, declared_length: int, room: int) -> SequenceCache | None:
        """Take out the cache of a kept prefix, for a sequence that begins with `tokens` of it.

        None if the cache has to be copied instead: it is not kept, it lacks capacity, it has taken more memory than
        the sequence declares, or it would lose many tokens, which another sequence may want. The last does not
        count if it could not stay anyway, in the `room` positions that kept caches may take besides the sequence.
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

    def shared(
        self, prefix: Prefix, ids: np.ndarray, declared_length: int, adapter: Adapter | None, owner: Owner
    ) -> int:
        """Count the tokens whose keys and values serve a sequence with these ids, length and adapter, too."""
        if prefix.adapter is not adapter or not np.array_equal(prefix.ids[:SHORTEST], ids[:SHORTEST]):
            return 0
        if not is_same_owner(prefix.owner, owner):
            return 0
        length = common_length(prefix.ids, ids)
        if length < SHORTEST or not self._rope.depends_on_length or prefix.declared_length == declared_length:
            return length
        lengths = (prefix.declared_length, declared_length)
        theirs, ours = (rope_frequencies(self._rope, self._head_dim, n) for n in lengths)
        return length if np.array_equal(theirs, ours) else 0
