"""Random adapters in PEFT's format for tiny checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny import write_file

from llamita.engine.adapters import FUSED
from llamita.formats.safetensors import TensorFile
from llamita.models.checkpoint import Checkpoint
from llamita.models.peft import CONFIG, WEIGHTS
from llamita.numerics.affine import f32_to_bf16

LINEARS = [name for names in FUSED.values() for name in names]
PROMPT = list(range(2, 40))  # token ids on which adapters are compared


def make_adapter(
    directory: Path, model: Path, seed: int = 0, rank: int = 4, targets: list[str] = LINEARS, **settings: Any
) -> Path:
    """Write random adapters of BF16 for the checkpoint `model`.

    Args:
        targets: layers of each block, as FUSED names them.
        settings: other values of adapter_config.json.
    """
    config, random = Checkpoint(model).config, np.random.default_rng(seed)
    tensors = {}
    for layer in range(config.layers):
        for name in targets:
            rows, columns = config.linear_shapes()[name]
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            own = settings.get("rank_pattern", {}).get(name.split(".")[1], rank)
            for part, shape in (("A", (own, columns)), ("B", (rows, own))):
                values = random.normal(0, 0.1, shape).astype(np.float32)
                tensors[f"{prefix}.lora_{part}.weight"] = f32_to_bf16(values)
    directory.mkdir()
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "task_type": "CAUSAL_LM",
             "target_modules": sorted({name.split(".")[1] for name in targets})}  # fmt: skip
    (directory / CONFIG).write_text(json.dumps(plain | settings))
    write_file(directory / WEIGHTS, tensors, "BF16")
    return directory


def read_adapter_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter as they are stored."""
    file = TensorFile(directory / WEIGHTS)
    return {name: file.read(name) for name in file.tensors}


def replace_adapter_tensors(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write these tensors of BF16 in place of an adapter's own."""
    (directory / WEIGHTS).unlink()
    write_file(directory / WEIGHTS, tensors, "BF16")
