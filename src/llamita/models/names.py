"""List names and shapes of a Llama's modules and tensors, as Hugging Face writes them."""

from llamita.models.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # of query and key heads, in families with them
TRANSFORM = "lm_head.transform"  # the dense matrix between the final norm and a tied head under R1


def linear_names(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return every linear layer of the blocks: full module name to (rows, columns), in order of use."""
    shapes = config.linear_shapes()
    return {f"model.layers.{i}.{name}": shapes[name] for i in range(config.layers) for name in shapes}


def table_names(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the embedding and, if it is not tied, the head: module name to (rows, columns)."""
    names = [EMBEDDING] if config.tied else [EMBEDDING, HEAD]
    return {name: (config.vocab_size, config.hidden_size) for name in names}


def vector_names(config: ModelConfig) -> dict[str, tuple[int]]:
    """Return norm weights and biases: full tensor name to (length,)."""
    names: dict[str, tuple[int]] = {}
    for i in range(config.layers):
        block = f"model.layers.{i}"
        names[f"{block}.input_layernorm.weight"] = (config.hidden_size,)
        names[f"{block}.post_attention_layernorm.weight"] = (config.hidden_size,)
        if config.qk_norm:
            names |= {f"{block}.{norm}.weight": (config.head_dim,) for norm in HEAD_NORMS}
        for linear, (rows, _) in config.linear_shapes().items():
            if config.has_bias(linear):
                names[f"{block}.{linear}.bias"] = (rows,)
    names["model.norm.weight"] = (config.hidden_size,)
    return names


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the float architecture: full name to shape."""
    matrices = {**table_names(config), **linear_names(config)}
    return {f"{name}.weight": shape for name, shape in matrices.items()} | vector_names(config)


def name_in_block(module: str) -> str:
    """Return a linear layer's name without its block: "model.layers.3.mlp.up_proj" gives "mlp.up_proj"."""
    return module.split(".", 3)[-1]
