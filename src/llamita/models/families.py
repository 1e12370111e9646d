"""List the model families: what each adds to a Llama, and how config.json of some becomes that of a plain Llama.

Granite, Phi-3 and the text model of Llama 3.2 Vision compute what a Llama with other weights computes. They are
rewritten as one while their files are read (`models/layout.py`), so no other code knows them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamita.errors import InputError, shown
from llamita.models.values import EPS_RANGE, count, number

QUERY_FACTOR = "llamita_query_factor"  # key of a rewritten config.json: q_proj was multiplied by this
_SCALED = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_SCALES_RANGE = (1e-6, 1e6)


@dataclass(frozen=True)
class Family:
    """What a family adds to a Llama.

    Attributes:
        classes: the beginning of its classes' names in transformers, as in "LlamaForCausalLM".
        biases: linear layers that have a bias, whatever config.json says; by name within a block.
        bias_flags: keys of config.json that give all linear layers of attention or MLP a bias.
        qk_norm: every query and key head passes an RMSNorm before it is rotated.
        window: the layers whose attention has the window `sliding_window`: "all"; "late", from `max_window_layers` on
            and only with `use_sliding_window`; "unrotated", those without rotary embedding and with the same flag.
        skips_rope: layers without rotary embedding are listed in `no_rope_layers`.
        defaults: values of keys that config.json may leave out, where they differ from Llama's.
        gguf: the architecture's name in a GGUF.
    """

    classes: str
    biases: tuple[str, ...] = ()
    bias_flags: Mapping[str, str] = field(default_factory=dict)
    qk_norm: bool = False
    window: str | None = None
    skips_rope: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf: str = "llama"


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FLAGS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
FAMILIES = {  # by model_type
    "llama": Family("Llama", bias_flags=_FLAGS),
    "mistral": Family("Mistral", window="all", defaults={"sliding_window": 4096}),
    "qwen2": Family("Qwen2", biases=_QKV, window="late", gguf="qwen2"),
    "qwen3": Family(
        "Qwen3", bias_flags={"self_attn": "attention_bias"}, qk_norm=True, window="late", gguf="qwen3",
        defaults={"head_dim": 128},
    ),
    "smollm3": Family(
        "SmolLM3", bias_flags=_FLAGS, window="unrotated", skips_rope=True, gguf="smollm3",
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6},
    ),
}  # fmt: skip
PACKED = "llamita"  # model_type of a packed model that only llamita runs; families but Llama append "-" and their name


def plain_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a family of FAMILIES, rewritten if the model is of one that a Llama can express.

    Raises:
        InputError: another architecture, or a value that no rewriting can express.
    """
    if not isinstance(values, dict):
        raise InputError("config.json", "an object", type(values).__name__)
    found = values.get("model_type")
    if family_name(found) is not None:
        return values
    if not isinstance(found, str) or found not in REWRITTEN:
        known = ", ".join((*FAMILIES, *REWRITTEN))
        raise InputError("config.json: model_type", f"one of {known}", shown(found))
    return REWRITTEN[found](values)


def own_values(values: dict[str, Any], family: str) -> dict[str, Any]:
    """Return config.json of a model of this family; null in place of a window that it does not have.

    A Mistral whose window no text reaches is a Llama here, for which a window would be an unknown key.
    """
    has_other = FAMILIES[family].window is None and values.get("sliding_window") is not None
    return {**values, "sliding_window": None} if has_other else values


def family_name(model_type: Any) -> str | None:
    """Return the key of FAMILIES for a model_type, a packed model's included; None for another architecture."""
    if not isinstance(model_type, str):
        return None
    name = model_type.removeprefix(f"{PACKED}-") if model_type != PACKED else "llama"
    return name if name in FAMILIES else None


def packed_type(family: str) -> str:
    """Return the model_type of a packed model that only llamita runs."""
    return PACKED if family == "llama" else f"{PACKED}-{family}"


def granite_scales(values: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return Granite's factors of embeddings, of what a layer adds, of attention's scores, and the logits' divisor.

    Raises:
        InputError: a factor is no number, or not more than zero.
    """
    embedding, residual, attention, logits = (number(values, key, *_SCALES_RANGE, 1.0) for key in _SCALED)
    return embedding, residual, attention, logits


def _plain_granite(values: dict[str, Any]) -> dict[str, Any]:
    """Return a Llama's config.json. Its residual stream is Granite's divided by `residual_multiplier`.

    So what a layer adds needs no factor. RMSNorm does not see the division, if epsilon is divided by its square.
    """
    _, residual, attention, _ = granite_scales(values)
    heads, eps = count(values, "num_attention_heads"), number(values, "rms_norm_eps", *EPS_RANGE, 1e-6)
    head_dim = count(values, "head_dim", count(values, "hidden_size") // heads)
    kept = {key: value for key, value in values.items() if key not in _SCALED}
    low, high = EPS_RANGE
    if not low <= eps / residual**2 <= high:
        expected = f"one whose square leaves rms_norm_eps {eps:g} below {high:g}"
        raise InputError("config.json: residual_multiplier", expected, f"{residual:g}")
    factor = attention * head_dim**0.5
    return _as_llama(kept, head_dim=head_dim, rms_norm_eps=eps / residual**2, **{QUERY_FACTOR: factor})


def _plain_phi3(values: dict[str, Any]) -> dict[str, Any]:
    """Return a Llama's config.json, or a Mistral's if attention has a window; only the matrices are fused in Phi-3."""
    values = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **values}
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # its older names
            values[key] = {**rope, "rope_type": "longrope", "type": "longrope"}
    values = {key: value for key, value in values.items() if key not in _FLAGS.values()}
    if values.get("sliding_window") is None:
        return _as_llama(values)
    return {**_as_llama(values), "model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def _plain_mllama(values: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of the text model without its cross-attention layers, which only images use."""
    text = values.get("text_config", values)
    if not isinstance(text, dict):
        raise InputError("config.json: text_config", "an object", type(text).__name__)
    layers, crossing = count(text, "num_hidden_layers"), crossing_layers(text)
    dropped = ("cross_attention_layers", *_FLAGS.values())
    kept = {"rope_theta": 5e5, "rms_norm_eps": 1e-5} | {k: v for k, v in text.items() if k not in dropped}
    return _as_llama(kept, num_hidden_layers=layers - len({i for i in crossing if 0 <= i < layers}))


def crossing_layers(text: dict[str, Any]) -> list[int]:
    """Return the layers of Llama 3.2 Vision that look at images; those of the 11B where config.json does not say."""
    found = text.get("cross_attention_layers")
    if found is None:
        return list(range(3, 40, 5))
    if not isinstance(found, list) or not all(type(i) is int for i in found):
        raise InputError("config.json: cross_attention_layers", "numbers of layers", shown(found))
    return found


def _as_llama(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    dropped = ("auto_map", "layer_types")
    kept = {key: value for key, value in values.items() if key not in dropped}
    return {**kept, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes}


REWRITTEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "granite": _plain_granite,
    "phi3": _plain_phi3,
    "mllama": _plain_mllama,
    "mllama_text_model": _plain_mllama,
}
