"""Rotary embedding, the cache and attention on every instruction set, against NumPy in float64."""

import mmap
from collections.abc import Callable
from pathlib import Path

import int8_attention
import kernel_specs as spec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita import _native

SHAPES = [(4, 1, 64), (8, 8, 32), (6, 2, 128), (4, 2, 24), (2, 1, 6), (9, 1, 80)]  # heads, kv_heads, head_dim
WINDOW_SHAPES = [(6, 2, 32), (9, 1, 24), (2, 2, 80)]
WINDOWS = [1, 2, 15, 16, 17, 100, 127, 128, 129, 200, 256]  # around a tile of keys, a block of keys, two blocks
DTYPES = ["f32", "f16", "int8"]
TOLERANCE = 3e-6
STATM = Path("/proc/self/statm")  # pages: all, resident, ...


def frequencies(dim: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)


def random_qkv(tokens: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, (heads + 2 * kv_heads) * dim)).astype(np.float32)


def new_cache(kv_heads: int, dim: int, capacity: int, dtype: str = "f32") -> _native.KVCache:
    return _native.KVCache(2, kv_heads, dim, capacity, dtype, frequencies(dim))


def step(
    batch: _native.Batch, qkv: np.ndarray, heads: int, width: int, layer: int = 1, window: int = 0, rotates: bool = True
) -> np.ndarray:
    rotated, out = qkv.copy(), np.full((len(qkv), width), np.nan, np.float32)
    _native.rope_and_cache(batch, layer, rotated, heads, rotates)
    _native.attention(batch, layer, rotated, heads, out, window)
    return out


def in_pieces(
    cache: _native.KVCache, pieces: list[np.ndarray], heads: int, width: int, window: int = 0, rotates: bool = True
) -> np.ndarray:
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    batches = [_native.Batch([(cache, int(s), len(piece))]) for s, piece in zip(starts, pieces, strict=False)]
    results = [step(b, p, heads, width, 1, window, rotates) for b, p in zip(batches, pieces, strict=True)]
    return np.concatenate(results)


def in_chunks(
    cache: _native.KVCache, qkv: np.ndarray, heads: int, width: int, chunk: int, window: int = 0, rotates: bool = True
) -> np.ndarray:
    pieces = [qkv[start : start + chunk] for start in range(0, len(qkv), chunk)]
    return in_pieces(cache, pieces, heads, width, window, rotates)


def assert_attends(
    found: np.ndarray, qkv: np.ndarray, heads: int, kv_heads: int, dtype: str, window: int = 0, rotates: bool = True
) -> None:
    inv_freq = frequencies(found.shape[1] // heads)
    if dtype == "int8":
        expected, bound = int8_attention.attention(qkv, heads, kv_heads, inv_freq, window, rotates)
        assert (np.abs(found - expected) <= bound).all()
    else:
        expected = spec.attention(qkv, heads, kv_heads, inv_freq, dtype=dtype, window=window, rotates=rotates)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 127, 128, 129, 300])
def test_attention(isa: str, dtype: str, heads: int, kv_heads: int, dim: int, tokens: int) -> None:
    qkv = random_qkv(tokens, heads, kv_heads, dim)
    found = in_chunks(new_cache(kv_heads, dim, tokens, dtype), qkv, heads, heads * dim, tokens)
    assert_attends(found, qkv, heads, kv_heads, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_chunks_change_nothing(isa: str, dtype: str, heads: int, kv_heads: int, dim: int) -> None:
    qkv = random_qkv(150, heads, kv_heads, dim)
    whole = in_chunks(new_cache(kv_heads, dim, 150, dtype), qkv, heads, heads * dim, 150)
    for chunk in (1, 7, 64):
        pieces = in_chunks(new_cache(kv_heads, dim, 150, dtype), qkv, heads, heads * dim, chunk)
        np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), WINDOW_SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window(isa: str, dtype: str, heads: int, kv_heads: int, dim: int, window: int) -> None:
    qkv = random_qkv(300, heads, kv_heads, dim)
    found = in_chunks(new_cache(kv_heads, dim, 300, dtype), qkv, heads, heads * dim, 300, window)
    assert_attends(found, qkv, heads, kv_heads, dtype, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), WINDOW_SHAPES)
