"""Load an adapter by PEFT, with a model of the right shape that holds no weights."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from llamita.export.empty_llama import empty_llama
from llamita.models.packed import PackedModel

Loaded = tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, float]]


def load(packed: PackedModel, directory: Path) -> Loaded:
    """Return A and B of every adapted module in float32, and the factor that PEFT applies to B·A."""
    llama = empty_llama(packed).to_empty(device="cpu")  # pages that are never touched take no memory
    with warnings.catch_warnings():  # from transformers, about how PEFT calls it
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
