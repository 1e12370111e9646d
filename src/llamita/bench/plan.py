"""Estimate a model's size, memory and speed on this machine from its config.json, before any download.

Sizes are exact: the bytes that `quantize` writes. Memory and speed are estimates. Decode is bound by reading
every weight once a token, prefill by int8 multiply-adds, both at shares of the measured limits. Small models are
bound by the time that a layer takes whatever its size.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from llamita import _native
from llamita.bench.shapes import find_shape
from llamita.bench.tiles import vnni_rate
from llamita.bench.work import Work, count_work
from llamita.engine.kv_cache import KV_DTYPES
from llamita.engine.prompt_budget import MOST_TOKENS
from llamita.errors import InputError, shown
from llamita.imports.detect import BIN, detect_format, gguf_of
from llamita.imports.names import is_hub_name
from llamita.imports.open import open_source, resolve
from llamita.models.checkpoint import INDEX, SINGLE, Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.float8 import is_float8, read_float8
from llamita.models.metadata import METADATA
from llamita.models.names import expected_tensors, linear_names
from llamita.models.packed import PackedModel
from llamita.models.sizes import Plan, float_bytes, make_plan
from llamita.models.weights import FLOAT_DTYPES, transform_dtype
from llamita.numerics.scheme import PRESETS, QuantScheme
from llamita.system.files import exists_in, read_json
from llamita.system.machine import free_memory, last_level_cache, usable_memory
from llamita.system.threads import use_threads

CONTEXTS = (2048, 8192)  # tokens for which memory is estimated
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PROBE_BYTES = 2**29  # far larger than any cache; `llamita bench` reads more, and longer
# Chosen near what `llamita bench` measured on one machine; docs/results/benchmarks.md says how near.
_DECODE_SHARE, _PREFILL_SHARE = 0.8, 0.6  # of the hardware's limits
_CACHED = 1.5  # times the bandwidth of memory, if the CPU's caches hold all weights
_STEP_SECONDS = 10e-6  # per layer and step, whatever its size
_TOKEN_SECONDS = 2e-6  # per layer and token of a prompt, outside of linear layers
_PROCESS_BYTES = 32e6  # Python, NumPy and the code


@dataclass(frozen=True)
class Machine:
    """Measured rates, memory (bytes that this process may use, and that are free) and last-level caches."""

    bandwidth: float  # bytes read per second
    int8_rate: float  # multiply-adds per second
    memory: int
    memory_free: int
    threads: int
    cache: int


@dataclass(frozen=True)
class Estimate:
    """One way to run a model. Sizes in bytes, speeds in tokens per second, None if unknown.

    `memory` gives the bytes for each number of tokens in `CONTEXTS` that the model's context allows.
    """

    name: str
    tensor_bytes: int
    file_bytes: int
    cache_bytes_per_token: int
    memory: dict[int, int]
    decode: float
    prefill: float | None
    fits: bool


@dataclass(frozen=True)
class Described:
    """A model known by its config.json: its shape, the dtype of each tensor, its scheme if it is packed."""

    config: ModelConfig
    float_dtype: Callable[[str], str]
    scheme: QuantScheme | None
    transform: str | None = None  # the dtype of the head's transform
    source_bytes: int | None = None  # of a float model whose files have other dtypes, as in FP8


def describe(name: str) -> Described:
    """Describe a model by config.json, GGUF (its header), directory, hub name (one of these two) or "embedded".

    Raises:
        InputError, RunError: the config cannot be read, or is not a Llama's.
    """
    path = Path(name)
    if os.path.exists(name) and (file := gguf_of(path) or path).is_file():
        return _describe_file(file, name)
    if is_hub_name(name):
        with import_module("llamita.imports.hub").described(name) as file:
            return _describe_file(file, name)
    if detect_format(path) == BIN:  # its config.json says all
        return _from_config(read_json(path, "config.json"), name)
    path = resolve(name)
    if not any(exists_in(path, file) for file in (METADATA, SINGLE, INDEX)):
        return _from_config(read_json(path, "config.json"), "config.json")
    source = open_source(path)
    assert isinstance(source, Checkpoint | PackedModel)
    if isinstance(source, PackedModel):
        dtypes = {name: info.dtype for file in source.files.values() for name, info in file.tensors.items()}
        source_bytes = None
    else:  # whose files may have other names
        dtypes = {name: source.info(name).dtype for name in expected_tensors(source.config)}
        source_bytes = source.stored_bytes()
    source.close()

    def float_dtype(name: str) -> str:  # for a packed model's rounded layers, that of its norms
        return dtypes[name] if dtypes.get(name) in FLOAT_DTYPES else dtypes["model.norm.weight"]

    return Described(source.config, float_dtype, source.scheme, transform_dtype(source.rotations), source_bytes)


def _describe_file(file: Path, where: str) -> Described:
    """Describe the model of a config.json, or of a GGUF's header."""
    if gguf_of(file) is None:
        return _from_config(read_json(file.parent, file.name), where)
    values, in_files = import_module("llamita.imports.gguf_config").read_config(file)
    return replace(_from_config(values, where), source_bytes=in_files)


def describe_shape(name: str) -> tuple[str, Described]:
    """Return a published shape's full name and its float model; raise InputError if there is none."""
    full, config = find_shape(name)
    return full, _from_config(config, full)


