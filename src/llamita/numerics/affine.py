"""Round weights and activations in NumPy: the specification that every native kernel must match bit for bit.

Weights are symmetric (Jacob et al. 2018, per group), activations dynamic and asymmetric (per token): the formulas of
torchao's W4A8, in FP32, half to even. bf16 is held as its bits in uint16 arrays. Slow on purpose: `llamita._native`
is the fast twin.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]

SMALLEST_NORMAL = np.float32(2.0**-126)  # torchao's eps: smaller scales would be subnormal
CODE_RANGE = {4: (-8, 7), 8: (-128, 127)}
RULES = ("torchao", "torchao_bf16", "search")
LANES = 16  # partial sums of the squared error: one AVX-512 register


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> F32:
    """Return bf16 bits as float32, exactly: bf16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: F32) -> npt.NDArray[np.uint16]:
    """Round float32 to bf16 bits, half to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    # Add half of the part to cut off, less one if the kept part is even: this carries exactly when it should.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_f32(array: Array) -> F32:
    """Return float32, float16 or bf16 bits (uint16) as float32."""
    if array.dtype == np.uint16:
        return bf16_to_f32(array.view(np.uint16))
    if array.dtype not in (np.float32, np.float16):
        raise ValueError(f"expected float32, float16 or bf16 bits in uint16, got {array.dtype}")
    return np.asarray(array, np.float32)


def round_weights(
    w: Array, bits: int, group_size: int, rule: str, importance: F32 | None = None
) -> tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.float64]]:
    """Round weights to symmetric integers, one scale per group of inputs.

    Args:
        w: (rows, columns) float32, float16 or bf16 bits, finite.
        bits: 4 or 8.
        group_size: divides `columns`; `columns` itself rounds per channel.
        rule: "torchao" (largest weight over 7.5 or 127.5), "torchao_bf16" (the same scale rounded to bf16
            before the codes are chosen) or "search" (least squared error on the bf16 grid).
        importance: (columns,) positive factors of each input's squared error in the search.

    Returns:
        codes (rows, columns), scales (rows, columns / group_size), and the squared error of each row (rows,)
        without importance: FP32 within a group, FP64 across groups.
    """
    weights = to_f32(w)
    rows, columns = weights.shape
    if bits not in CODE_RANGE or rule not in RULES or group_size < 1 or columns % group_size:
        what = f"{bits} bits, rule {rule!r}, {columns} inputs in groups of {group_size}"
        raise ValueError(f"round_weights: expected 4 or 8 bits, a known rule and whole groups, got {what}")
    if not np.isfinite(weights).all():
        raise ValueError("round_weights: weights: expected finite values, got NaN or infinity")
    groups = weights.reshape(-1, group_size)  # (rows * groups, group_size)
    if rule == "torchao":
        scales = _torchao_scales(groups, bits)
    elif rule == "torchao_bf16":
        scales = bf16_to_f32(f32_to_bf16(_torchao_scales(groups, bits)))
    else:
        factors = None if importance is None else _per_group(importance, rows, group_size)
        scales = _searched_scales(groups, bits, factors)
    codes = codes_at(groups, scales, bits)
    per_group = _squared_error(groups, scales, bits, None).astype(np.float64)
    squared_error = per_group.reshape(rows, -1).sum(axis=1)
    return codes.astype(np.int8).reshape(rows, columns), scales.reshape(rows, -1), squared_error


def _torchao_scales(groups: F32, bits: int) -> F32:
    qmin, qmax = CODE_RANGE[bits]
    largest = np.maximum(-np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0))
    return np.maximum(largest / np.float32((qmax - qmin) / 2), SMALLEST_NORMAL)


def codes_at(groups: F32, scales: F32, bits: int) -> F32:
    """Return the codes nearest to groups (groups, group_size) at scales (groups,), as float32."""
    reciprocal = np.float32(1) / scales[:, None]  # multiply, as torchao does, instead of dividing
    return np.clip(np.rint(groups * reciprocal), *CODE_RANGE[bits])


def _per_group(importance: F32, rows: int, group_size: int) -> F32:
    return np.tile(np.asarray(importance, np.float32).reshape(-1, group_size), (rows, 1))


def _searched_scales(groups: F32, bits: int, importance: F32 | None) -> F32:
    """Return the scale of least squared error per group, among all bf16 values of a little more than an octave.

    Below largest/(2·qmax+2) the largest weight would be clipped to less than half; above largest/qmax the grid is
    coarser than the weights need. torchao's scale, rounded to bf16, is always a candidate.
    """
    qmax = CODE_RANGE[bits][1]
    largest = np.abs(groups).max(axis=1)
    low = _bf16_up(np.maximum(largest / np.float32(2 * qmax + 2), SMALLEST_NORMAL))
    high = _bf16_down(np.maximum(largest / np.float32(qmax), SMALLEST_NORMAL))
    usual = f32_to_bf16(np.maximum(largest / np.float32(qmax + 0.5), SMALLEST_NORMAL))
    best, best_error = usual, _squared_error(groups, bf16_to_f32(usual), bits, importance)
    for step in range(int((high.astype(np.int32) - low).max()) + 1):
        bit_pattern = np.minimum(low + np.uint16(step), high)  # bf16 bits of positive values count upwards
        error = _squared_error(groups, bf16_to_f32(bit_pattern), bits, importance)
        better = (error < best_error) | ((error == best_error) & (bit_pattern > best))
        best, best_error = np.where(better, bit_pattern, best), np.where(better, error, best_error)
    # Any scale gives a group of zeros the same weights; 1 is exact in every format.
    return np.where(largest == 0, np.float32(1), bf16_to_f32(best))


def _squared_error(groups: F32, scales: F32, bits: int, importance: F32 | None) -> F32:
    """Return Σ importance·e² of each group in the native kernels' order of sums: lane k mod 16, then a tree."""
    error = groups - codes_at(groups, scales, bits) * scales[:, None]
    with np.errstate(over="ignore"):  # weights from about 1e19 on: infinite errors tie, largest scale wins
        terms = error * error if importance is None else error * error * importance
        lanes = np.zeros((len(groups), LANES), np.float32)
        for start in range(0, groups.shape[1], LANES):
            part = terms[:, start : start + LANES]
            lanes[:, : part.shape[1]] += part
        for width in (8, 4, 2, 1):
            lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return lanes[:, 0]


