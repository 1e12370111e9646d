"""Estimate sizes, time and memory of `quantize` before any work.

Sizes follow from shapes. So do time and memory, from small roundings and products of matrices that are timed here.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from llamita import _native
from llamita.methods.chain import Chain
from llamita.methods.settings import CHECKED, SpinQuantSettings, TuneSettings, settings_of
from llamita.methods.setup import BATCH_TOKENS, Setup
from llamita.models.config import ModelConfig
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.sizes import Plan, float_bytes, make_plan
from llamita.numerics.scheme import QuantScheme

_BASE_MEMORY = 110e6  # bytes, measured: Python, NumPy and the pieces that are rounded
_HASH_RATE = 1e9  # bytes read, hashed and written in a second, about
_PROBE_ROWS, _PROBE_COLUMNS = 512, 2048
_F32, _F64 = 4, 8  # bytes
_TORCH_MEMORY = 300e6  # bytes: Torch and transformers, without the pages of their files
_BATCH_COPIES = 4  # of a batch's widest hidden states at a time
_LOGIT_COPIES = 6  # of a step's logits while rotations are learned
_SLOWER = 2.2  # times products of matrices alone, measured on a small and on a large model
_BACKWARD = 2  # times the work of the forward pass


def plan_chain(
    config: ModelConfig, scheme: QuantScheme, float_dtype: Callable[[str], str], chain: Chain,
    settings: dict[str, Any], source_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """Return the plan (`make_plan`) of what the chain's transforms make of a model of this shape.

    Args:
        source_bytes: size of the model before, if its files do not have these dtypes.
    """
    changed, transform = chain.shape(config, settings)

    def dtype(name: str) -> str:
        return float_dtype(f"{EMBEDDING}.weight" if config.tied and name == f"{HEAD}.weight" else name)

    before = float_bytes(config, float_dtype) if source_bytes is None else source_bytes
    return make_plan(changed, scheme, dtype, transform=transform, source_bytes=before)


def estimate(
    plan: Plan, scheme: QuantScheme, config: ModelConfig, chain: Chain, setup: Setup, samples: int, length: int
) -> tuple[float, float]:
    """Return the seconds and bytes of memory to expect of `quantize` here, without writing calibration text.

    Args:
        samples, length: of the calibration text, in tokens.
    """
    weights = np.random.default_rng(0).standard_normal((_PROBE_ROWS, _PROBE_COLUMNS), np.float32)
    rule = "torchao" if scheme.scale_rule == "torchao" else "search"
    rounding = _best_time(lambda: _native.round_weights(weights, 4, scheme.group_size, rule, None))
    seconds = plan.rounded_weights * rounding / weights.size
    seconds += (plan.source_bytes + plan.file_bytes) / _HASH_RATE
    if not chain.needs_calibration(setup.settings):
        return seconds, _BASE_MEMORY
    product = _best_time(lambda: weights @ weights.T) / (2 * _PROBE_ROWS**2 * _PROBE_COLUMNS)
    seconds += _SLOWER * expected_work(config, chain, setup, samples, length) * product
    return seconds, _BASE_MEMORY + expected_memory(config, chain, setup, samples, length)


def _best_time(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def expected_memory(config: ModelConfig, chain: Chain, setup: Setup, samples: int, length: int) -> float:
    """Return the bytes of memory at the peak, without Python's own and pages of files."""
    blocks = _blocks_memory(config, chain, setup, samples, length) if chain.is_blockwise else 0
    return _TORCH_MEMORY + max(blocks, _learning_memory(config, chain, setup, length))


