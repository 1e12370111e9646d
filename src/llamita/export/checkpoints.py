"""Write checkpoints in safetensors for other libraries: config.json of a Llama, tensors, companions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import RunError
from llamita.models.families import FAMILIES, own_values
from llamita.models.names import vector_names
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions, plan_shards, write_shards
from llamita.models.weights import Weight, row_blocks
from llamita.numerics.affine import f32_to_bf16, to_f32
from llamita.system.extras import load_optional
from llamita.system.files import write_json
from llamita.system.progress import Progress

Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # dtype, shape, and a function that returns the values


def write_checkpoint(
    packed: PackedModel, directory: Path, tensors: Mapping[str, Tensor], changes: dict[str, Any], progress: Progress
) -> int:
    """Write config.json, weights and companions; return the bytes of the weights.

    Args:
        tensors: by name.
        changes: other values of config.json; None leaves a key out.
    """
    shards = plan_shards({name: {name: (dtype, shape)} for name, (dtype, shape, _) in tensors.items()})
    files = write_shards(directory, shards, lambda name: [tensors[name][2]()], progress)
    family = packed.config.family
    architecture = {"model_type": family, "architectures": [f"{FAMILIES[family].classes}ForCausalLM"]}
    values = {**own_values(packed.hf_config, family), **architecture, **changes}
    left_out = {key for key, value in changes.items() if value is None}
    write_json(directory / "config.json", {key: value for key, value in values.items() if key not in left_out})
    copy_companions(packed.path, directory, find_companions(packed.path))
    return sum(record["size"] for record in files.values())


def float_tensor(weight: Weight, shape: tuple[int, ...], changes: list[float]) -> Tensor:
    """Return a matrix multiplied out and rounded to bf16.

    Args:
        changes: gets the largest relative change by rounding to bf16.
    """

    def values() -> np.ndarray:
        out, done = np.empty(shape, np.uint16), 0
        for part in row_blocks(weight):
            bits = f32_to_bf16(part)
            out[done : done + len(part)] = bits
            change = np.abs(to_f32(bits) - part)
            changes.append(float((change[part != 0] / np.abs(part[part != 0])).max(initial=0.0)))
            done += len(part)
        return out

    return "BF16", shape, values


def vector_tensors(packed: PackedModel, dtype: str) -> dict[str, Tensor]:
    """Return norms and biases in "BF16" or "F32"."""

    def values(name: str) -> Callable[[], np.ndarray]:
        return lambda: f32_to_bf16(packed.vector(name)) if dtype == "BF16" else packed.vector(name)

    return {name: (dtype, shape, values(name)) for name, shape in vector_names(packed.config).items()}


def prove_in_transformers(packed: PackedModel, directory: Path, in_bf16: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """Compare a checkpoint in transformers with the engine; return the proof for JSON, None without transformers.

    Args:
        in_bf16: modules whose weights are rounded to bf16 in the checkpoint.
    """
    try:
        prove = load_optional("llamita.export.in_transformers:prove", "{package}")
    except RunError:
        return None
    return prove(packed, directory, in_bf16).to_dict()