def _bf16_down(x: F32) -> npt.NDArray[np.uint16]:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def _bf16_up(x: F32) -> npt.NDArray[np.uint16]:
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def quantize_activations(x: F32) -> tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.int32]]:
    """Round activations (tokens, columns) float32 to int8, one scale and zero point per token.

    Returns:
        codes (tokens, columns), scales (tokens,), zero_points (tokens,). Zero is always representable.
    """
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    scales = np.maximum((high - low) / np.float32(255), SMALLEST_NORMAL)
    zero_points = np.clip(-128 - np.rint(low / scales), -128, 127)
    codes = np.clip(np.rint(x * (np.float32(1) / scales)[:, None]) + zero_points[:, None], -128, 127)
    return codes.astype(np.int8), scales, zero_points.astype(np.int32)


def dequantize(codes: npt.NDArray[np.int8], scales: Array, zero_points: npt.NDArray[np.int32] | None = None) -> F32:
    """Return (codes - zero point) · scale in float32, of weights (scales per group or channel) or activations.

    Args:
        codes: (rows, columns).
        scales: (rows,) or (rows, groups), float32 or bf16 bits.
        zero_points: (rows,), or None for symmetric codes.
    """
    rows, columns = codes.shape
    per_group = to_f32(scales).reshape(rows, -1)  # (rows, groups)
    values = codes.astype(np.float32)
    if zero_points is not None:
        values -= zero_points.astype(np.float32)[:, None]
    return (values.reshape(rows, per_group.shape[1], -1) * per_group[:, :, None]).reshape(rows, columns)
