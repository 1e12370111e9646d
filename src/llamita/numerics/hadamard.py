"""Make Hadamard matrices, H·Hᵀ = n·I, and transform vectors fast.

n = K·2^m: H = H_K ⊗ H_{2^m}. Sylvester's matrix acts on the low part of an index. A matrix of order K by Paley's
first or second construction (1933), or Williamson's (1944), acts on the high part. The order of the transform's
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
# First rows of Williamson's circulant matrices, by K: value i is -1 where bit i is set. Paley's constructions reach
# none of these K, only multiples, whose matrices differ: published models need these. 52 is for the widths 6656 and
# 53248 (Llama 1 30B, Llama 3.1 405B), 172 for 5504, 11008 and 22016 (Llama 1 and 2, Code Llama).
_WILLIAMSON = {
    52: (0x1122, 0x13F2, 0x13F2, 0x0EDC),
    92: (0x6A0056, 0x6542A6, 0x1CC338, 0x6C7E36),
    172: (0x730A26450CE, 0x385B3FCDA1C, 0x14D42F42B28, 0x207AC935E04),
}


def fast_hadamard(x: np.ndarray) -> np.ndarray:
    """Return H·x / √n for every vector along the last axis, in the dtype of x: float32 or float64.

    The order of sums is specified: butterflies over strides 1, 2, 4, …, then K values in order, then one
    multiplication. H is not symmetric where K > 1; the inverse is `fast_hadamard_inverse`.

    Raises:
        InputError: no construction here reaches this order.
    """
    return _transform(x, lambda signs: signs)


def fast_hadamard_inverse(x: np.ndarray) -> np.ndarray:
    """Return Hᵀ·x / √n for every vector along the last axis: undo `fast_hadamard`."""
    return _transform(x, lambda signs: signs.T)


def hadamard_matrix(n: int) -> npt.NDArray[np.float64]:
    """Return the orthonormal matrix H / √n, float64 (n, n); raise InputError as `factor` does."""
    core, power = factor(n)
    sylvester = np.ones((1, 1))
    for _ in range(power):
        sylvester = np.kron(np.array([[1, 1], [1, -1]]), sylvester)
    return np.kron(core_signs(core).astype(np.float64), sylvester) / np.sqrt(n)


@lru_cache
def factor(n: int) -> tuple[int, int]:
    """Return (K, m) with n = K·2^m and the least K whose matrix can be made.

    Raises:
        InputError: no construction reaches any such K, as for odd n, 4·25, 4·29 and 4·47.
    """
    odd = n
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    core = 1 if odd == 1 else 4 * odd
    while n > 0 and n % core == 0 and core <= _LARGEST_CORE:
        if _make_core(core) is not None:
            return core, (n // core).bit_length() - 1
        core *= 2
    raise InputError(f"Hadamard matrix of order {n}: none is known here", hint="try without the rotation")


def core_signs(core: int) -> Signs:
    """Return H_K, int8 (K, K) of ±1, for a K that `factor` returns."""
    signs = _make_core(core)
    if signs is None:
        raise InputError(f"Hadamard matrix of order {core}: none is known here")
    return signs


def butterflies(y: Any, stack: Callable[[list[Any], int], Any]) -> Any:
    """Return Sylvester's part of the transform along the last axis, of a NumPy array or a Torch tensor.

    Args:
        y: (rows, K, 2^m).
        stack: the function of this name, NumPy's or Torch's.
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
    """Return the matrix of this order from the first construction that reaches it; check that it is Hadamard."""
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
    """Return (q, q) for a prime q: 1 where i - j is a square mod q, else -1; 0 on the diagonal."""
    character = np.full(q, -1)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    return character[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def _paley_1(core: int) -> Signs | None:
    """Use the squares modulo a prime q = K - 1, 3 more than a multiple of 4."""
    q = core - 1
    if q % 4 != 3 or not _is_prime(q):
        return None
    skew = np.zeros((core, core), np.int64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return (skew + np.eye(core, dtype=np.int64)).astype(np.int8)


def _paley_2(core: int) -> Signs | None:
    """Use the squares modulo a prime q = K/2 - 1, 1 more than a multiple of 4."""
    q = core // 2 - 1
    if q % 4 != 1 or not _is_prime(q):
        return None
    conference = np.zeros((q + 1, q + 1), np.int64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    unit = np.eye(q + 1, dtype=np.int64)
    signs = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(unit, [[1, -1], [-1, -1]])
    return signs.astype(np.int8)


def _williamson(core: int) -> Signs | None:
    """Return the block matrix of four symmetric circulant ones, A² + B² + C² + D² = K·I."""
    if core not in _WILLIAMSON:
        return None
    n = core // 4
    signs = [np.array([-1 if bits >> i & 1 else 1 for i in range(n)]) for bits in _WILLIAMSON[core]]
    a, b, c, d = (np.stack([np.roll(row, shift) for shift in range(n)]) for row in signs)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]).astype(np.int8)
