"""Tiny models of every family that llamita takes, with random weights, made by transformers' own classes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tiny import write_tokenizer

from llamita.formats.gguf import write_gguf
from llamita.models.checkpoint import open_tensor_files
from llamita.models.foreign_names import GGUF_IN_PAIRS, gguf_name, pair_order

_COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": None, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
         "short_factor": [1 + i / 50 for i in range(16)], "long_factor": [1 + i / 5 for i in range(16)]}  # fmt: skip
_SCALED = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125,
           "logits_scaling": 8.0}  # fmt: skip
_GRANITE = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling"}  # fmt: skip
# By the name that tests and docs show: transformers' model_type, and what differs from _COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral": ("mistral", {"sliding_window": 48, "head_dim": 32}),
    "mistral, wide window": ("mistral", {"sliding_window": 1024, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "granite": ("granite", {**_SCALED, "tie_word_embeddings": True}),
    "granite, untied": ("granite", {**_SCALED, "attention_bias": True, "mlp_bias": True}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, window": ("phi3", {"sliding_window": 48}),
    "phi3, longrope": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 64}),
    "mllama": ("mllama", {"cross_attention_layers": [1], "num_hidden_layers": 4}),
}  # fmt: skip


def make_family(directory: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of this family; return the directory."""
    import torch
    import transformers

    model_type, own = FAMILIES[name]
    values = {**_COMMON, **own, **changes}
    torch.manual_seed(seed)
    if model_type == "mllama":
        model = _vision_model(values)
    else:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif key.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.float().save_pretrained(directory)
    write_tokenizer(directory, use_regex=True)
    return directory


def _vision_model(values: dict[str, Any]) -> Any:
    """Return a whole Llama 3.2 Vision, whose text model has two tables of different lengths."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
              "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "max_num_tiles": 1,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    config = transformers.MllamaConfig(vision_config=vision, text_config=values)
    return transformers.MllamaForConditionalGeneration(config)


def write_family_gguf(source: Path, out: Path) -> Path:
    """Write a checkpoint as llama.cpp's own converter does, in F32: the family's own architecture, keys and rows."""
    values = json.loads((source / "config.json").read_text("utf-8"))
    arch, rope = values["model_type"], values.get("rope_parameters") or {}
    heads, head_dim = (
        values["num_attention_heads"],
        values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
    )
    own: dict[str, Any] = {
        "block_count": values["num_hidden_layers"], "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"], "feed_forward_length": values["intermediate_size"],
        "attention.head_count": heads, "attention.head_count_kv": values["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"], "rope.freq_base": rope.get("rope_theta", 1e4),
        "rope.dimension_count": head_dim, "vocab_size": values["vocab_size"],
    }  # fmt: skip
    for key, name in _GRANITE.items():
        if arch == "granite":
            own[key] = float(values[name])
    if arch == "phi3":
        own["attention.sliding_window"] = values.get("sliding_window") or 0
    if arch == "qwen3":
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    files, where = open_tensor_files(source)
    tensors = {gguf_name(name): files[file].read(name) for name, file in where.items()}
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = values["max_position_embeddings"] / original
        own |= {"rope.scaling.original_context_length": original,
                "rope.scaling.attn_factor": math.sqrt(1 + math.log(factor) / math.log(original))}  # fmt: skip
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"], np.float32)
    for name, x in tensors.items():
        if arch in GGUF_IN_PAIRS and name.split(".")[-2] in ("attn_q", "attn_k"):
            tensors[name] = x[pair_order(len(x), len(x) // head_dim)]
    alphabet = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tokens = [*alphabet, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokens += [f"<unused{i}>" for i in range(len(tokens), values["vocab_size"] - 1)] + ["ab"]
    write_gguf(
        out,
        {
            "general.architecture": arch, **{f"{arch}.{key}": value for key, value in own.items()},
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array([1] * 256 + [3] * (len(tokens) - 257) + [1], np.int32),
            "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257,
        },
        {name: ("F32", x.shape) for name, x in tensors.items()}, iter(tensors.items()),
    )  # fmt: skip
    return out
