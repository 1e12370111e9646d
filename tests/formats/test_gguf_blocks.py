"""Blocks of GGUF's weights, against their definition."""

import numpy as np

from llamita.formats.gguf_blocks import floats_of


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
