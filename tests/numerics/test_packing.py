"""int4 codes in 32-bit words: the inverse of itself, equal to compressed-tensors and to the native packer."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llamita import _native
from llamita.numerics.packing import pack_int4, unpack_int4

codes_arrays = st.tuples(st.integers(1, 9), st.integers(1, 12)).flatmap(
    lambda shape: hnp.arrays(np.int8, (shape[0], 8 * shape[1]), elements=st.integers(-8, 7))
)


@given(codes_arrays)
@settings(max_examples=100, deadline=None)
def test_unpacking_undoes_packing(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    assert packed.dtype == np.int32
    assert packed.shape == (codes.shape[0], codes.shape[1] // 8)
    np.testing.assert_array_equal(unpack_int4(packed), codes)
    np.testing.assert_array_equal(_native.codes_to_packed(np.ascontiguousarray(codes)), packed)


@given(hnp.arrays(np.int32, (3, 5)))
@settings(max_examples=50, deadline=None)
def test_packing_undoes_unpacking(words: np.ndarray) -> None:
    np.testing.assert_array_equal(pack_int4(unpack_int4(words)), words)


def test_first_code_has_the_lowest_bits() -> None:
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, 7]], np.int8)
    assert pack_int4(codes)[0, 0] == np.uint32(0xF6543210).astype(np.int32)


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors not installed")
def test_words_equal_those_of_compressed_tensors() -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = np.random.default_rng(0).integers(-8, 8, (37, 256)).astype(np.int8)
    np.testing.assert_array_equal(pack_int4(codes), pack_to_int32(torch.from_numpy(codes), 4).numpy())


@pytest.mark.parametrize(
    "codes", [np.full((1, 8), 8, np.int8), np.full((1, 8), -9, np.int8), np.zeros((1, 12), np.int8)]
)
def test_codes_out_of_range_or_in_a_broken_word_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        pack_int4(codes)
