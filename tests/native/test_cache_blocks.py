"""Blocks of a KV cache as bytes, out and in again."""

from collections.abc import Callable

import numpy as np
import pytest

from llamita import _native

HEADS, KV_HEADS, DIM = 4, 2, 24


def new_cache(capacity: int, dtype: str = "f32") -> _native.KVCache:
    frequencies = (10000.0 ** (-np.arange(0, DIM, 2) / DIM)).astype(np.float32)
    return _native.KVCache(2, KV_HEADS, DIM, capacity, dtype, frequencies)


def attended(cache: _native.KVCache, qkv: np.ndarray, start: int, layer: int) -> np.ndarray:
    batch = _native.Batch([(cache, start, len(qkv))])
    rotated, out = qkv.copy(), np.empty((len(qkv), HEADS * DIM), np.float32)
    _native.rope_and_cache(batch, layer, rotated, HEADS)
    _native.attention(batch, layer, rotated, HEADS, out)
    return out


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
def test_blocks_carry_all_that_a_cache_holds(dtype: str) -> None:
    qkv = np.random.default_rng(0).standard_normal((300, (HEADS + 2 * KV_HEADS) * DIM)).astype(np.float32)
    source, copy = new_cache(300, dtype), new_cache(400, dtype)
    whole = [attended(source, qkv, 0, layer) for layer in (0, 1)]
    block = np.empty(source.block_nbytes, np.uint8)
    for index in range(3):
        source.read_block(index, block)
        copy.write_block(index, block)
    for layer in (0, 1):
        np.testing.assert_array_equal(attended(copy, qkv[290:], 290, layer), whole[layer][290:])


CACHE = new_cache(20)
BLOCK = np.empty(CACHE.block_nbytes, np.uint8)
LOCKED = BLOCK.copy()
LOCKED.flags.writeable = False
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "beyond the capacity": (lambda: CACHE.read_block(1, BLOCK), "index: expected below 1, got 1"),
    "far beyond": (lambda: CACHE.write_block(2**63, BLOCK), "index: expected below 1, got 9223372036854775808"),
    "another size": (lambda: CACHE.read_block(0, BLOCK[:-1]), rf"out: expected uint8 \({len(BLOCK)},\)"),
    "another type": (lambda: CACHE.write_block(0, BLOCK.view(np.int8)), r"block: expected uint8 \(\d+,\), got int8"),
    "read-only": (lambda: CACHE.read_block(0, LOCKED), "out: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_blocks_are_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
