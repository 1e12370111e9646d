"""The fast Hadamard transform on every instruction set, bit for bit against NumPy, and against its matrix."""

import kernel_specs as spec
import numpy as np
import pytest

from llamita import _native
from llamita.numerics.hadamard import core_signs, factor, fast_hadamard

rng = np.random.default_rng(0)
SIZES = [2**m for m in range(15)]  # below, at and above a vector, every width of a pass
MIXED = [(3, 1), (1, 8), (12, 1), (12, 2), (5, 8), (20, 16), (28, 32), (44, 8), (12, 64), (28, 512), (172, 4)]


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def signs(order: int) -> np.ndarray:
    """The order of sums does not ask whether the rows are orthogonal."""
    return rng.choice(np.array([-1, 1], np.int8), (order, order))


def transformed(x: np.ndarray, matrix: np.ndarray | None = None) -> np.ndarray:
    out = np.full_like(x, np.nan)
    _native.hadamard(_native.Hadamard(x.shape[1], matrix), x, out)
    return out


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


@pytest.mark.parametrize("size", SIZES)
def test_powers_of_two_equal_their_specification(isa: str, size: int) -> None:
    x = normal(3, size)
    np.testing.assert_array_equal(transformed(x), spec.hadamard(x))


@pytest.mark.parametrize(("order", "size"), MIXED)
def test_runs_are_summed_in_order(isa: str, order: int, size: int) -> None:
    x, matrix = normal(3, order * size), signs(order)
    np.testing.assert_array_equal(transformed(x, matrix), spec.hadamard(x, matrix))


@pytest.mark.parametrize(("order", "size"), [(1, 1), (1, 8), (1, 512), (12, 4), (20, 32)])
def test_it_is_the_product_with_the_matrix(isa: str, order: int, size: int) -> None:
    matrix = None if order == 1 else signs(order)
    whole = np.kron(np.ones((1, 1)) if matrix is None else matrix, sylvester(size)) / np.sqrt(order * size)
    x = normal(4, order * size)
    np.testing.assert_allclose(transformed(x, matrix), x @ whole.T, atol=2e-6 * np.sqrt(order))


@pytest.mark.parametrize("size", [64, 768, 8192, 11008])  # 11008 = 172 · 64
def test_it_has_the_bits_of_its_twin(isa: str, size: int) -> None:
    core, _ = factor(size)
    x = normal(2, size)
    np.testing.assert_array_equal(transformed(x, core_signs(core) if core > 1 else None), fast_hadamard(x))


@pytest.mark.parametrize("size", [1, 4, 64, 4096])
def test_it_is_its_own_inverse(isa: str, size: int) -> None:
    x = normal(2, size)
    np.testing.assert_allclose(transformed(transformed(x)), x, atol=1e-5)


def test_in_place_and_row_by_row_it_is_the_same(isa: str) -> None:
    for columns, matrix in ((8, None), (2048, None), (768, signs(12))):
        transform, x = _native.Hadamard(columns, matrix), normal(9, columns)
        expected = transformed(x, matrix)
        rows = np.concatenate([transformed(x[t : t + 1], matrix) for t in range(9)])
        np.testing.assert_array_equal(rows, expected)
        _native.hadamard(transform, x, x)
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(("columns", "order"), [(8, 1), (64, 1), (8192, 1), (96, 12), (768, 12), (40, 5)])
def test_quantized_it_is_quantized_afterwards(isa: str, columns: int, order: int) -> None:
    matrix = None if order == 1 else signs(order)
    x = normal(7, columns)
    x[2] = 0
    kept, acts, expected = x.copy(), _native.Activations(8, columns), _native.Activations(7, columns)
    _native.hadamard_quantize(_native.Hadamard(columns, matrix), x, acts)
    _native.quantize(transformed(x, matrix), expected)
    for found, right in zip(acts.get(), expected.get(), strict=True):
        np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(isa: str, value: float) -> None:
    x = normal(3, 768)
    x[1, 700] = value
    acts = _native.Activations(3, 768)
    _native.hadamard_quantize(_native.Hadamard(768, signs(12)), x, acts)
    factors = acts.get()[1]
    assert not np.isfinite(factors[1])
    assert np.isfinite(factors[[0, 2]]).all()


def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    x, matrix = normal(23, 28 * 512), signs(28)
    spec.assert_same_bits_everywhere(lambda: (transformed(x, matrix), transformed(x[:, :8192].copy())))


def test_no_tokens_are_no_work(isa: str) -> None:
    transform, acts = _native.Hadamard(64), _native.Activations(2, 64)
    _native.hadamard_quantize(transform, normal(0, 64), acts)
    assert (acts.tokens, transform.columns) == (0, 64)
    assert transformed(normal(0, 64)).shape == (0, 64)


@pytest.mark.parametrize(
    ("columns", "matrix", "message"),
    [
        (24, None, "columns: expected 1 times a power of two, got 24"),
        (24, np.ones((12, 12), np.int8), None),
        (36, np.ones((12, 12), np.int8), "columns: expected 12 times a power of two, got 36"),
        (4, np.ones((12, 12), np.int8), "columns: expected 12 times a power of two, got 4"),
        (0, None, "columns: expected 1 to 65536, got 0"),
        (65537, None, "columns: expected 1 to 65536"),
        (24, np.ones((12, 6), np.int8), "signs: expected as many rows as columns"),
        (24, np.ones((0, 0), np.int8), "signs: expected as many rows as columns"),
        (24, np.zeros((12, 12), np.int8), "signs: expected 1 and -1 alone"),
        (24, np.full((12, 12), -128, np.int8), "signs: expected 1 and -1 alone"),
        (24, np.ones((12, 12), np.float32), "signs: expected int8"),
    ],
)
def test_transforms_that_do_not_exist(columns: int, matrix: np.ndarray | None, message: str | None) -> None:
    if message is None:
        assert _native.Hadamard(columns, matrix).columns == columns
        return
    with pytest.raises(ValueError, match=message):
        _native.Hadamard(columns, matrix)


def test_arrays_that_do_not_fit() -> None:
    transform, x = _native.Hadamard(64), normal(2, 64)
    with pytest.raises(ValueError, match=r"x: expected float32 \(any, 64\)"):
        _native.hadamard(transform, normal(2, 32), x)
    with pytest.raises(ValueError, match=r"out: expected float32 \(2, 64\)"):
        _native.hadamard(transform, x, normal(3, 64))
    with pytest.raises(ValueError, match="acts: expected 64 columns, got 32"):
        _native.hadamard_quantize(transform, x, _native.Activations(2, 32))
    with pytest.raises(ValueError, match="x: expected at most 1 tokens, got 2"):
        _native.hadamard_quantize(transform, x, _native.Activations(1, 64))
