"""Adapters as PEFT loads them, beside a model of the right shape that holds no weights."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from llamita.export.source import transformers_keys
from llamita.models.packed import PackedModel

Loaded = tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, float]]


def load(packed: PackedModel, directory: Path) -> Loaded:
    """A and B of every adapted module in float32, and what PEFT multiplies their product by."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**transformers_keys(packed)))
    llama = llama.to_empty(device="cpu")  # pages that are never touched take no memory
    with warnings.catch_warnings():  # of transformers, about what PEFT calls in it
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(llama, str(directory), low_cpu_mem_usage=True)
    pairs, scales = {}, {}
    base: Any = model.base_model.model
    modules: dict[str, Any] = dict(base.named_modules())
    for name, module in modules.items():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            parts = [part["default"].weight.detach() for part in (module.lora_A, module.lora_B)]
            a, b = (part.float().numpy() for part in parts)
            pairs[name], scales[name] = (a, b), module.scaling["default"]
    return pairs, scales
