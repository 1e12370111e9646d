"""Products of bf16 weights with inputs rounded to bf16, where the processor has them; elsewhere, float32 products."""

import kernel_specs as spec
import numpy as np
import pytest

import llamita
from llamita import _native
from llamita.errors import InputError
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16

SIZES = [(1, 1), (7, 31), (33, 33), (35, 512), (47, 1000), (100, 1056), (64, 2056)]  # (rows, columns)
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def linear(weights: _native.Weights, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), weights.rows), np.nan, np.float32)
    _native.linear(weights, x, out)
    return out


def wrap(w: np.ndarray) -> _native.Weights:
    return _native.wrap_float([w[: len(w) // 3], w[len(w) // 3 :]], bf16_products=True)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_error_and_fallback(isa: str, rows: int, columns: int) -> None:
    w, x = f32_to_bf16(normal(rows, columns)), normal(64, columns)
    weights, found = wrap(w), linear(wrap(w), x)
    wide, rounded = bf16_to_f32(w).astype(np.float64), bf16_to_f32(f32_to_bf16(x)).astype(np.float64)
    if not weights.bf16_products:
        return np.testing.assert_array_equal(found, spec.float_linear(bf16_to_f32(w), x))
    # Products of two bf16 are exact in float32, so each of `columns` additions and two more round once.
    bound = (columns + 2) * 2.0**-24 * (np.abs(rounded) @ np.abs(wide).T)
    assert (np.abs(found - rounded @ wide.T) <= bound).all()
    # Rounding an input to 8 significant bits moves it by 2^-9 of itself at most, and sums of 2^-9 of all at most.
    assert (np.abs(found - x @ wide.T) <= bound + 2.0**-8 * (np.abs(x) @ np.abs(wide).T)).all()


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_tokens_and_threads_change_nothing(isa: str, rows: int, columns: int) -> None:
    weights, x, before = wrap(f32_to_bf16(normal(rows, columns))), normal(64, columns), _native.threads()
    alone = np.concatenate([linear(weights, x[t : t + 1]) for t in range(64)])
    try:
        for threads in (1, 2, 5):
            _native.set_threads(threads)
            for tokens in (*spec.TOKENS, 9, 12, 13, 24, 40):
                np.testing.assert_array_equal(linear(weights, x[:tokens]), alone[:tokens])
    finally:
        _native.set_threads(before)


@pytest.mark.parametrize("tokens", [1, 8, 9, 30])
def test_bias_and_residual_are_added_last(isa: str, tokens: int) -> None:
    weights, x, bias, out = wrap(f32_to_bf16(normal(45, 70))), normal(tokens, 70), normal(45), normal(tokens, 45)
    expected = linear(weights, x) + bias + out
    _native.linear(weights, x, out, bias, True)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("tokens", [1, 20])
def test_what_is_not_finite_shows_where_it_is(isa: str, tokens: int) -> None:
    w, x = normal(40, 70), normal(tokens, 70)
    w[3, 69], x[-1, 0] = np.nan, np.inf
    found = linear(wrap(f32_to_bf16(w)), x)
    assert not np.isfinite(found[-1]).any()
    assert np.isfinite(np.delete(found[:-1], 3, axis=1)).all()
    assert np.isnan(found[:, 3]).all()


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(("pair", "rest"), [((1, 1), 0), ((1, 1.5), 2), ((1.5, 1), 1)])
def test_an_instruction_adds_the_second_product_first(isa: str, tokens: int, pair: tuple, rest: int) -> None:
    """To 1, pairs 0 and 4 of a sum add products in units of 2^-24, half of the last place, which ties round away."""
    x, w = np.zeros((tokens, 10), np.float32), np.zeros((1, 10), np.float32)
    x[:, 0], x[:, 8:] = 1, 2.0**-12 * np.array(pair, np.float32)
    w[:, 0], w[:, 8:] = 1, 2.0**-12
    weights = wrap(f32_to_bf16(w))
    if weights.bf16_products:
        np.testing.assert_array_equal(linear(weights, x), np.float32(1 + rest * 2.0**-23))


def test_only_bf16_weights_have_these_products(isa: str) -> None:
    w, x = normal(40, 70), normal(20, 70)
    for floats in (w, w.astype(np.float16)):
        weights = _native.wrap_float([floats], bf16_products=True)
        assert not weights.bf16_products
        np.testing.assert_array_equal(linear(weights, x), linear(_native.wrap_float([floats]), x))
    assert not _native.wrap_float([f32_to_bf16(w)]).bf16_products  # unless asked


def test_a_model_says_what_it_uses() -> None:
    has_products = wrap(f32_to_bf16(normal(3, 4))).bf16_products
    reference, fast = llamita.load("embedded"), llamita.load("embedded", float_math="bf16")
    assert (reference.float_math, fast.float_math) == ("f32", "bf16" if has_products else "f32")
    ids = np.arange(40)
    assert np.array_equal(reference.logits(ids), fast.logits(ids)) == (not has_products)
    products = 4 * reference.config.layers + 1  # each adds a change of 2^-9 of its inputs, at most, to the stream
    change = np.linalg.norm(fast.logits(ids) - reference.logits(ids)) / np.linalg.norm(reference.logits(ids))
    assert change < products * 2.0**-9
    assert llamita.load("embedded", scheme="llama3.2", float_math="bf16").float_math == "f32"  # no float layer
    with pytest.raises(InputError, match="float_math: expected one of f32, bf16, got 'bf16x2'"):
        llamita.load("embedded", float_math="bf16x2")
