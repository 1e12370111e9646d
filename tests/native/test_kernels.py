"""Every native operation on every instruction set of this machine, against NumPy; integers bit for bit."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kernel_specs as spec
import numpy as np
import pytest
from programs import run_program

from llamita import _native
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16, quantize_activations, to_f32

PRINT_SETTINGS = "from llamita import _native as n; print(n.isa(), n.threads())"
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def int4(rows: int, columns: int) -> np.ndarray:
    return rng.integers(-8, 8, (rows, columns), dtype=np.int8)


def int8(rows: int, columns: int) -> np.ndarray:
    return rng.integers(-128, 128, (rows, columns), dtype=np.int8)


def scales(*shape: int) -> np.ndarray:
    return rng.uniform(0.001, 0.1, shape).astype(np.float32)


def quantized(x: np.ndarray) -> _native.Activations:
    acts = _native.Activations(len(x), x.shape[1])
    _native.quantize(x, acts)
    return acts


def pack_w4(codes: np.ndarray, factors: np.ndarray) -> _native.Weights:
    group_size = codes.shape[1] // factors.shape[1]
    return _native.pack_w4([_native.codes_to_packed(codes)], [factors], group_size)


def linear(weights: _native.Weights, x: Any, tokens: int) -> np.ndarray:
    out = np.full((tokens, weights.rows), np.nan, np.float32)
    _native.linear(weights, x, out)
    return out


# ---- quantized products --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", spec.TOKENS)
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(1, 32, 32), (31, 64, 32), (32, 256, 128), (33, 512, 256), (70, 320, 64), (64, 1536, 32)],
)
def test_w4_equals_its_specification(isa: str, tokens: int, rows: int, columns: int, group_size: int) -> None:
    codes, factors, x = int4(rows, columns), scales(rows, columns // group_size), normal(tokens, columns)
    bias, out = normal(rows), normal(tokens, rows)
    acts = quantized(x)
    expected = spec.linear(codes, factors, acts.get(), bias, out.copy())
    _native.linear(pack_w4(codes, factors), acts, out, bias, True)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("tokens", [1, 3, 5, 17, 23])
@pytest.mark.parametrize(("columns", "group_size"), [(8, 8), (24, 24), (40, 8), (120, 40), (1032, 1032), (4112, 2056)])
def test_w4_groups_of_any_multiple_of_eight(isa: str, tokens: int, columns: int, group_size: int) -> None:
    codes, factors = int4(40, columns), scales(40, columns // group_size)
    acts = quantized(normal(tokens, columns))
    expected = spec.linear(codes, factors, acts.get())
    np.testing.assert_array_equal(linear(pack_w4(codes, factors), acts, tokens), expected)


@pytest.mark.parametrize("tokens", spec.TOKENS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 3), (32, 32), (33, 131), (70, 1028)])
def test_w8_equals_its_specification(isa: str, tokens: int, rows: int, columns: int) -> None:
    codes, factors = int8(rows, columns), f32_to_bf16(scales(rows))
    acts = quantized(normal(tokens, columns))
    expected = spec.linear(codes, factors[:, None], acts.get())
    np.testing.assert_array_equal(linear(_native.pack_w8(codes, factors), acts, tokens), expected)


@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("weight", [-1, 1])
@pytest.mark.parametrize("activation", [-128, 127])
def test_codes_at_their_limits_over_many_inputs(isa: str, tokens: int, weight: int, activation: int) -> None:
    columns = 16384
    x = np.full((tokens, columns), activation, np.int8)
    acts = _native.Activations(tokens, columns)
    acts.set(x, np.ones(tokens, np.float32), np.full(tokens, -128, np.int32))
    for limits, bits in (((-8, 7), 4), ((-128, 127), 8)):
        codes = np.full((33, columns), limits[weight > 0], np.int8)
        factors = np.ones((33, 1), np.float32)
        weights = pack_w4(codes, factors) if bits == 4 else _native.pack_w8(codes, factors[:, 0])
        expected = spec.linear(codes, factors, acts.get())
        np.testing.assert_array_equal(linear(weights, acts, tokens), expected)


def test_more_tokens_than_stay_in_cache(isa: str) -> None:
    codes, factors, x = int4(33, 2048), scales(33, 16), normal(700, 2048)  # three blocks
    acts = quantized(x)
    together = linear(pack_w4(codes, factors), acts, 700)
    np.testing.assert_array_equal(together, spec.linear(codes, factors, acts.get()))


@pytest.mark.parametrize("tokens", [1, 4, 8, 17, 64])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(48, 64, 32), (40, 4160, 32), (16, 256, 256), (5, 8, 8)])
def test_gated_rows_give_their_products(isa: str, tokens: int, rows: int, columns: int, group_size: int) -> None:
    gate, up = int4(rows, columns), int4(rows, columns)
    factors = [scales(rows, columns // group_size) for _ in range(2)]
    acts, bias = quantized(normal(tokens, columns)), normal(2 * rows)
    apart, together = np.empty((tokens, 2 * rows), np.float32), np.empty((tokens, rows), np.float32)
    packed = [_native.codes_to_packed(codes) for codes in (gate, up)]
    _native.linear(_native.pack_w4(packed, factors, group_size), acts, apart, bias)
    expected = np.empty_like(together)
    _native.swiglu(apart, expected)
    weights = _native.pack_w4(packed, factors, group_size, True)
    assert weights.gated
    _native.linear(weights, acts, together, bias)
    np.testing.assert_array_equal(together, expected)


def test_a_token_of_zeros_and_a_group_of_zeros(isa: str) -> None:
    codes, factors, x = int4(40, 128), scales(40, 4), normal(6, 128)
    codes[3, 32:64] = 0
    factors[3, 1] = 2.0**-126
    x[2] = 0
    acts = quantized(x)
    y = linear(pack_w4(codes, factors), acts, 6)
    np.testing.assert_array_equal(y, spec.linear(codes, factors, acts.get()))
    assert np.abs(y[2]).max() < 1e-30
    assert np.isfinite(y).all()


def test_rows_of_several_matrices_are_one_above_the_other(isa: str) -> None:
    codes, factors = int4(57, 256), scales(57, 8)
    pieces = [slice(0, 5), slice(5, 40), slice(40, 57)]
    stacked = _native.pack_w4([_native.codes_to_packed(codes[p]) for p in pieces], [factors[p] for p in pieces], 32)
    acts = quantized(normal(7, 256))
    np.testing.assert_array_equal(linear(stacked, acts, 7), linear(pack_w4(codes, factors), acts, 7))


def test_scales_on_the_bf16_grid_take_half_the_memory_in_either_form() -> None:
    codes, bits = int4(64, 256), f32_to_bf16(scales(64, 8))
    narrow, wide = pack_w4(codes, bits), pack_w4(codes, bf16_to_f32(bits))
    assert narrow.nbytes == wide.nbytes < pack_w4(codes, scales(64, 8)).nbytes
    acts = quantized(normal(3, 256))
    np.testing.assert_array_equal(linear(narrow, acts, 3), linear(wide, acts, 3))


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 64, 2048])
def test_quantize_equals_its_twin(isa: str, columns: int) -> None:
    x = normal(12, columns)
    x[1] = 0
    x[2] = np.abs(x[2])
    x[3] = -np.abs(x[3])
    x[4] *= np.float32(1e-42)  # subnormal
    x[5] *= np.float32(1e37)
    x[6] = np.arange(columns) % 256  # ties and the whole range
    x[7] = 1.0
    for found, expected in zip(quantized(x).get(), quantize_activations(x), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 70])
def test_what_is_not_finite_shows_in_the_result(isa: str, value: float, column: int) -> None:
    x = normal(3, 71)
    x[1, column] = value
    y = linear(_native.pack_w8(int8(32, 71), scales(32)), quantized(x), 3)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


def test_activations_can_be_set() -> None:
    codes, acts = int8(3, 45), _native.Activations(4, 45)
    triple = codes, scales(3), np.array([0, -128, 127], np.int32)
    acts.set(*triple)
    assert (acts.tokens, acts.columns, acts.max_tokens) == (3, 45, 4)
    for found, expected in zip(acts.get(), triple, strict=True):
        np.testing.assert_array_equal(found, expected)
    weights = int8(5, 45)
    expected = spec.linear(weights, np.ones((5, 1), np.float32), triple)
    np.testing.assert_array_equal(linear(_native.pack_w8(weights, np.ones(5, np.float32)), acts, 3), expected)


def test_a_buffer_is_an_array_that_keeps_its_memory() -> None:
    for shape in ((3, 5), (700, 1000), (0, 7)):
        buffer = _native.new_buffer(*shape)
        assert (buffer.shape, buffer.dtype) == (shape, np.float32)
        rows = buffer[:2]
        rows[:] = 1
        del buffer
        assert rows.sum() == rows.size
    with pytest.raises(MemoryError):
        _native.new_buffer(2**45, 2**10)


# ---- float operations ----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 16, 31, 128, 2048])
def test_rmsnorm(isa: str, columns: int) -> None:
    x, gamma, out = normal(5, columns), normal(columns), np.empty((5, columns), np.float32)
    x[3] = 0
    _native.rmsnorm(x, gamma, 1e-5, out)
    np.testing.assert_allclose(out, spec.rmsnorm(x, gamma, 1e-5), rtol=2e-6)
    acts = _native.Activations(5, columns)
    _native.rmsnorm_quantize(x, gamma, 1e-5, acts)
    for found, expected in zip(acts.get(), quantized(out).get(), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 1), (4, 2, 16), (3, 1, 31), (8, 8, 128)])
def test_rmsnorm_of_heads(isa: str, heads: int, kv_heads: int, dim: int) -> None:
    qkv, gammas = normal(5, (heads + 2 * kv_heads) * dim), (normal(dim), normal(dim))
    qkv[2] = 0
    found = qkv.copy()
    _native.rmsnorm_heads(found, *gammas, heads, 1e-5)
    ends = [heads * dim, (heads + kv_heads) * dim]
    *pairs, (values, kept) = zip(np.split(found, ends, axis=1), np.split(qkv, ends, axis=1), strict=True)
    np.testing.assert_array_equal(values, kept)
    for (normed, x), gamma in zip(pairs, gammas, strict=True):
        expected = np.empty((x.size // dim, dim), np.float32)
        _native.rmsnorm(np.ascontiguousarray(x).reshape(-1, dim), gamma, 1e-5, expected)
        np.testing.assert_array_equal(normed.reshape(-1, dim), expected)


@pytest.mark.parametrize("columns", [1, 16, 31, 1000])
def test_swiglu(isa: str, columns: int) -> None:
    gate_up, out = normal(6, 2 * columns), np.empty((6, columns), np.float32)
    gate_up[:, :columns] *= 20
    gate_up[4, :columns] = np.linspace(-87, 90, columns)
    gate_up[5, :columns] = np.linspace(-3e38, 3e38, columns)
    gate_up[5, columns:] = 0.5
    _native.swiglu(gate_up, out)
    # Below -87 silu is smaller than 1e-35: there only that is asked for.
    np.testing.assert_allclose(out, spec.swiglu(gate_up), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 33), (35, 512), (64, 2056)])
def test_float_weights(isa: str, dtype: str, rows: int, columns: int) -> None:
    w = {"f32": lambda a: a, "f16": lambda a: a.astype(np.float16), "bf16": f32_to_bf16}[dtype](normal(rows, columns))
    weights = _native.wrap_float([w[: rows // 2], w[rows // 2 :]])
    assert (weights.kind, weights.rows, weights.nbytes) == (dtype, rows, 0)
    x, bias = normal(64, columns), normal(rows)
    alone = np.concatenate([linear(weights, x[t : t + 1], 1) for t in range(64)])
    np.testing.assert_array_equal(alone, spec.float_linear(to_f32(w), x))
    for tokens in spec.TOKENS:
        np.testing.assert_array_equal(linear(weights, x[:tokens], tokens), alone[:tokens])
    out = normal(64, rows)
    expected = alone + bias + out
    _native.linear(weights, x, out, bias, True)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_embed(isa: str, dtype: type) -> None:
    ids = np.array([0, 69, 31, 32, 5, 5], dtype)
    table, out = normal(70, 45), np.empty((6, 45), np.float32)
    for rows in (table, table.astype(np.float16), f32_to_bf16(table)):
        _native.embed(_native.wrap_float([rows[:40], rows[40:]]), ids, out)
        np.testing.assert_array_equal(out, to_f32(rows)[ids])
    codes, factors = int8(70, 45), scales(70)
    _native.embed(_native.pack_w8(codes, factors), ids, out)
    np.testing.assert_array_equal(out, codes[ids] * factors[ids, None])


def test_every_half_value_is_widened_exactly(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(1, -1)
    out = np.empty((1, 65536), np.float32)
    _native.embed(_native.wrap_float([bits.view(np.float16)]), np.zeros(1, np.int32), out)
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))
    _native.embed(_native.wrap_float([bits]), np.zeros(1, np.int32), out)
    np.testing.assert_array_equal(out, bf16_to_f32(bits))


# ---- the same bits whatever computes them --------------------------------------------------------


def _all_operations() -> list[np.ndarray]:
    local = np.random.default_rng(7)
    x = local.standard_normal((23, 416)).astype(np.float32)
    norm, gated, heads = np.empty_like(x), np.empty((23, 208), np.float32), x.copy()
    _native.rmsnorm(x, x[0].copy(), 1e-6, norm)
    _native.rmsnorm_heads(heads, x[0, :52].copy(), x[1, :52].copy(), 4, 1e-6)
    _native.swiglu(x * 30, gated)
    acts = quantized(x)
    w4 = pack_w4(local.integers(-8, 8, (200, 416), dtype=np.int8), np.abs(x[:1, :13]).repeat(200, 0))
    w8 = _native.pack_w8(local.integers(-128, 128, (200, 416), dtype=np.int8), np.abs(x[0, :200]))
    bf16 = _native.wrap_float([f32_to_bf16(local.standard_normal((200, 416)).astype(np.float32))])
    return [norm, gated, heads, *acts.get(), linear(w4, acts, 23), linear(w8, acts, 23), linear(bf16, x, 23)]


def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    spec.assert_same_bits_everywhere(_all_operations)


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    codes, factors = int4(256, 512), scales(256, 16)
    weights = pack_w4(codes, factors)
    inputs = [quantized(normal(9, 512)) for _ in range(4)]
    expected = [linear(weights, acts, 9) for acts in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, right in zip(pool.map(lambda a: linear(weights, a, 9), inputs), expected, strict=True):
                np.testing.assert_array_equal(found, right)


def test_no_tokens_are_no_work(isa: str) -> None:
    acts = quantized(normal(0, 64))
    assert linear(pack_w4(int4(40, 64), scales(40, 2)), acts, 0).shape == (0, 40)
    assert linear(_native.wrap_float([normal(3, 64)]), normal(0, 64), 0).shape == (0, 3)
    _native.embed(_native.wrap_float([normal(3, 64)]), np.zeros(0, np.int32), np.empty((0, 64), np.float32))
    _native.swiglu(normal(0, 64), np.empty((0, 32), np.float32))
    _native.rmsnorm_heads(normal(0, 64), normal(16), normal(16), 2, 1e-5)


# ---- choice of instruction set, probes -----------------------------------------------------------


def test_environment_chooses_instruction_set_and_threads() -> None:
    assert _native.available_isas()[-1] == "scalar"
    chosen = run_program(PRINT_SETTINGS, LLAMITA_ISA="scalar", LLAMITA_THREADS="3")
    assert chosen.stdout.split() == ["scalar", "3"]
    assert "LLAMITA_ISA: expected an instruction set" in run_program(PRINT_SETTINGS, LLAMITA_ISA="mmx").stderr
    with pytest.raises(ValueError, match=r"isa: expected .* got 'mmx'; try one of .*scalar"):
        _native.set_isa("mmx")
    with pytest.raises(ValueError, match="threads: expected 1 to"):
        _native.set_threads(0)


def test_probes_measure_something(isa: str) -> None:
    assert _native.read_bandwidth(1 << 22) > 0
    if isa != "scalar":  # there it takes seconds and says nothing
        assert _native.int8_rate() > 0
