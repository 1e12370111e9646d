"""Give transformers' classes and configuration of a model's family, in float and without weights."""

from importlib import import_module
from typing import Any

import torch
from transformers import AutoConfig

from llamita.models.config import ModelConfig
from llamita.models.families import FAMILIES, QUERY_FACTOR

_KINDS = {False: "full_attention", True: "sliding_attention"}


def transformers_config(config: ModelConfig) -> Any:
    """Return the architecture as a configuration of transformers, with PyTorch's own attention."""
    trained = config.context
    if config.rope.kind in ("linear", "dynamic"):  # there it is the context before stretching
        trained = config.rope.original_context
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": trained, "rms_norm_eps": config.norm_eps, "rope_parameters": _rope(config),
        "attention_bias": config.has_bias("self_attn.o_proj"), "mlp_bias": config.has_bias("mlp.down_proj"),
        "tie_word_embeddings": config.tied, "sliding_window": config.window or None,
        "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
    }  # fmt: skip
    if FAMILIES[config.family].window not in (None, "all"):
        layers = range(config.layers)
        values["use_sliding_window"] = bool(config.windowed)
        values["layer_types"] = [_KINDS[layer in config.windowed] for layer in layers]
        values["no_rope_layers"] = [int(layer not in config.unrotated) for layer in layers]
    if config.query_factor != 1.0:
        values[QUERY_FACTOR] = config.query_factor
    found = AutoConfig.for_model(config.family, **values)
    found._attn_implementation = "sdpa"
    return found


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind not in ("default", "linear"):
        values["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.is_truncated,
                   "attention_factor": rope.attention_factor}  # fmt: skip
    if rope.kind == "longrope":
        values |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors),
                   "attention_factor": rope.attention_factor}  # fmt: skip
    return values


def class_of(config: ModelConfig, part: str) -> Any:
    """Return a class of the family's modelling code, by the end of its name: "DecoderLayer", "ForCausalLM"."""
    family = config.family
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, FAMILIES[family].classes + part)


def window_mask(window: int, length: int) -> torch.Tensor | None:
    """Return which keys each query sees under a window, bool (1, 1, length, length); None for all before it."""
    if not window or window >= length:
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance < window))[None, None]
