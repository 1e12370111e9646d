"""Find the shapes of published models, which work without weights needs: config.json, by common names.

Sources: config.json of meta-llama/Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B.
"""

from typing import Any

from llamita.errors import InputError, shown

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_ROPE = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_COMMON,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": {**_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_COMMON,
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": {**_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_COMMON,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_scaling": {**_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
}


def find_shape(name: str) -> tuple[str, dict[str, Any]]:
    """Return a shape's full name and its config.json, by "llama-3.2-1b", "Llama-3.2-1B-Instruct", "3.2-1b" or "1b".

    Raises:
        InputError: no such shape.
    """
    short = name.lower().rpartition("/")[2].removesuffix("-instruct")
    found = [full for full in SHAPES if short == full or (short and full.endswith(f"-{short}"))]
    if not found:
        raise InputError("--shape", f"one of {', '.join(SHAPES)}", shown(name), "try 1b, 3b or 8b")
    return found[0], SHAPES[found[0]]
