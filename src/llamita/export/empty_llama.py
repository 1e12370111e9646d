"""Build transformers' Llama in the shape of a packed model, on Torch's "meta" device, without weights."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llamita.models.packed import PackedModel

_STORAGE = ("quantization_config", "model_type", "architectures", "dtype", "torch_dtype")  # keys about the files


def empty_llama(packed: PackedModel, attention: str | None = None, **changes: Any) -> Any:
    """Return the model.

    Args:
        attention: a name in transformers' registry of attention.
        changes: other values of config.json.
    """
    keys = {key: value for key, value in packed.hf_config.items() if key not in _STORAGE}
    config = LlamaConfig(**keys | changes)
    if attention is not None:
        config._attn_implementation = attention
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def put(llama: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or parameter in the place of the one of this name."""
    parent, _, own = name.rpartition(".")
    setattr(llama.get_submodule(parent), own, value)
