"""Blocks of GGUF's weights, against their definition."""

import numpy as np
import pytest

from llamita.formats import gguf_blocks
from llamita.formats.gguf import KINDS
from llamita.formats.gguf_blocks import DECODERS, floats_of


def test_q6_k_is_as_its_definition_has_it() -> None:
    """Against a loop over the weights of a block, as ggml's reference counts them."""
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (2, 3 * 210), dtype=np.uint8)
    blocks = data.reshape(-1, 210)
    blocks[:, 208:] = random.normal(0, 0.01, (6, 1)).astype("<f2").view(np.uint8)
    expected = np.empty((6, 256), np.float32)
    for block, out in zip(blocks, expected, strict=True):
        scale = block[208:].copy().view("<f2").astype(np.float32)[0]
        for place in range(256):
            half, within = divmod(place, 128)
            quarter, lane = divmod(within, 32)
            low = block[64 * half + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2)) & 15
            high = block[128 + 32 * half + lane] >> (2 * quarter) & 3
            own = block[192 + place // 16].astype(np.int8)
            out[place] = scale * np.float32(own) * np.float32(int(low | high << 4) - 32)
    np.testing.assert_array_equal(floats_of("Q6_K", data), expected.reshape(2, -1))


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_every_kind_has_the_values_of_ggmls_own_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the package gguf")
    number, weights, width = KINDS[kind]
    own = gguf.GGMLQuantizationType[kind]
    assert (int(own), gguf.GGML_QUANT_SIZES[own]) == (number, (weights, width))
    data = np.random.default_rng(0).integers(0, 256, (64, 8 * width), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are infinite here and there
        found, expected = floats_of(kind, data), gguf.quants.dequantize(data, own)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), ~numbers)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


def test_no_kind_of_the_package_is_missing() -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the package gguf")
    known = {kind.name for kind in gguf.quants._type_traits} - {"BF16"}
    assert known == set(DECODERS)


def test_a_large_matrix_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 120, (5, 3 * 144), dtype=np.uint8)
    whole = floats_of("Q4_K", data)
    monkeypatch.setattr(gguf_blocks, "_WEIGHTS_AT_ONCE", 512)
    np.testing.assert_array_equal(floats_of("Q4_K", data), whole)
