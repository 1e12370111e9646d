"""Tiny models of every family that llamita takes, with random weights, made by transformers' own classes."""

from pathlib import Path
from typing import Any

from tiny import write_tokenizer

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
# By the name that tests and docs show: transformers' model_type, and what differs from _COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral": ("mistral", {"sliding_window": 48, "head_dim": 32}),
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