@pytest.mark.parametrize("window", [1, 5, 100, 130])
def test_chunks_change_nothing_in_a_window(
    isa: str, dtype: str, heads: int, kv_heads: int, dim: int, window: int
) -> None:
    qkv = random_qkv(280, heads, kv_heads, dim)
    whole = in_chunks(new_cache(kv_heads, dim, 280, dtype), qkv, heads, heads * dim, 280, window)
    for chunk in (1, 7, 64):
        pieces = in_chunks(new_cache(kv_heads, dim, 280, dtype), qkv, heads, heads * dim, chunk, window)
        np.testing.assert_array_equal(pieces, whole)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_window_and_any_pieces(data: st.DataObject) -> None:
    group, kv_heads = data.draw(st.integers(1, 9), "group"), data.draw(st.integers(1, 2), "kv_heads")
    dim, dtype = 2 * data.draw(st.integers(1, 20), "half a head"), data.draw(st.sampled_from(DTYPES), "dtype")
    tokens, window = data.draw(st.integers(1, 300), "tokens"), data.draw(st.integers(1, 310), "window")
    cuts = data.draw(st.lists(st.integers(0, tokens), max_size=6), "cuts")
    heads, width = group * kv_heads, group * kv_heads * dim
    qkv = random_qkv(tokens, heads, kv_heads, dim)
    whole = in_chunks(new_cache(kv_heads, dim, tokens, dtype), qkv, heads, width, tokens, window)
    assert_attends(whole, qkv, heads, kv_heads, dtype, window)
    pieces = np.split(qkv, sorted(cuts))
    np.testing.assert_array_equal(
        in_pieces(new_cache(kv_heads, dim, tokens, dtype), pieces, heads, width, window), whole
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_as_long_as_the_text_is_none(isa: str, dtype: str) -> None:
    qkv = random_qkv(140, 6, 2, 32)
    everything = in_chunks(new_cache(2, 32, 140, dtype), qkv, 6, 192, 140)
    for window in (140, 141, 4096, 2**64 - 1):
        found = in_chunks(new_cache(2, 32, 140, dtype), qkv, 6, 192, 140, window)
        np.testing.assert_array_equal(found, everything)
    shorter = in_chunks(new_cache(2, 32, 140, dtype), qkv, 6, 192, 140, 139)
    np.testing.assert_array_equal(shorter[:139], everything[:139])
    assert (shorter[139] != everything[139]).any()


def test_a_window_of_one_gives_the_values(isa: str) -> None:
    qkv = random_qkv(140, 6, 2, 32)
    values = qkv.reshape(140, 10, 32)[:, 8:]
    found = in_chunks(new_cache(2, 32, 140), qkv, 6, 192, 140, 1)
    np.testing.assert_array_equal(found.reshape(140, 2, 3, 32), np.repeat(values[:, :, None], 3, axis=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("window", [1, 20, 130])
def test_what_left_the_window_is_not_there(isa: str, dtype: str, bad: float, window: int) -> None:
    heads, dim, at = 3, 32, 125
    qkv = random_qkv(280, heads, 1, dim)
    clean = in_chunks(new_cache(1, dim, 280, dtype), qkv, heads, heads * dim, 280, window)
    qkv[at, heads * dim :] = bad
    for chunk in (280, 50, 1):
        found = in_chunks(new_cache(1, dim, 280, dtype), qkv, heads, heads * dim, chunk, window)
        shows = np.isnan(found).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(shows), np.arange(at, min(280, at + window)))
        np.testing.assert_array_equal(found[~shows], clean[~shows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64])  # of an int8 cache, only the second is transformed
def test_a_layer_without_rotary_embedding(isa: str, dtype: str, dim: int) -> None:
    qkv = random_qkv(150, 4, 2, dim)
    whole = in_chunks(new_cache(2, dim, 150, dtype), qkv, 4, 4 * dim, 150, rotates=False)
    assert_attends(whole, qkv, 4, 2, dtype, rotates=False)
    pieces = in_chunks(new_cache(2, dim, 150, dtype), qkv, 4, 4 * dim, 7, rotates=False)
    np.testing.assert_array_equal(pieces, whole)
    queries = qkv.copy()
    _native.rope_and_cache(_native.Batch([(new_cache(2, dim, 150, dtype), 0, 150)]), 1, queries, 4, False)
    if dtype != "int8" or dim == 24:
        np.testing.assert_array_equal(queries, qkv)


@pytest.mark.parametrize("window", [0, 1, 70, 130])
def test_instruction_sets_and_threads_give_the_same_bits(window: int) -> None:
    before, threads, results = _native.isa(), _native.threads(), []
    qkv = random_qkv(200, 6, 2, 64)
    try:
        for name in _native.available_isas():
            for count in (1, 2, 3):
                _native.set_isa(name)
                _native.set_threads(count)
                results += [in_chunks(new_cache(2, 64, 200, d), qkv, 6, 384, 50, window) for d in DTYPES]
    finally:
        _native.set_isa(before)
        _native.set_threads(threads)
    for i in range(len(DTYPES), len(results)):
        np.testing.assert_array_equal(results[i], results[i % len(DTYPES)])


@pytest.mark.parametrize("window", [0, 35])
def test_company_in_a_batch_changes_nothing(isa: str, window: int) -> None:
    heads, kv_heads, dim, lengths = 4, 2, 32, [130, 1, 40]
    sequences = [random_qkv(n, heads, kv_heads, dim, seed=n) for n in lengths]
    alone = [in_chunks(new_cache(kv_heads, dim, 200), s, heads, 128, 200, window) for s in sequences]
    caches = [new_cache(kv_heads, dim, 200) for _ in sequences]
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    for pieces in ([(0, 100), (0, 1), (0, 0)], [(100, 30), (1, 0), (0, 40)]):
        batch = _native.Batch([(c, *p) for c, p in zip(caches, pieces, strict=True)])
        qkv = np.concatenate([s[a : a + n] for s, (a, n) in zip(sequences, pieces, strict=True)])
        assert batch.tokens == len(qkv)
        out = step(batch, qkv, heads, 128, window=window)
        for i, part in enumerate(np.split(out, np.cumsum([n for _, n in pieces])[:-1])):
            found[i].append(part)
    for pieces, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 50])
