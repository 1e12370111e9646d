"""Export consolidated.00.pth and params.json, the format of Meta's own quantized Llama 3.2 (`--to meta`).

Codes are int8, scales float32. Rows of q and k are in the order of Meta's rotary embedding, which rotates neighbours
(`foreign_names.pair_order`). ExecuTorch's loader takes int8 tables and groups of 32 to 256.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.errors import InputError
from llamita.export.job import ExportJob
from llamita.export.source import NO_ROTATION, adapter_of, codes_of, module_names
from llamita.imports.meta_quantized import SCHEME, base_name
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import SCALED_ROPE, heads_of, meta_name, pair_order
from llamita.models.names import vector_names
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.models.peft import StoredAdapter
from llamita.models.weights import Int8Weight, Weight
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import factor
from llamita.system.files import write_bytes
from llamita.system.progress import Progress

FILE, PARAMS = "consolidated.00.pth", "params.json"


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory.

    Raises:
        InputError: biases, heads of another width, mixed groups, or a rotation that Meta's models do not use.
    """
    packed = job.packed
    _check(packed)
    adapter = adapter_of(packed, job.adapter)
    state: dict[str, Tensor] = {}
    names = module_names(packed)
    for done, name in enumerate(names):
        if progress:
            progress(name, done, len(names))
        state |= _tensors(packed, name, packed.weight(name), adapter)
    if packed.config.tied:
        state |= {key.replace("tok_embeddings", "output"): value for key, value in state.items()
                  if key.startswith("tok_embeddings")}  # fmt: skip
    for name in vector_names(packed.config):
        state[meta_name(name)] = torch.from_numpy(np.array(packed.vector(name)))
    torch.save(state, directory / FILE)
    write_bytes(directory / PARAMS, json.dumps(params_of(packed, adapter), indent=1).encode())
    copy_companions(packed.path, directory, find_companions(packed.path))
    return {"bytes": (directory / FILE).stat().st_size, "proof": None,
            "unchecked": "only Meta's and ExecuTorch's code for the releases reads this format"}  # fmt: skip


def params_of(packed: PackedModel, adapter: StoredAdapter | None) -> dict[str, Any]:
    """Return params.json: the shape as Meta's reference code computes it, and how weights are quantized."""
    config, scheme = packed.config, packed.scheme
    assert scheme is not None
    multiple = math.gcd(config.intermediate_size, 256)
    # Meta's code rounds times · 8/3 · width up to a multiple: aim at the middle of the last one
    times = (config.intermediate_size - multiple / 2) / int(8 * config.hidden_size / 3)
    quantization = {"scheme": SCHEME, "group_size": scheme.group_size}
    if packed.rotations.r4_size:
        quantization["spinquant"] = True
    found = {
        "dim": config.hidden_size, "n_layers": config.layers, "n_heads": config.heads,
        "n_kv_heads": config.kv_heads, "vocab_size": config.vocab_size, "ffn_dim_multiplier": times,
        "multiple_of": multiple, "norm_eps": config.norm_eps, "rope_theta": config.rope.theta,
        "use_scaled_rope": config.rope.kind == "llama3", "quantization_args": quantization,
    }  # fmt: skip
    if config.rope.kind == "llama3":
        found["rope_scale_factor"] = int(config.rope.factor)
    if adapter is not None:
        rank = len(next(iter(adapter.pairs.values()))[0])
        found["lora_args"] = {"rank": rank, "scale": adapter.scaling}
    return found


def _check(packed: PackedModel) -> None:
    """Raise InputError for what the format cannot hold."""
    config, scheme = packed.config, packed.scheme
    assert scheme is not None
    if config.family != "llama":
        raise InputError("--to meta", "a Llama", config.family)
    if config.biases or config.head_dim * config.heads != config.hidden_size:
        raise InputError("--to meta", "no biases and heads as wide as the model", "others")
    if config.rope.kind not in ("default", "llama3"):
        raise InputError("--to meta", "Llama's rotary embedding", f"{config.rope.kind}")
    rope = {"rope_type": config.rope.kind, "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_context}  # fmt: skip
    if config.rope.kind == "llama3" and (rope != SCALED_ROPE or config.rope.factor % 1):
        raise InputError("--to meta", "the scaled rotary embedding of Llama 3.1 and 3.2", f"{rope}")
    if scheme.layers:
        raise InputError("--to meta", "one group size for all layers", "several", "try --to gguf")
    if packed.rotations.r4_size and factor(packed.rotations.r4_size)[0] > 1:
        got = f"{packed.rotations.r4_size}, for which ExecuTorch has another matrix"
        raise InputError("--to meta", "R4 of a power of two", got, NO_ROTATION)
    if packed.rotations.head_transform is not None:
        raise InputError("--to meta", "a head that reads the norm's output", "a matrix between them", NO_ROTATION)


def _tensors(packed: PackedModel, name: str, weight: Weight, adapter: StoredAdapter | None) -> dict[str, Tensor]:
    """Return a module's tensors by Meta's names."""
    order = _order(packed.config, name)
    base = base_name(name)
    if isinstance(weight, np.ndarray):
        return {f"{base}weight": torch.from_numpy(np.array(to_f32(weight)))[order]}
    codes, scales = codes_of(weight), np.array(to_f32(np.asarray(weight.scales)))
    scales = scales.reshape(-1) if isinstance(weight, Int8Weight) else scales
    found = {f"{base}weight": torch.from_numpy(codes)[order], f"{base}scales": torch.from_numpy(scales)[order]}
    if adapter is not None and name in adapter.pairs:
        down, up = (torch.from_numpy(np.array(to_f32(one))).bfloat16() for one in adapter.pairs[name])
        found |= {f"{base}adaptor.A.weight": down, f"{base}adaptor.B.weight": up[order]}
    return found


def _order(config: ModelConfig, name: str) -> Any:
    heads = heads_of(name, config)
    return slice(None) if heads is None else torch.from_numpy(pair_order(heads * config.head_dim, heads))