def _blocks_memory(config: ModelConfig, chain: Chain, setup: Setup, samples: int, length: int) -> float:
    shapes = config.linear_shapes()
    widest = max(columns for _, columns in shapes.values())
    streams = 2 if _compares(chain) else 1
    states = 2 * streams * _F32 * samples * length * config.hidden_size  # in front of a block and behind it
    in_ram = states if states <= setup.memory else 0
    weights = sum(rows * columns for rows, columns in shapes.values())
    block = weights * (2 * _F32 + 1)  # float, rounded, codes
    batch = _BATCH_COPIES * _F32 * max(BATCH_TOKENS, length) * config.intermediate_size
    # Hessian, cross products, the factored matrix and its factor; weights, targets and codes
    measured = widest * widest * (_F32 * streams + 2 * _F64 + _F32) + 3 * _F32 * widest * config.hidden_size
    # gate and up together: weights, targets, codes, and the transposed ones
    columns = 6 * _F32 * 2 * config.intermediate_size * config.hidden_size
    # places, their bounds, gradients, weights and Adam's moments
    tuned = 8 * _F32 * weights if chain.tuning else 0
    return in_ram + block + max(batch + _F32 * streams * widest**2, measured, columns, tuned)


def _learning_memory(config: ModelConfig, chain: Chain, setup: Setup, length: int) -> float:
    """Return the memory of learning: the whole model, a layer's weights three more times, and the kept activations."""
    if not chain.learns(setup.settings):
        return 0
    block = sum(rows * columns for rows, columns in config.linear_shapes().values())
    settings = settings_of(SpinQuantSettings, "spinquant", setup.settings)
    tokens, stored = settings.batch * length, 2 if settings.dtype == "bfloat16" else _F32
    kept = config.layers * config.hidden_size + _LOGIT_COPIES * config.vocab_size
    head = config.vocab_size * config.hidden_size
    whole = block * config.layers + (1 if config.tied else 2) * head
    compared = 0 if stored == _F32 else head  # rotations are compared in float32
    return stored * whole + _F32 * (3 * block + tokens * kept + compared)


def expected_work(config: ModelConfig, chain: Chain, setup: Setup, samples: int, length: int) -> float:
    """Return the number of floating-point operations in float32."""
    tokens = samples * length
    total = _blocks_work(config, chain, tokens) if chain.is_blockwise else 0.0
    weights = sum(rows * columns for rows, columns in config.linear_shapes().values())
    if chain.tuning:
        tune = settings_of(TuneSettings, "tune", setup.settings)
        learned = tune.steps * tune.samples * length * (1 + _BACKWARD)
        measured = (1 + tune.checks) * tokens / tune.held_out
        total += config.layers * 2 * weights * (len(tune.descents) * (learned + measured) + tokens)
    if chain.learns(setup.settings):
        spin = settings_of(SpinQuantSettings, "spinquant", setup.settings)
        passes = 3 + _BACKWARD  # float, rounded, and rounded once more on the way back
        per_token = config.layers * weights + config.vocab_size * config.hidden_size
        rotating = config.layers * weights * config.hidden_size * (2 + _BACKWARD)
        total += spin.steps * 2 * (passes * spin.batch * length * per_token + rotating)
        compared = 2 * min(samples, CHECKED)  # before and after, float and rounded
        total += compared * 2 * (2 * length * per_token + rotating / (2 + _BACKWARD))
    return total


def _blocks_work(config: ModelConfig, chain: Chain, tokens: int) -> float:
    """Return the operations of measuring and rounding, block by block."""
    total = 0.0
    compares = _compares(chain)
    for name, (rows, columns) in config.linear_shapes().items():
        twice = not name.endswith(("o_proj", "down_proj"))  # to measure what follows, and to go on
        passes = (1 + twice) * (2 if compares else 1) if chain.rounding != "rtn" else 1 + compares
        total += 2 * passes * rows * columns * tokens
        if chain.rounding != "rtn":
            total += 4 * rows * columns * columns  # the loop once, a sweep three times
    for inputs in (config.hidden_size, config.heads * config.head_dim, config.hidden_size, config.intermediate_size):
        if chain.rounding != "rtn":
            total += (3 if compares else 1) * inputs * inputs * tokens + inputs**3
    return total * config.layers


def _compares(chain: Chain) -> bool:
    return chain.rounding == "qronos" or chain.tuning is not None
