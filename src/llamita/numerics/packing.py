"""Pack int4 codes into compressed-tensors' `pack-quantized` words, and unpack them.

Eight codes per int32, lowest bits first, each stored as code + 8 (so 0 to 15).
"""

import numpy as np
import numpy.typing as npt

CODES_PER_WORD = 8
OFFSET = 8  # makes int4 codes unsigned


def pack_int4(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """Pack codes from -8 to 7, (rows, columns) int8, into words (rows, columns / 8) int32."""
    rows, columns = codes.shape
    if columns % CODES_PER_WORD:
        raise ValueError(f"pack_int4: expected columns in eights, got {columns}")
    if codes.size and not (codes.min() >= -OFFSET and codes.max() < OFFSET):
        raise ValueError(f"pack_int4: expected codes from -8 to 7, got {codes.min()} to {codes.max()}")
    nibbles = (codes + np.int8(OFFSET)).view(np.uint8)
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)  # (rows, columns / 2), in the order of memory
    return np.ascontiguousarray(pairs).view("<i4").astype(np.int32, copy=False).reshape(rows, -1)


def unpack_int4(packed: npt.NDArray[np.int32]) -> npt.NDArray[np.int8]:
    """Unpack words (rows, columns / 8) int32 to codes (rows, columns) int8: the inverse of `pack_int4`."""
    rows, words = packed.shape
    pairs = np.ascontiguousarray(packed, "<i4").view(np.uint8).reshape(rows, 4 * words)  # 4 bytes a word
    codes = np.empty((rows, CODES_PER_WORD * words), np.int8)
    codes[:, 0::2] = (pairs & 15).astype(np.int8) - OFFSET
    codes[:, 1::2] = (pairs >> 4).astype(np.int8) - OFFSET
    return codes