def test_what_lies_beyond_a_token_is_never_read(isa: str, dtype: str, window: int) -> None:
    heads, kv_heads, dim, width = 8, 2, 64, 512
    qkv = random_qkv(140, heads, kv_heads, dim)
    clean = in_chunks(new_cache(kv_heads, dim, 140, dtype), qkv, heads, width, 140, window)
    cache = new_cache(kv_heads, dim, 140, dtype)
    step(_native.Batch([(cache, 0, 140)]), np.full_like(qkv, np.nan), heads, width)  # leftovers of another text
    np.testing.assert_array_equal(in_chunks(cache, qkv, heads, width, 9, window), clean)


def test_layers_are_apart() -> None:
    cache, qkv = new_cache(1, 16, 20), [random_qkv(20, 2, 1, 16, seed) for seed in (0, 1)]
    batch = _native.Batch([(cache, 0, 20)])
    rotated = [q.copy() for q in qkv]
    for layer in (0, 1):
        _native.rope_and_cache(batch, layer, rotated[layer], 2)
    for layer in (1, 0):
        out = np.empty((20, 32), np.float32)
        _native.attention(batch, layer, rotated[layer], 2, out)
        np.testing.assert_allclose(out, spec.attention(qkv[layer], 2, 1, frequencies(16)), atol=3e-6)


def test_rope_scaling_multiplies_cosine_and_sine(isa: str) -> None:
    qkv = random_qkv(30, 2, 1, 16)
    cache = _native.KVCache(1, 1, 16, 30, "f32", frequencies(16), 1.5)
    out = step(_native.Batch([(cache, 0, 30)]), qkv, 2, 32, layer=0)
    np.testing.assert_allclose(out, spec.attention(qkv, 2, 1, frequencies(16), 1.5), atol=5e-6)


def test_large_scores_do_not_overflow(isa: str) -> None:
    qkv = random_qkv(150, 2, 1, 32) * np.float32(60)  # scores in the tens of thousands
    out = in_chunks(new_cache(1, 32, 150), qkv, 2, 64, 150)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(qkv).max() * 1.0001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["key", "value"])
