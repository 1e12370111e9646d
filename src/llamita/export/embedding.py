"""Store the embedding as ExecuTorch does: float, int8 per row, or int4 in groups."""

import numpy as np
import torch
from torch import Tensor, nn

from llamita._native import round_weights
from llamita.errors import InputError
from llamita.models.names import EMBEDDING
from llamita.models.packed import PackedModel
from llamita.models.weights import Int8Weight
from llamita.numerics.affine import dequantize, to_f32

GROUP_SIZE = 32  # of an int4 embedding, as in Meta's exports
_RANGES = {8: (-128, 127), 4: (-8, 7)}


class QuantizedEmbedding(nn.Module):
    """Rows of codes and scales, looked up and multiplied out.

    Args:
        codes: int8 (rows, columns), or uint8 (rows, columns / 2) with two int4 codes + 8 in a byte, the first in the
            high half.
        scales: (rows,) or (rows, groups), float32; with 4 bits float16 is possible, too.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bits = bits

    def forward(self, ids: Tensor) -> Tensor:
        """Turn token ids (...) into float32 (..., columns)."""
        ops = torch.ops.quantized_decomposed
        look_up = ops.embedding_byte.dtype if self.bits == 8 else ops.embedding_4bit.dtype
        lowest, highest = _RANGES[self.bits]
        return look_up(self.codes, self.scales, None, lowest, highest, ids, dtype=torch.float32)


def embedding_of(packed: PackedModel, bits: int) -> nn.Module:
    """Return the embedding of a packed model, with its int8 codes as they are, or rounded to 4 bits.

    Raises:
        InputError: 4 bits are asked of a float embedding.
    """
    weight = packed.weight(EMBEDDING)
    if isinstance(weight, np.ndarray):
        if bits == 4:
            raise InputError("--embedding 4", "an int8 embedding", "a float one", "try --preset llama3.2")
        return nn.Embedding.from_pretrained(torch.from_numpy(np.array(to_f32(weight))))
    assert isinstance(weight, Int8Weight)
    if bits == 8:
        scales = torch.from_numpy(np.array(to_f32(weight.scales)).reshape(-1))
        return QuantizedEmbedding(torch.from_numpy(np.array(weight.codes)), scales, 8)
    floats = dequantize(np.asarray(weight.codes), weight.scales)
    codes, scales, _ = round_weights(floats, 4, GROUP_SIZE, "search")
    unsigned = (codes + 8).astype(np.uint8)
    pairs, floats32 = torch.from_numpy(unsigned[:, ::2] << 4 | unsigned[:, 1::2]), torch.from_numpy(scales)
    is_exact = bool((floats32.half().float() == floats32).all())  # float16 then takes half the bytes
    return QuantizedEmbedding(pairs, floats32.half() if is_exact else floats32, 4)
