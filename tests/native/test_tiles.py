"""AMX and its stand-in of plain arrays against the scalar kernels, to the bit, around every edge of a tile."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from llamita import _native
from llamita.numerics.affine import f32_to_bf16

TILED = [name for name in _native.available_isas() if name.startswith("amx")]
pytestmark = pytest.mark.skipif(not TILED, reason="tiles and their stand-in need AVX-512 VNNI")
rng = np.random.default_rng(71)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def weights_w4(rows: int, columns: int, group_size: int, parts: int = 1, bf16: bool = False) -> _native.Weights:
    codes = [rng.integers(-8, 8, (rows, columns), dtype=np.int8) for _ in range(parts)]
    scales = [rng.uniform(0.001, 0.1, (rows, columns // group_size)).astype(np.float32) for _ in range(parts)]
    stored = [f32_to_bf16(s) for s in scales] if bf16 else scales
    return _native.pack_w4([_native.codes_to_packed(c) for c in codes], stored, group_size, parts == 2)


def same_bits(weights: _native.Weights, tokens: int, bias: bool = False, accumulate: bool = False) -> None:
    """Multiply the same activations on every tiled set and on the scalar one."""
    acts = _native.Activations(tokens, weights.columns)
    _native.quantize(normal(tokens, weights.columns), acts)
    outputs = weights.rows // 2 if weights.gated else weights.rows
    before, added = normal(tokens, outputs), normal(weights.rows) if bias else None

    results = {}
    for name in ["scalar", *TILED]:
        results[name] = before.copy()
        with using(name):
            _native.linear(weights, acts, results[name], added, accumulate)
        expected = results["scalar"].view(np.uint32)
        np.testing.assert_array_equal(results[name].view(np.uint32), expected, err_msg=name)


@contextmanager
def using(name: str) -> Iterator[None]:
    before = _native.isa()
    _native.set_isa(name)
    yield
    _native.set_isa(before)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_every_number_of_tokens(group_size: int) -> None:
    weights = weights_w4(40, 512, group_size)
    for tokens in range(1, 71):
        same_bits(weights, tokens)


@pytest.mark.parametrize(
    ("columns", "group_size"),
    [(8, 8), (48, 24), (120, 40), (96, 96), (384, 192), (320, 160), (1032, 1032), (4096, 64), (4096, 4096),
     (6144, 128), (4112, 2056)],
)  # fmt: skip
def test_groups_that_do_and_do_not_fill_tiles(columns: int, group_size: int) -> None:
    weights = weights_w4(33, columns, group_size)
    for tokens in (16, 33, 53):
        same_bits(weights, tokens)


@pytest.mark.parametrize("rows", [1, 16, 31, 64, 70])
@pytest.mark.parametrize(("bias", "accumulate"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("group_size", [32, 128])
def test_rows_bias_and_sums_with_what_was_there(rows: int, bias: bool, accumulate: bool, group_size: int) -> None:
    same_bits(weights_w4(rows, 2304, group_size, bf16=True), 49, bias, accumulate)


@pytest.mark.parametrize("rows", [5, 16, 40])
@pytest.mark.parametrize(("columns", "group_size"), [(4160, 32), (2560, 128), (256, 256)])
def test_gated_rows(rows: int, columns: int, group_size: int) -> None:
    for tokens in (16, 37, 64):
        same_bits(weights_w4(rows, columns, group_size, parts=2), tokens, bias=True)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 3), (33, 131), (70, 1028), (40, 2048), (32, 64)])
def test_int8_tables(rows: int, columns: int) -> None:
    codes = rng.integers(-128, 128, (rows, columns), dtype=np.int8)
    scales = rng.uniform(0.001, 0.1, rows).astype(np.float32)
    for tokens in (7, 16, 31, 32, 49, 70):
        same_bits(_native.pack_w8(codes, f32_to_bf16(scales)), tokens)


@pytest.mark.parametrize("activation", [-128, 127])
@pytest.mark.parametrize("weight", [-1, 1])
def test_codes_at_their_limits(activation: int, weight: int) -> None:
    columns, tokens = 65536, 33  # the most columns: sums of unsigned codes come within 0.4 % of what int32 holds
    acts = _native.Activations(tokens, columns)
    acts.set(np.full((tokens, columns), activation, np.int8), np.ones(tokens, np.float32), np.zeros(tokens, np.int32))
    codes = np.full((3, columns), 127 if weight > 0 else -128, np.int8)
    table = _native.pack_w8(codes, f32_to_bf16(np.ones(3, np.float32)))
    for name in [*TILED, "scalar"]:
        out = np.empty((tokens, 3), np.float32)
        with using(name):
            _native.linear(table, acts, out)
        assert (out == np.float32(float(codes[0, 0]) * activation * columns)).all(), name


def test_the_stand_in_is_never_the_first_choice() -> None:
    assert _native.available_isas()[0] != "amx-portable"
    assert "amx-portable" in TILED


def test_the_check_at_the_start_passes_on_every_set_and_counts_its_rounds(isa: str) -> None:
    rounds, wrong = _native.check_products(isa, 0.0, 3)
    assert (rounds, wrong) == (6, 0)  # both products on each thread: the time is over at once


def test_the_check_wants_threads_and_seconds_that_make_sense() -> None:
    with pytest.raises(ValueError, match="threads: expected 1 to 1024, got 0"):
        _native.check_products("scalar", 0.1, 0)
    with pytest.raises(ValueError, match="seconds: expected 0 to 3600"):
        _native.check_products("scalar", -1.0, 1)