def _from_config(values: dict[str, Any], where: str) -> Described:
    quantization, config = values.get("quantization_config"), ModelConfig.from_hf(values)
    if quantization is not None and not is_float8(quantization):
        raise InputError(f"{where}: quantization_config", "a float model", hint="try its source")
    stored = values.get("dtype", values.get("torch_dtype"))
    dtype = _DTYPES.get(stored, "BF16") if isinstance(stored, str) else "BF16"
    if quantization is None:
        return Described(config, lambda _name: dtype, None)
    float8 = read_float8(quantization)
    codes = {f"{name}.weight" for name in linear_names(config) if not float8.is_kept(name)}
    in_files = float_bytes(config, lambda name: "F8_E4M3" if name in codes else dtype)  # scales are about 0.1 %
    return Described(config, lambda name: "F32" if name in codes else dtype, None, source_bytes=in_files)


def measure_machine() -> Machine:
    """Measure this machine's limits in about a second; raise InputError or RunError without usable threads."""
    threads = use_threads(None)
    memory, free = usable_memory(), free_memory()
    probe = min(_PROBE_BYTES, free // 4)  # the probe must not push a small machine into swapping
    # Of AMX's rate, the share that a prompt reaches is not known: VNNI's rate promises less.
    bandwidth, int8_rate = _native.read_bandwidth(probe) * 1e9, vnni_rate() or _native.int8_rate() * 1e9
    return Machine(bandwidth, int8_rate, memory, free, threads, last_level_cache())


def fitting(model: Described, schemes: list[QuantScheme]) -> tuple[list[QuantScheme], list[str]]:
    """Return the schemes whose groups fit the model, and a line about each of the others."""
    fit, notes = list[QuantScheme](), list[str]()
    for scheme in schemes:
        try:
            make_plan(model.config, scheme, model.float_dtype)
            fit.append(scheme)
        except InputError as error:
            problem = f"{error.got} inputs are no multiple of {scheme.group_size}"
            notes.append(f"{scheme.name}: does not fit: {problem}; {error.hint}")
    return fit, notes


def estimate_all(
    model: Described, machine: Machine, schemes: list[QuantScheme] | None = None, kv_dtype: str | None = None
) -> list[Estimate]:
    """Estimate the float model and these schemes (by default all presets), or a packed model as it is.

    Args:
        kv_dtype: type of keys and values; by default that of `llamita.load`.

    Raises:
        InputError: a scheme's groups do not fit the model, or there is no such type.
    """
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise InputError("--kv-cache", f"one of {', '.join(KV_DTYPES)}", shown(kv_dtype))
    chosen = list(PRESETS.values()) if schemes is None else schemes
    wanted = [model.scheme] if model.scheme else [None, *chosen]
    return [_estimate(model, scheme, machine, kv_dtype) for scheme in wanted]


def _estimate(model: Described, scheme: QuantScheme | None, machine: Machine, kv_dtype: str | None) -> Estimate:
    config = model.config
    if scheme is None:
        in_memory = float_bytes(config, model.float_dtype)
        size = in_memory if model.source_bytes is None else model.source_bytes
        plan = Plan(size, size, size, [], 0, 0, {})
    else:
        plan = make_plan(config, scheme, model.float_dtype, transform=model.transform)
        in_memory = plan.tensor_bytes
    keys = kv_dtype or ("f16" if scheme else "f32")
    work = count_work(config, scheme, keys, model.float_dtype, model.transform)
    contexts = [c for c in CONTEXTS if c <= config.context] or [config.context]
    others = _PROCESS_BYTES + _buffer_bytes(config, scheme)
    memory = {c: int(in_memory + c * work.cache_bytes + others) for c in contexts}
    return Estimate(
        name=scheme.name if scheme else "float",
        tensor_bytes=plan.tensor_bytes,
        file_bytes=plan.file_bytes,
        cache_bytes_per_token=work.cache_bytes,
        memory=memory,
        decode=1 / _decode_seconds(work, config, machine, contexts[0] // 2),  # the cache half full
        prefill=1 / _prefill_seconds(work, config, machine) if scheme else None,
        fits=memory[contexts[0]] <= machine.memory_free,
    )


def _decode_seconds(work: Work, config: ModelConfig, machine: Machine, tokens: int) -> float:
    """Return the seconds of a token after `tokens` others."""
    read = work.weight_bytes + tokens * work.cache_bytes
    rate = _DECODE_SHARE * machine.bandwidth * (_CACHED if read <= machine.cache else 1)
    return read / rate + config.layers * _STEP_SECONDS


def _prefill_seconds(work: Work, config: ModelConfig, machine: Machine) -> float:
    """Return the seconds per token of a prompt of some hundreds."""
    return work.linear / (_PREFILL_SHARE * machine.int8_rate) + config.layers * _TOKEN_SECONDS


def _buffer_bytes(config: ModelConfig, scheme: QuantScheme | None) -> int:
    """Return the most bytes of the buffers between layers during prefill, and those of the logits."""
    floats, codes = buffer_widths(config, scheme)
    return MOST_TOKENS * (4 * floats + codes) + 2 * 4 * config.vocab_size


def buffer_widths(config: ModelConfig, scheme: QuantScheme | None) -> tuple[int, int]:
    """Return float32 values and int8 codes per token in the buffers of `engine.model` that a step touches.

    For a mixed scheme, all are counted that its layers could touch.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    floats = hidden + (queries + 2 * keys) + queries + inner  # the residual stream, q k v, heads, gate · up
    if scheme and not scheme.layers:  # norms give codes, gate and up come out as their product
        return floats, hidden + queries + inner
    most = floats + hidden + 2 * inner
    return most, hidden + queries + inner if scheme else 0
