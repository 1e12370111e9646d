"""Meta's names of tensors, and its and llama.cpp's order of rows: in what its checkpoints and ours differ."""

import numpy as np

from llamita.config import ModelConfig

META = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def meta_name(name: str) -> str:
    """Meta's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{META[module]}.{kind}"
    _, _, block, own = module.split(".", 3)
    return f"layers.{block}.{META[own]}.{kind}"


def pair_order(rows: int, heads: int) -> np.ndarray:
    """Which row of q or k goes where: Meta and llama.cpp rotate neighbours, transformers halves of a head."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()


def heads_of(name: str, config: ModelConfig) -> int | None:
    """Heads of a module whose rows are rotated; None of others."""
    own = name.rpartition(".")[2]
    return config.heads if own == "q_proj" else config.kv_heads if own == "k_proj" else None


def hf_order(tensor: str, config: ModelConfig) -> np.ndarray | None:
    """Where rows of Meta's tensor are taken from for transformers' order; None where they stay."""
    heads = heads_of(tensor.rpartition(".")[0], config)
    return None if heads is None else np.argsort(pair_order(heads * config.head_dim, heads))
