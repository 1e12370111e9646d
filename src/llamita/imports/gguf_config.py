"""Read config.json's values from the metadata of a GGUF, for every architecture that is a family of ours."""

from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.gguf_blocks import floats_of
from llamita.formats.gguf_parts import GgufModel
from llamita.imports.tokenizers import LLAMA3_ENDS
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import SCALED_ROPE, rope_factors

# Architectures, with transformers' names of the models, and of the keys that only they have.
_GRANITE = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling"}  # fmt: skip
_ARCHITECTURES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", _GRANITE),
    "phi3": ("Phi3ForCausalLM", {"attention.sliding_window": "sliding_window"}),
}
# Values that change the forward pass, with those that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "logit_scale": (1.0, 0.0), "embedding_scale": (1.0, 0.0), "residual_scale": (1.0, 0.0),
    "attention.scale": (0.0,), "attention.sliding_window": (0,), "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,), "rope.scale_linear": (1.0,), "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,), "rope.scaling.yarn_ext_factor": (1.0,),
    "expert_count": (0,), "use_parallel_residual": (False,),
}  # fmt: skip
_YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = "rope_freqs.weight"
ROPE_TENSORS = (LONG_FACTORS, SHORT_FACTORS, ROPE_FACTORS)


def read_config(path: Path) -> tuple[dict[str, Any], int]:
    """Return config.json for a file, of which only the header is read, and the bytes that its tensors take.

    Raises:
        InputError, RunError: see `GgufModel` and `hf_config`.
    """
    file = GgufModel(path)
    try:
        return hf_config(file), sum(tensor.stop - tensor.start for tensor in file.tensors.values())
    finally:
        file.close()


