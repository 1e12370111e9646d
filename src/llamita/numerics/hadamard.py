"""Hadamard matrices H with H·Hᵀ = n·I, made by construction, and the fast transform of vectors.

n = K·2^m: H = H_K ⊗ H_{2^m}, Sylvester's matrix over the low part of an index, and over the high part one of
order K by Paley's first or second construction (1933) or Williamson's (1944). The order of the transform's
sums is part of the format (docs/reference/numerics.md); the native twin gives the same bits.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from llamita.errors import InputError

Signs = npt.NDArray[np.int8]
_LARGEST_CORE = 1024  # K: the dense part of a transform costs K sums a value
_MOST_SEQUENCES = 2048  # candidates of Williamson's search: its pairs must fit memory
_MOST_CHECKED = 64  # finds of the look-up; one that is wrong is as good as impossible


def fast_hadamard(x: np.ndarray) -> np.ndarray:
    """H·x / √n for every vector along the last axis, in float32 or float64 as x is.

    Sums in the specified order: butterflies over strides 1, 2, 4, …, then K values in order, then one
    multiplication. H is not symmetric where K > 1; the inverse is `fast_hadamard_inverse`.

    Raises:
        InputError: no matrix of this order is known here.
    """
    return _transform(x, lambda signs: signs)


def fast_hadamard_inverse(x: np.ndarray) -> np.ndarray:
    """Hᵀ·x / √n for every vector along the last axis: undoes `fast_hadamard`."""
    return _transform(x, lambda signs: signs.T)


def hadamard_matrix(n: int) -> npt.NDArray[np.float64]:
    """The orthonormal matrix H / √n, float64 (n, n). Raises InputError where none is known here."""
    core, power = factor(n)
    sylvester = np.ones((1, 1))
    for _ in range(power):
        sylvester = np.kron(np.array([[1, 1], [1, -1]]), sylvester)
    return np.kron(core_signs(core).astype(np.float64), sylvester) / np.sqrt(n)


@lru_cache
def factor(n: int) -> tuple[int, int]:
    """(K, m) with n = K·2^m and the least K whose matrix can be made.

    Raises:
        InputError: there is none, as for odd n, or for 4·47, which no method here reaches.
    """
    odd = n
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    core = 1 if odd == 1 else 4 * odd
    while n > 0 and n % core == 0 and core <= _LARGEST_CORE:
        if _make_core(core) is not None:
            return core, (n // core).bit_length() - 1
        core *= 2
    raise InputError(f"Hadamard matrix of order {n}: none is known here; try without the rotation")


def core_signs(core: int) -> Signs:
    """H_K of the orders that `factor` gives: int8 (K, K) of ±1."""
    signs = _make_core(core)
    if signs is None:
        raise InputError(f"Hadamard matrix of order {core}: none is known here")
    return signs


def butterflies(y: Any, stack: Callable[[list[Any], int], Any]) -> Any:
    """Sylvester's part of the transform along the last axis, 2^m, of a NumPy array or a Torch tensor.

    Args:
        y: (rows, K, 2^m).
        stack: NumPy's or Torch's.
    """
    rows, core, length = y.shape
    for step in (2**i for i in range(length.bit_length() - 1)):
        pairs = y.reshape(rows, core, length // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = stack([a + b, a - b], -2).reshape(rows, core, length)
    return y


def _transform(x: np.ndarray, orient: Callable[[Signs], Signs]) -> np.ndarray:
    n = x.shape[-1]
    core, power = factor(n)
    y = butterflies(x.reshape(-1, core, 2**power), np.stack)
    if core > 1:
        signs = orient(core_signs(core)).astype(x.dtype)
        total = np.zeros_like(y)
        for k in range(core):  # products with ±1 are exact: a fused multiply-add gives the same
            total += signs[:, k, None] * y[:, k, None, :]
        y = total
    return (y * x.dtype.type(1 / np.sqrt(n))).reshape(x.shape)


@lru_cache
def _make_core(core: int) -> Signs | None:
    """A Hadamard matrix of this order from the first construction that reaches it, found to be one."""
    if core == 1:
        return np.ones((1, 1), np.int8)
    for construct in (_paley_1, _paley_2, _williamson):
        signs = construct(core)
        if signs is not None:
            wide = signs.astype(np.int64)
            assert np.array_equal(wide @ wide.T, core * np.eye(core, dtype=np.int64))
            signs.setflags(write=False)
            return signs
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> npt.NDArray[np.int64]:
    """(q, q) for a prime q: 1 where i - j is a square mod q, else -1; 0 on the diagonal."""
    character = np.full(q, -1)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    return character[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def _paley_1(core: int) -> Signs | None:
    """From the squares modulo a prime q = K - 1, 3 more than a multiple of 4."""
    q = core - 1
    if q % 4 != 3 or not _is_prime(q):
        return None
    skew = np.zeros((core, core), np.int64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return (skew + np.eye(core, dtype=np.int64)).astype(np.int8)


def _paley_2(core: int) -> Signs | None:
    """From the squares modulo a prime q = K/2 - 1, 1 more than a multiple of 4."""
    q = core // 2 - 1
    if q % 4 != 1 or not _is_prime(q):
        return None
    conference = np.zeros((q + 1, q + 1), np.int64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    unit = np.eye(q + 1, dtype=np.int64)
    signs = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(unit, [[1, -1], [-1, -1]])
    return signs.astype(np.int8)


def _williamson(core: int) -> Signs | None:
    """From four symmetric circulant matrices of odd order n = K/4 with A² + B² + C² + D² = K·I.

    Their first rows are looked for among the sequences that a group of multipliers leaves as they are,
    largest group first: that such rows exist for 43 is Williamson's own find.
    """
    n = core // 4
    if core % 8 != 4 or n < 3:
        return None
    for orbits in _orbits(n):
        rows = _sequences(n, orbits)
        found = _four_that_cancel(rows)
        if found is not None:
            a, b, c, d = (_circulant(rows[i]) for i in found)
            return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]).astype(np.int8)
    return None


def _orbits(n: int) -> list[list[list[int]]]:
    """Partitions of 1 … n-1 into orbits of the groups {±1}·⟨g⟩ mod n, coarsest first, without repetition."""
    units = [g for g in range(1, n) if np.gcd(g, n) == 1]
    partitions = {}
    for g in units:
        group = {1, n - 1}
        while not (grown := {a * g % n for a in group}) <= group:
            group |= grown
        orbits = sorted({tuple(sorted({i * a % n for a in group})) for i in range(1, n)})
        partitions[tuple(orbits)] = None
    small = [p for p in partitions if 2 ** len(p) <= _MOST_SEQUENCES]
    return [[list(orbit) for orbit in p] for p in sorted(small, key=lambda p: (len(p), p))]


def _sequences(n: int, orbits: list[list[int]]) -> npt.NDArray[np.int64]:
    """Every ±1 row (count, n) that is constant on the orbits and begins with 1."""
    rows = np.ones((2 ** len(orbits), n), np.int64)
    for bit, orbit in enumerate(orbits):
        rows[(np.arange(len(rows)) >> bit & 1 == 1)[:, None] & np.isin(np.arange(n), orbit)] = -1
    return rows


def _four_that_cancel(rows: npt.NDArray[np.int64]) -> tuple[int, int, int, int] | None:
    """The first four rows whose periodic autocorrelations add up to 0 at every shift but 0."""
    shifts = range(1, rows.shape[1] // 2 + 1)
    correlations = np.stack([(rows * np.roll(rows, shift, axis=1)).sum(axis=1) for shift in shifts], axis=1)
    # A sum of rows is looked up by one number; what it finds is checked.
    keys = correlations @ np.random.default_rng(0).integers(0, 2**40, len(shifts))
    a, b = np.triu_indices(len(rows))
    sums = keys[a] + keys[b]
    order = np.argsort(sums, kind="stable")
    place = np.minimum(np.searchsorted(sums[order], -sums), len(sums) - 1)
    for first in np.flatnonzero(sums[order[place]] == -sums)[:_MOST_CHECKED]:
        four = (a[first], b[first], a[order[place[first]]], b[order[place[first]]])
        if not correlations[list(four)].sum(axis=0).any():
            return tuple(int(i) for i in four)  # type: ignore[return-value]
    return None


def _circulant(row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(n, n): each row is the one above, moved on by one."""
    return np.stack([np.roll(row, shift) for shift in range(len(row))])