def test_what_is_not_finite_shows(isa: str, dtype: str, bad: float, part: str) -> None:
    heads, dim = 2, 32
    qkv = random_qkv(140, heads, 1, dim)
    qkv[3, heads * dim + (5 if part == "key" else dim + 5)] = bad
    out = in_chunks(new_cache(1, dim, 140, dtype), qkv, heads, heads * dim, 140)
    assert np.isfinite(out[:3]).all()
    shows = np.logical_not(np.isfinite(out.reshape(140, heads, dim)).all(axis=2))  # (tokens, heads)
    if dtype == "int8" or part == "value" or np.isnan(bad):
        assert shows[3:].all()
    else:  # a score of minus infinity is a weight of nothing
        assert shows[3:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-20])
def test_tiny_values_stay_tiny(isa: str, dtype: str, size: float) -> None:
    qkv = random_qkv(140, 2, 1, 32)
    qkv[:, -32:] *= np.float32(size)
    out = in_chunks(new_cache(1, 32, 140, dtype), qkv, 2, 64, 140)
    assert np.abs(out).max() <= 5 * size


@pytest.mark.parametrize("sharpness", [1, 8])  # of the first, weights have one digit in most blocks
def test_a_long_text_over_an_int8_cache(sharpness: int) -> None:
    qkv = random_qkv(1500, 2, 1, 32)
    qkv[:, :64] *= np.float32(sharpness)
    assert_attends(in_chunks(new_cache(1, 32, 1500, "int8"), qkv, 2, 64, 1500), qkv, 2, 1, "int8")


def test_memory_of_a_cache() -> None:
    for dtype, token_bytes in (("f32", 512), ("f16", 256), ("int8", 128 + 2 * 5)):  # a key and a value
        cache = _native.KVCache(3, 2, 64, 200, dtype, frequencies(64))
        whole_blocks = 3 * 2 * 256 * token_bytes
        assert cache.capacity == 200
        assert cache.nbytes == -(-whole_blocks // mmap.PAGESIZE) * mmap.PAGESIZE


# A block of all layers: 128 KB, in small pages; 2.2 MB, in a huge page and small ones
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(("layers", "kv_heads", "dtype", "count"), [(2, 2, "f16", 60), (16, 8, "int8", 12)])
def test_a_cache_takes_no_more_than_it_says(layers: int, kv_heads: int, dtype: str, count: int) -> None:
    qkv = random_qkv(20, kv_heads, kv_heads, 64)
    caches = [_native.KVCache(layers, kv_heads, 64, 128, dtype, frequencies(64)) for _ in range(count + 1)]
    before = 0
    for i, cache in enumerate(caches):
        batch = _native.Batch([(cache, 0, 20)])
        for layer in range(layers):
            _native.rope_and_cache(batch, layer, qkv, kv_heads)
        if i == 0:  # the threads' scratch came with the first
            before = int(STATM.read_text().split()[1])
    grown = (int(STATM.read_text().split()[1]) - before) * mmap.PAGESIZE
    assert grown <= count * caches[0].nbytes + 2**21


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 128, 140])
def test_a_copied_prefix_goes_on_as_the_original(dtype: str, tokens: int) -> None:
    heads, kv_heads, dim, width = 4, 2, 24, 96
    qkv = random_qkv(150, heads, kv_heads, dim)
    source, copy = new_cache(kv_heads, dim, 150, dtype), new_cache(kv_heads, dim, 160, dtype)
    whole = [step(_native.Batch([(source, 0, 150)]), qkv, heads, width, layer) for layer in (0, 1)]
    for layer in (0, 1):
        step(_native.Batch([(copy, 0, 160)]), np.full((160, qkv.shape[1]), np.nan, np.float32), heads, width, layer)
    copy.copy_prefix(source, tokens)
    for layer in (0, 1):
        rest = step(_native.Batch([(copy, tokens, 150 - tokens)]), qkv[tokens:], heads, width, layer)
        np.testing.assert_array_equal(rest, whole[layer][tokens:])


