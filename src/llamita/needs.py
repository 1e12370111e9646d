"""Time and memory to expect of `quantize`: rounding and products of matrices are timed on small ones, the
rest follows from shapes."""

import time
from collections.abc import Callable

import numpy as np

from llamita import _native
from llamita.config import ModelConfig
from llamita.methods.chain import Chain
from llamita.methods.setup import BATCH_TOKENS, Setup
from llamita.quantize import Plan
from llamita.scheme import QuantScheme

_BASE_MEMORY = 110e6  # bytes: Python, NumPy and the pieces being rounded, as measured
_HASH_RATE = 1e9  # bytes read, hashed and written in a second, roughly
_PROBE_ROWS, _PROBE_COLUMNS = 512, 2048
_F32, _F64 = 4, 8  # bytes
_TORCH_MEMORY = 300e6  # bytes: Torch and transformers, loaded, without their files' pages
_BATCH_COPIES = 4  # of the widest hidden states of a batch that live at a time


def estimate(
    plan: Plan,
    scheme: QuantScheme,
    config: ModelConfig,
    chain: Chain,
    setup: Setup,
    samples: int,
    length: int,
) -> tuple[float, float]:
    """Seconds and bytes of memory to expect of `quantize` here; transforms and tuning are not counted.

    Args:
        samples, length: of the calibration text, in tokens.
    """
    weights = np.random.default_rng(0).standard_normal((_PROBE_ROWS, _PROBE_COLUMNS), np.float32)
    rule = "torchao" if scheme.scale_rule == "torchao" else "search"
    rounding = _best_time(lambda: _native.round_weights(weights, 4, scheme.group_size, rule, None))
    seconds = plan.rounded_weights * rounding / weights.size
    seconds += (plan.source_bytes + plan.file_bytes) / _HASH_RATE
    if not chain.is_blockwise:
        return seconds, _BASE_MEMORY
    product = _best_time(lambda: weights @ weights.T) / (2 * _PROBE_ROWS**2 * _PROBE_COLUMNS)
    seconds += expected_work(config, chain, samples, length) * product
    return seconds, _BASE_MEMORY + expected_memory(config, chain, setup, samples, length)


def _best_time(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def expected_memory(config: ModelConfig, chain: Chain, setup: Setup, samples: int, length: int) -> float:
    """Bytes of memory at the peak beside Python's own, pages of files not counted."""
    shapes = config.linear_shapes()
    widest = max(columns for _, columns in shapes.values())
    streams = 2 if _compares(chain) else 1
    states = 2 * streams * _F32 * samples * length * config.hidden_size  # in front of a block and behind it
    in_ram = states if states <= setup.memory else 0
    block = sum(rows * columns for rows, columns in shapes.values()) * (2 * _F32 + 1)  # float, rounded, codes
    batch = _BATCH_COPIES * _F32 * max(BATCH_TOKENS, length) * config.intermediate_size
    # Hessian, cross products, the matrix that is factored and its factor
    measured = widest * widest * (_F32 * streams + 2 * _F64 + _F32)
    # gate and up together: weights, targets, codes, and the transposed ones
    columns = 6 * _F32 * 2 * config.intermediate_size * config.hidden_size
    return _TORCH_MEMORY + in_ram + block + max(batch + _F32 * streams * widest**2, measured, columns)


def expected_work(config: ModelConfig, chain: Chain, samples: int, length: int) -> float:
    """Floating-point operations in float32, tuning and transforms not counted."""
    tokens, total = samples * length, 0.0
    compares = _compares(chain)
    for name, (rows, columns) in config.linear_shapes().items():
        twice = not name.endswith(("o_proj", "down_proj"))  # once to measure what follows, once to go on
        passes = (1 + twice) * (2 if compares else 1) if chain.rounding != "rtn" else 1 + compares
        total += 2 * passes * rows * columns * tokens
        if chain.rounding != "rtn":
            total += 2 * rows * columns * columns
    for inputs in (config.hidden_size, config.heads * config.head_dim, config.hidden_size,
                   config.intermediate_size):  # fmt: skip
        if chain.rounding != "rtn":
            total += (3 if compares else 1) * inputs * inputs * tokens + inputs**3
    return total * config.layers


def _compares(chain: Chain) -> bool:
    return chain.rounding == "qronos" or chain.tuning is not None
