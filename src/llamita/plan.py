"""What a model will take and give on this machine, before anything is downloaded: a config.json is enough.

Sizes are exact: the bytes that `quantize` writes. Memory and speed are estimates: decode is bound by
reading every weight once a token, prefill by int8 multiply-adds, at shares of the measured limits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from llamita import _native
from llamita.checkpoint import FLOAT_DTYPES, INDEX, SINGLE, Checkpoint, is_hub_name, linear_names, resolve
from llamita.config import ModelConfig
from llamita.errors import InputError
from llamita.files import has, read_json
from llamita.machine import machine_memory
from llamita.packed import METADATA, PackedModel, open_source
from llamita.quantize import Plan, float_bytes, make_plan
from llamita.scheme import PRESETS, QuantScheme
from llamita.threads import use_threads

CONTEXTS = (2048, 8192)  # tokens for which memory is given
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PROBE_BYTES = 2**29  # far larger than any cache; `llamita bench` reads more, and longer
_DECODE_SHARE, _PREFILL_SHARE = 0.8, 0.6  # of the hardware's limits: what a good engine reaches
_PROCESS_BYTES = 100e6  # Python, NumPy, tokenizer and the buffers of a step
_F16, _F32 = 2, 4  # bytes of a cached number: quantized models and float models


@dataclass(frozen=True)
class Machine:
    """Measured rates and the memory of this machine (bytes; what this process may use, and what is free)."""

    bandwidth: float  # bytes read per second
    int8_rate: float  # multiply-adds per second
    memory: int
    memory_free: int
    threads: int


@dataclass(frozen=True)
class Estimate:
    """One way to run a model. Sizes in bytes, speeds in tokens per second, None where nothing is known.

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


def describe(name: str) -> Described:
    """A model by config.json, directory, hub name (its config.json alone is downloaded) or "embedded".

    Raises:
        InputError, RunError: the config cannot be had, or is not a Llama's.
    """
    path = Path(name)
    if path.is_file():
        return _from_config(read_json(path.parent, path.name), name)
    if is_hub_name(name):
        file = import_module("llamita.hub").download_file(name, "config.json")
        return _from_config(read_json(file.parent, file.name), name)
    path = resolve(name)
    if not any(has(path, file) for file in (METADATA, SINGLE, INDEX)):
        return _from_config(read_json(path, "config.json"), "config.json")
    source = open_source(path)
    assert isinstance(source, Checkpoint | PackedModel)
    dtypes = {name: info.dtype for file in source.files.values() for name, info in file.tensors.items()}
    source.close()

    def float_dtype(name: str) -> str:  # of a packed model's rounded layers it is that of its norms
        return dtypes[name] if dtypes.get(name) in FLOAT_DTYPES else dtypes["model.norm.weight"]

    return Described(source.config, float_dtype, source.scheme)


def _from_config(values: dict[str, Any], where: str) -> Described:
    if values.get("quantization_config") is not None:
        raise InputError(f"{where}: quantization_config: expected a float model; try its source")
    stored = values.get("dtype", values.get("torch_dtype"))
    dtype = _DTYPES.get(stored, "BF16") if isinstance(stored, str) else "BF16"
    return Described(ModelConfig.from_hf(values), lambda _name: dtype, None)


def measure_machine() -> Machine:
    """This machine's limits, in about a second; InputError or RunError if its threads cannot be used."""
    threads = use_threads(None)
    memory, free = machine_memory()
    probe = min(_PROBE_BYTES, free // 4)  # the probe must not push a small machine into swapping
    return Machine(_native.read_bandwidth(probe) * 1e9, _native.int8_rate() * 1e9, memory, free, threads)


def estimate_all(
    model: Described, machine: Machine, schemes: list[QuantScheme] | None = None
) -> list[Estimate]:
    """The float model and these schemes (all presets by default); a packed model alone, as it is.

    Raises:
        InputError: a scheme's groups do not fit the model.
    """
    if model.scheme is not None:
        return [_estimate(model, model.scheme, machine)]
    return [_estimate(model, scheme, machine) for scheme in (None, *(schemes or PRESETS.values()))]


def _estimate(model: Described, scheme: QuantScheme | None, machine: Machine) -> Estimate:
    config = model.config
    if scheme is None:
        size = float_bytes(config, model.float_dtype)
        plan = Plan(size, size, size, [], 0, 0, {})
    else:
        plan = make_plan(config, scheme, model.float_dtype)
    cached = (
        2 * config.layers * config.kv_heads * config.head_dim * (_F16 if scheme else _F32)
    )  # keys and values
    contexts = [c for c in CONTEXTS if c <= config.context] or [config.context]
    memory = {c: int(plan.tensor_bytes + c * cached + _PROCESS_BYTES) for c in contexts}
    linear = sum(rows * columns for rows, columns in linear_names(config).values())
    read = _bytes_per_token(model, plan, scheme) + contexts[0] // 2 * cached  # the cache half full
    return Estimate(
        name=scheme.name if scheme else "float",
        tensor_bytes=plan.tensor_bytes,
        file_bytes=plan.file_bytes,
        cache_bytes_per_token=cached,
        memory=memory,
        decode=_DECODE_SHARE * machine.bandwidth / read,
        prefill=_PREFILL_SHARE * machine.int8_rate / linear if scheme else None,
        fits=memory[contexts[0]] <= machine.memory_free,
    )


def _bytes_per_token(model: Described, plan: Plan, scheme: QuantScheme | None) -> int:
    """Weights that one decoded token reads: all but an untied embedding, of which it reads a row."""
    if model.config.tied:
        return plan.tensor_bytes
    width = 1 if scheme and scheme.table_bits else 4 if model.float_dtype("lm_head.weight") == "F32" else 2
    return plan.tensor_bytes - model.config.vocab_size * model.config.hidden_size * width