def test_a_copied_prefix_leaves_later_positions_alone() -> None:
    qkv, other = (random_qkv(40, 2, 1, 16, seed) for seed in (0, 1))
    caches = [new_cache(1, 16, 40) for _ in range(3)]
    step(_native.Batch([(caches[0], 0, 40)]), other, 2, 32)
    for cache, start in ((caches[1], qkv), (caches[2], np.concatenate([other[:19], qkv[19:]]))):
        step(_native.Batch([(cache, 0, 40)]), start, 2, 32)
    caches[1].copy_prefix(caches[0], 19)
    last = random_qkv(1, 2, 1, 16, 2)
    found, expected = (np.empty((1, 32), np.float32) for _ in range(2))
    _native.attention(_native.Batch([(caches[1], 39, 1)]), 1, last, 2, found)
    _native.attention(_native.Batch([(caches[2], 39, 1)]), 1, last, 2, expected)
    np.testing.assert_array_equal(found, expected)


CACHE = new_cache(2, 16, 20)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "full": (lambda: _native.Batch([(CACHE, 15, 6)]), r"sequences: expected at most 20 positions, got 15 \+ 6"),
    "start": (lambda: _native.Batch([(CACHE, 21, 0)]), "expected at most 20 positions"),
    "twice": (lambda: _native.Batch([(CACHE, 0, 1), (CACHE, 1, 1)]), "expected each cache once"),
    "shapes": (lambda: _native.Batch([(CACHE, 0, 1), (new_cache(1, 16, 20), 0, 1)]), "expected caches of one shape"),
    "layer": (
        lambda: step(_native.Batch([(CACHE, 0, 1)]), random_qkv(1, 2, 2, 16), 2, 32, 2),
        "layer: expected below 2",
    ),
    "heads": (
        lambda: step(_native.Batch([(CACHE, 0, 1)]), random_qkv(1, 3, 2, 16), 3, 48),
        "heads: expected a multiple of 2",
    ),
    "rows": (
        lambda: step(_native.Batch([(CACHE, 0, 2)]), random_qkv(1, 2, 2, 16), 2, 32),
        r"qkv: expected float32 \(2, 96\)",
    ),
    "so many heads that a row wraps": (
        lambda: step(_native.Batch([(CACHE, 0, 1)]), np.ones((1, 64), np.float32), 1 << 60, 0),
        "heads: expected up to 65536",
    ),
    "capacity": (
        lambda: _native.KVCache(1, 1, 64, 2**64 - 1, "f32", frequencies(64)),
        r"KVCache: expected up to \d+ layers \* kv_heads \* capacity, got 1 \* 1 \* 18446744073709551615",
    ),
    "size": (lambda: _native.KVCache(2**20, 2**16, 64, 2**20, "f16", frequencies(64)), "KVCache: expected up to"),
    "layers": (lambda: _native.KVCache(2**63, 2, 64, 128, "f16", frequencies(64)), "KVCache: expected up to"),
    "kv_heads": (lambda: _native.KVCache(1, 2**62, 64, 128, "f16", frequencies(64)), "kv_heads: expected up to 65536"),
    "odd": (lambda: _native.KVCache(1, 1, 15, 8, "f32", frequencies(16)), "head_dim: expected an even number"),
    "dtype": (
        lambda: _native.KVCache(1, 1, 16, 8, "f64", frequencies(16)),
        "dtype: expected 'f32', 'f16' or 'int8', got 'f64'",
    ),
    "prefix of another dtype": (
        lambda: CACHE.copy_prefix(new_cache(2, 16, 20, "f16"), 1),
        "source: expected 2 layers of 2 heads of 16 f32, got 2 layers of 2 heads of 16 f16",
    ),
    "prefix of another shape": (
        lambda: CACHE.copy_prefix(new_cache(1, 16, 20), 1),
        "source: expected 2 layers of 2 heads of 16 f32, got 2 layers of 1 heads of 16 f32",
    ),
    "prefix of another rotation": (
        lambda: CACHE.copy_prefix(_native.KVCache(2, 2, 16, 20, "f32", 2 * frequencies(16)), 1),
        "source: expected the same rotary frequencies",
    ),
    "prefix beyond the source": (
        lambda: CACHE.copy_prefix(new_cache(2, 16, 12), 13),
        "tokens: expected at most 12, got 13",
    ),
    "prefix beyond the capacity": (
        lambda: CACHE.copy_prefix(new_cache(2, 16, 30), 21),
        "tokens: expected at most 20, got 21",
    ),
    "frequencies": (lambda: _native.KVCache(1, 1, 16, 8, "f32", frequencies(8)), r"inv_freq: expected float32 \(8,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_clear_text(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
