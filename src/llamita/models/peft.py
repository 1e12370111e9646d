"""Low-rank adapters in PEFT's form, adapter_config.json and adapter_model.safetensors, without PEFT."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamita.formats.safetensors import TensorWriter
from llamita.models.packed_writer import write_json
from llamita.models.weights import stored_dtype

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class LowRankPairs:
    """Adapters of a whole model: y = W·x + scale·B·(A·x).

    Attributes:
        pairs: A (rank, inputs) and B (outputs, rank), floats as they are stored, by the module's full name.
        rank: of all of them.
        scale: of all of them.
    """

    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    scale: float


def write_adapter(adapter: LowRankPairs, base: str, layers: int, directory: Path) -> None:
    """Fill a directory that exists.

    Args:
        base: what PEFT is to call the model that they go with.
        layers: of that model. Where some have no adapters, the others are named one by one: PEFT would make
            new ones for them.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapter.pairs.items():
        for part, values in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # each at a multiple of its size
    writer = TensorWriter(
        directory / WEIGHTS, {n: (stored_dtype(tensors[n]), tensors[n].shape) for n in order}
    )
    try:
        for name in order:
            writer.write(name, tensors[name])
        writer.finish()
    finally:
        writer.abandon()
    kinds = {name.rpartition(".")[2] for name in adapter.pairs}
    write_json(directory / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(kinds if len(adapter.pairs) == layers * len(kinds) else adapter.pairs),
        "inference_mode": True, "init_lora_weights": True,
    })  # fmt: skip
