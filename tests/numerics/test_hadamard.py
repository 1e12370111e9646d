"""Hadamard matrices by construction, and the fast transform in its specified order."""

import hashlib

import numpy as np
import pytest

from llamita.errors import InputError
from llamita.numerics.hadamard import core_signs, factor, fast_hadamard, fast_hadamard_inverse, hadamard_matrix

# What Llamas need: intermediate and hidden sizes of Llama 2, 3, TinyLlama, and head sizes.
SIZES = {64: 1, 128: 1, 8192: 1, 768: 12, 3072: 12, 5120: 20, 14336: 28, 28672: 28, 13824: 108, 11008: 172,
         5632: 44, 17920: 140, 6656: 52, 53248: 52, 5504: 172, 22016: 172, 576: 36, 1536: 12,
         20480: 20, 6912: 108}  # fmt: skip


@pytest.mark.parametrize(("size", "core"), SIZES.items())
def test_the_sizes_of_llamas_can_be_done(size: int, core: int) -> None:
    assert factor(size) == (core, int(np.log2(size // core)))


@pytest.mark.parametrize("core", [1, *(c for c in range(12, 180, 4) if c % 8), 76, 92, 148, 172, 200, 924])
def test_cores_are_hadamard_matrices(core: int) -> None:
    if core in (100, 116, 156):  # only twice or four times these
        assert factor(4 * core)[0] > core
        with pytest.raises(InputError, match=f"order {core}"):
            factor(core)
        return
    signs = core_signs(core).astype(int)
    assert set(np.unique(signs)) <= {-1, 1}
    np.testing.assert_array_equal(signs @ signs.T, core * np.eye(core, dtype=int))


@pytest.mark.parametrize("size", [-4, 0, 3, 6, 7, 96 + 1, 4 * 47, 4 * 1009])
def test_other_sizes_are_refused_by_name(size: int) -> None:
    with pytest.raises(InputError, match=f"order {size}"):
        fast_hadamard(np.zeros((1, max(size, 0)), np.float32)) if size > 0 else factor(size)


@pytest.mark.parametrize("size", [1, 2, 64, 12, 96, 160, 28, 344])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_fast_transform_is_the_matrix_and_can_be_undone(size: int, dtype: type) -> None:
    x = np.random.default_rng(size).standard_normal((2, 3, size)).astype(dtype)
    matrix = hadamard_matrix(size)
    close = {"atol": 1e-13 if dtype is np.float64 else 2e-6, "rtol": 0}
    y = fast_hadamard(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-13)
    np.testing.assert_allclose(y, x @ matrix.T, **close)
    np.testing.assert_allclose(fast_hadamard_inverse(y), x, **close)


@pytest.mark.parametrize("size", [8, 48, 112])
def test_sums_come_in_the_specified_order(size: int) -> None:
    """One value at a time, as docs/reference/numerics.md says it."""
    x = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    core, power = factor(size)
    y, width, step = x.copy(), 2**power, 1
    while step < width:
        for i in range(size):
            if not i // step % 2:
                y[i], y[i + step] = y[i] + y[i + step], y[i] - y[i + step]
        step *= 2
    if core > 1:
        before, signs = y.copy(), core_signs(core)
        for i in range(size):
            total = np.float32(0)
            for k in range(core):
                total = np.float32(total + np.float32(signs[i // width, k]) * before[k * width + i % width])
            y[i] = total
    np.testing.assert_array_equal(fast_hadamard(x), y * np.float32(1 / np.sqrt(size)))


def test_the_matrices_never_change() -> None:
    """Weights of published models were multiplied with them: the signs are part of the format."""
    digest = hashlib.sha256()
    for core in (12, 20, 28, 36, 44, 52, 60, 76, 92, 108, 140, 172, 200, 312):
        digest.update(core_signs(core).tobytes())
    assert digest.hexdigest()[:16] == "5a71fbeb58dc9573"
