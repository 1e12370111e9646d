"""Build transformers' model in the shape of a packed one, on Torch's "meta" device, without weights."""

from typing import Any

import torch
from torch import nn

from llamita.methods.architecture import class_of, transformers_config
from llamita.models.packed import PackedModel


def empty_llama(packed: PackedModel, attention: str | None = None, **changes: Any) -> Any:
    """Return the model.

    Args:
        attention: a name in transformers' registry of attention.
        changes: other values of its configuration.
    """
    config = transformers_config(packed.config)
    config.update({"pad_token_id": packed.hf_config.get("pad_token_id"), **changes})
    if attention is not None:
        config._attn_implementation = attention
    with torch.device("meta"):
        return class_of(packed.config, "ForCausalLM")(config)


def put(llama: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or parameter in the place of the one of this name."""
    parent, _, own = name.rpartition(".")
    setattr(llama.get_submodule(parent), own, value)