def hf_config(file: GgufModel) -> dict[str, Any]:
    """Return config.json of the model that the file's metadata describes, as transformers would have it.

    Raises:
        InputError: another architecture, or a value that is missing, of another type, or beyond its forward pass.
    """
    classes, own = _ARCHITECTURES[architecture_of(file)]
    heads, hidden = _integer(file, "attention.head_count"), _integer(file, "embedding_length")
    tokens = file.values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise InputError(f"{file.path.name}: tokenizer.ggml.tokens", "texts", "none")
    values: dict[str, Any] = {
        "architectures": [classes], "model_type": architecture_of(file), "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": _integer(file, "feed_forward_length"),
        "num_hidden_layers": _integer(file, "block_count"), "num_attention_heads": heads,
        "num_key_value_heads": _integer(file, "attention.head_count_kv", heads),
        "head_dim": _integer(file, "attention.key_length", hidden // heads if heads else 0),
        "max_position_embeddings": _integer(file, "context_length"), "vocab_size": len(tokens),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": _number(file, "rope.freq_base", 10000.0), "dtype": "float32",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": file.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(file, tokens),
    }  # fmt: skip
    for key, name in own.items():
        value = file.values.get(f"{architecture_of(file)}.{key}")
        if isinstance(value, int | float) and value:  # 0 means that there is none
            values[name] = value
    if architecture_of(file) == "granite":  # llama.cpp's default
        values.setdefault("attention_multiplier", values["head_dim"] ** -0.5)
    values |= _scaling(file)
    _check_plain(file, values["head_dim"])
    return values


def architecture_of(file: GgufModel) -> str:
    """Return the architecture's name; raise InputError for one that is not known."""
    found = file.values.get("general.architecture")
    if not isinstance(found, str) or found not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise InputError(f"{file.path.name}: general.architecture", f"one of {known}", shown(found, 40))
    return found


def _ends(file: GgufModel, tokens: list[str]) -> list[int]:
    """Return every token that ends an answer: those of the metadata, and Llama 3's by their names."""
    given = [file.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    named = [tokens.index(name) for name in LLAMA3_ENDS if name in tokens]
    return list(dict.fromkeys([*(number for number in given if type(number) is int), *named]))


def _check_plain(file: GgufModel, head_dim: int) -> None:
    """Raise InputError at the first value that asks for more than the architecture's forward pass."""
    name = architecture_of(file)
    read = {*_ARCHITECTURES[name][1], *(["rope.scaling.attn_factor"] if _kind(file) == "longrope" else [])}
    width = (head_dim,)
    for key, plain in {"rope.dimension_count": width, "attention.value_length": width, **_PLAIN}.items():
        value = file.values.get(f"{name}.{key}", plain[0])
        if key not in read and (isinstance(value, np.ndarray | list) or value not in plain):
            raise InputError(f"{file.path.name}: {name}.{key}", f"{plain[0]}", f"{shown(value, 40)}: not a plain Llama")


def _kind(file: GgufModel) -> Any:
    """Return the kind of scaling of the rotary embedding; None for none."""
    found = file.values.get(f"{architecture_of(file)}.rope.scaling.type")
    if found in (None, "none"):  # converters leave it out for Llama 3.1's and Phi-3's
        return "longrope" if LONG_FACTORS in file.tensors else None
    return found


def _scaling(file: GgufModel) -> dict[str, Any]:
    """Return the keys of config.json that say how rotary embeddings are stretched."""
    kind, original = _kind(file), "original_max_position_embeddings"
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": _number(file, "rope.scaling.factor", 1.0)}}
    if kind == "yarn":
        values = {ours: _number(file, key, 0.0) for key, ours in _YARN.items() if _has(file, key)}
        values |= {"rope_type": "yarn", "factor": _number(file, "rope.scaling.factor", 1.0)}
        return {"rope_scaling": {**values, original: _integer(file, "rope.scaling.original_context_length")}}
    if kind == "longrope":
        factors = {"long_factor": _factors(file, LONG_FACTORS), "short_factor": _factors(file, SHORT_FACTORS)}
        values = {"rope_type": "longrope", **{name: [float(str(f)) for f in found] for name, found in factors.items()}}
        if _has(file, "rope.scaling.attn_factor"):
            values["attention_factor"] = _number(file, "rope.scaling.attn_factor", 1.0)
        return {"rope_scaling": values, original: _integer(file, "rope.scaling.original_context_length")}
    if kind is not None:
        raise InputError(f"{file.path.name}: rope.scaling.type", "linear, yarn, longrope or none", shown(kind, 40))
    if ROPE_FACTORS not in file.tensors:
        return {}
    return {"rope_scaling": {**SCALED_ROPE, "factor": float(np.round(_factors(file, ROPE_FACTORS).max(), 3))}}


def _factors(file: GgufModel, name: str) -> np.ndarray:
    """Return the factors of each pair of the rotary embedding, float32 (head_dim / 2,)."""
    if name not in file.tensors or file.tensors[name].kind != "F32":
        raise InputError(f"{file.path.name}: {name}", "F32", "none" if name not in file.tensors else None)
    return floats_of("F32", file.read(name)).ravel()


def check_rope(file: GgufModel, config: ModelConfig) -> None:
    """Check that frequencies are divided as in Llama 3.1; the file has the factors, not the rule behind them."""
    if config.rope.kind == "llama3":
        found, expected = _factors(file, ROPE_FACTORS), rope_factors(config)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
            raise InputError(f"{file.path.name}: {ROPE_FACTORS}", "the factors of Llama 3.1 and 3.2")


def _has(file: GgufModel, key: str) -> bool:
    return f"{architecture_of(file)}.{key}" in file.values


def _integer(file: GgufModel, key: str, default: int | None = None) -> int:
    key = f"{architecture_of(file)}.{key}"
    value = file.values.get(key, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{file.path.name}: {key}", "a whole number", shown(value, 40))
    return value


def _number(file: GgufModel, key: str, default: float) -> float:
    key = f"{architecture_of(file)}.{key}"
    value = file.values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{file.path.name}: {key}", "a number", shown(value, 40))
    # the shortest decimal of the float32 is what config.json had
    return float(str(np.float32(value)))
