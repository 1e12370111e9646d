"""Export safetensors for transformers and vLLM, int4 codes and scales as they are (`--to compressed-tensors`).

Flavours: "transformers" is pack-quantized; tied int8 tables become two, because transformers cannot tie them.
"vllm-cpu" is int-quantized with asymmetric activations, which vLLM runs on Arm CPUs. "vllm-gpu" is pack-quantized with
symmetric activations: another arithmetic, to be measured again. Both for vLLM have float tables.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.export.checkpoints import Tensor, float_tensor, prove_in_transformers, vector_tensors, write_checkpoint
from llamita.export.job import ExportJob
from llamita.export.source import codes_of, module_names, refuse_rotation, shape_of
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight, Int8Weight, stored_dtype
from llamita.numerics.packing import CODES_PER_WORD
from llamita.system.progress import Progress

FLAVORS = ("transformers", "vllm-cpu", "vllm-gpu")
_TABLES = (EMBEDDING, HEAD)


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory.

    Raises:
        InputError: the model needs a rotation at run time, or there is no such flavour.
    """
    packed, flavor = job.packed, job.options.get("flavor") or FLAVORS[0]
    refuse_rotation(packed, "compressed-tensors")
    if flavor not in FLAVORS:
        raise InputError("--flavor", f"one of {', '.join(FLAVORS)}", shown(flavor))
    changes: list[float] = [0.0]
    tensors: dict[str, Tensor] = {}
    for name in module_names(packed):
        tensors |= _tensors(packed, name, flavor, changes)
    unties = flavor == FLAVORS[0] and packed.config.tied and isinstance(packed.weight(EMBEDDING), Int8Weight)
    if unties:
        tensors |= {key.replace(EMBEDDING, HEAD): value for key, value in tensors.items() if key.startswith(EMBEDDING)}
    tensors |= vector_tensors(packed, "F32")
    settings = {"quantization_config": _config(packed, flavor), "dtype": "float32"}
    if unties:
        settings["tie_word_embeddings"] = False
    size = write_checkpoint(packed, directory, tensors, settings, progress)
    rounded = [name for name in _TABLES if name in module_names(packed) and flavor != FLAVORS[0]]
    in_bf16 = tuple(name for name in rounded if isinstance(packed.weight(name), Int8Weight))
    grown = sum(np.prod(tensors[k][1]) for k in tensors if unties and k.startswith(HEAD) and k.endswith("weight"))
    return {
        "bytes": size, "flavor": flavor, "untied_bytes": int(grown), "rounded_to_bf16": max(changes),
        "other_arithmetic": flavor == "vllm-gpu", "unchecked": "transformers is not installed",
        "proof": prove_in_transformers(packed, directory, in_bf16),
    }  # fmt: skip


def _tensors(packed: PackedModel, name: str, flavor: str, changes: list[float]) -> dict[str, Tensor]:
    """Return a module's tensors by name."""
    weight = packed.weight(name)
    shape = shape_of(weight)
    if isinstance(weight, np.ndarray):
        return {f"{name}.weight": (stored_dtype(weight), shape, lambda: weight)}
    if name in _TABLES and flavor != FLAVORS[0] and isinstance(weight, Int8Weight):
        return {f"{name}.weight": float_tensor(weight, shape, changes)}
    scales = np.asarray(weight.scales).reshape(shape[0], -1)
    found: dict[str, Tensor] = {f"{name}.weight_scale": (stored_dtype(scales), scales.shape, lambda: scales)}
    if isinstance(weight, Int8Weight):
        return found | {f"{name}.weight": ("I8", shape, lambda: np.asarray(weight.codes))}
    assert isinstance(weight, Int4Weight)
    if flavor == "vllm-cpu":
        return found | {f"{name}.weight": ("I8", shape, lambda: codes_of(weight))}
    packed_shape = (shape[0], shape[1] // CODES_PER_WORD)
    return found | {
        f"{name}.weight_packed": ("I32", packed_shape, lambda: np.asarray(weight.packed)),
        f"{name}.weight_shape": ("I64", (2,), lambda: np.array(shape, np.int64)),
    }


def _config(packed: PackedModel, flavor: str) -> dict[str, Any]:
    """Return quantization_config as compressed-tensors reads it."""
    config = copy.deepcopy(packed.hf_config["quantization_config"])
    groups = config["config_groups"]
    tables = groups.pop("group_tables", None)
    if flavor == "vllm-cpu":
        config["format"] = "int-quantized"
        for group in groups.values():
            group["format"] = "int-quantized"
    if flavor == "vllm-gpu":
        for group in groups.values():
            group["input_activations"]["symmetric"] = True
    head = packed.weight(EMBEDDING if packed.config.tied else HEAD)
    if flavor == FLAVORS[0] and tables:
        config["format"] = "mixed-precision"
        plain = {**tables, "format": "int-quantized", "input_activations": None}
        activations = next(iter(groups.values()))["input_activations"]
        if isinstance(packed.weight(EMBEDDING), Int8Weight):
            groups["group_embedding"] = {**plain, "targets": ["re:.*embed_tokens"]}
        if isinstance(head, Int8Weight):
            groups["group_head"] = {**plain, "targets": ["re:.*lm_head"], "input_activations": activations}
    is_float = isinstance(head, np.ndarray) or (flavor != FLAVORS[0] and isinstance(head, Int8Weight))
    if is_float and HEAD not in config["ignore"]:
        config["ignore"] = [HEAD, *config["ignore"]]
    return config
