"""Translate to Meta's and llama.cpp's names of tensors and order of rows: the differences of their files from ours."""

import numpy as np

from llamita.models.config import ModelConfig
from llamita.models.families import FAMILIES

META = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


GGUF = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
GGUF_IN_PAIRS = ("llama", "smollm3", "granite")  # architectures whose q and k are in `pair_order` there

# Rotary scaling of Llama 3.1 and 3.2 without the factor: constants of the reference code.
SCALED_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip


def meta_name(name: str) -> str:
    """Return Meta's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{META[module]}.{kind}"
    _, _, block, own = module.split(".", 3)
    return f"layers.{block}.{META[own]}.{kind}"


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return "rope_freqs.weight" if name == "rope_freqs.weight" else f"{GGUF[module]}.{kind}"
    _, _, block, own = module.split(".", 3)
    return f"blk.{block}.{GGUF[own]}.{kind}"


def pair_order(rows: int, heads: int) -> np.ndarray:
    """Return the order of q's or k's rows there: Meta and llama.cpp rotate neighbours, transformers head halves."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()


def heads_of(name: str, config: ModelConfig) -> int | None:
    """Return the heads of a module whose rows are rotated, None for other modules."""
    own = name.rpartition(".")[2]
    return config.heads if own == "q_proj" else config.kv_heads if own == "k_proj" else None


def gguf_heads_of(name: str, config: ModelConfig) -> int | None:
    """Return the heads of a module whose rows are in another order in a GGUF of this model, None for the rest."""
    return heads_of(name, config) if FAMILIES[config.family].gguf in GGUF_IN_PAIRS else None


def hf_order(tensor: str, config: ModelConfig) -> np.ndarray | None:
    """Return the order in which Meta's rows become transformers', None if they stay."""
    heads = heads_of(tensor.rpartition(".")[0], config)
    return None if heads is None else np.argsort(pair_order(heads * config.head_dim, heads))


def rope_factors(config: ModelConfig) -> np.ndarray:
    """Return the number by which Llama 3.1 divides each frequency, float32 (head_dim / 2,).

    This is `apply_scaling` of Meta's reference code. Files hold these factors, computed in float64; the engine takes
    transformers' steps in float32 (`rope_frequencies`), whose last bits differ.
    """
    rope = config.rope
    frequencies = rope.theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    turns = rope.original_context * frequencies / (2 * np.pi)  # over the trained context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clip(0, 1)  # 1: left alone; 0: stretched by the whole factor
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)
