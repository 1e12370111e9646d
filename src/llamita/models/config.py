"""Read the architecture of a model from a Hugging Face `config.json` into a plain value.

Covers Llama 2, 3, 3.1, 3.2 and models with the same forward pass. A key that would change the forward pass in a way
that the engine does not know is refused, never ignored.
"""

from dataclasses import dataclass
from typing import Any

from llamita.errors import InputError, shown

ARCHITECTURES = ("llama", "mistral", "llamita")  # values of model_type
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")

_LARGEST_COUNT = 2**24  # far above any real vocabulary or width; keeps products of two within int64
_LARGEST_DEPTH = 1024  # the deepest Llama has 126 layers; tensors are listed by name before files are read
_LARGEST_WIDTH = 65536  # inputs of a linear layer: kMaxColumns of native/pack.h, for sums within int32
_LARGEST_HEAD = 1024  # kMaxHeadDim of native/bind_cache.cpp, room of the attention kernels
_LARGEST_CONTEXT = 2**27  # tokens after stretching; ten times the longest ever announced
_LARGEST_FACTOR = 1e6  # with the next limit, keeps the grown base of dynamic scaling within float32
_LARGEST_THETA = 1e12
_EPS_RANGE = (1e-20, 1.0)  # more than zero in float32 and below the mean square of any activation
_TURNS_RANGE = (1e-6, 1e6)  # low_freq_factor and high_freq_factor; context / factor stays within float32

# Keys that change the forward pass, with the one value at which it is a Llama's.
_MUST_BE = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "sliding_window": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "clip_qkv": None,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "num_local_experts": None,
    "num_experts": None,
    "use_qk_norm": False,
    "qk_norm": False,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
}


@dataclass(frozen=True)
class RopeConfig:
    """Describe the rotary embedding: its base frequency and its scaling for long contexts.

    `low_freq_factor` and `high_freq_factor` matter for "llama3" alone (Llama 3.1, section "rope scaling" of its
    reference code), `original_context` for "llama3" and "dynamic", `factor` for all but "default".
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Hold shapes and constants of a Llama. Sizes count elements; `context` counts tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    rope: RopeConfig
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read the keys of a Hugging Face `config.json`.

        Raises:
            InputError: the architecture is not supported, a key is missing, or a value is impossible or changes the
                forward pass in an unknown way.
        """
        if not isinstance(values, dict):
            raise InputError("config.json", "an object", type(values).__name__)
        if values.get("model_type") not in ARCHITECTURES:
            known, found = ", ".join(ARCHITECTURES), values.get("model_type")
            raise InputError("config.json: model_type", f"one of {known}", shown(found))
        for key, required in _MUST_BE.items():
            if values.get(key, required) not in (required, None):
                raise InputError(f"config.json: {key}", f"{required!r}", f"{shown(values[key])}: not a plain Llama")
        hidden, heads = (_count(values, "hidden_size", limit=_LARGEST_WIDTH), _count(values, "num_attention_heads"))
        kv_heads = _count(values, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError("config.json: num_key_value_heads", f"a divisor of {heads}", f"{kv_heads}")
        head_dim = _count(values, "head_dim", hidden // heads or None, limit=_LARGEST_HEAD)
        context = _count(values, "max_position_embeddings")
        rope = _rope(values, context)
        if rope.kind in ("linear", "dynamic"):  # their config gives the trained context, and a factor
            context = int(context * rope.factor)
        _check_shapes(heads, head_dim, context, rope)
        return cls(
            vocab_size=_count(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_count(values, "intermediate_size", limit=_LARGEST_WIDTH),
            layers=_count(values, "num_hidden_layers", limit=_LARGEST_DEPTH),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=context,
            norm_eps=_number(values, "rms_norm_eps", *_EPS_RANGE, default=1e-6),
            rope=rope,
            tied=_flag(values, "tie_word_embeddings"),
            attention_bias=_flag(values, "attention_bias"),
            mlp_bias=_flag(values, "mlp_bias"),
            bos_token_id=_token(values.get("bos_token_id")),
            eos_token_ids=_tokens(values.get("eos_token_id")),
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one block: name within the block to (outputs, inputs), in order of use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def has_bias(self, linear: str) -> bool:
        """Return whether the linear layer of this name (as in `linear_shapes`) has a bias."""
        return self.attention_bias if linear.startswith("self_attn") else self.mlp_bias


def _check_shapes(heads: int, head_dim: int, context: int, rope: RopeConfig) -> None:
    """Check the rules that concern several keys."""
    if head_dim % 2:
        raise InputError("config.json: head_dim", "an even number", f"{head_dim}")
    if head_dim == 2 and rope.kind == "dynamic":  # its exponent is head_dim / (head_dim - 2)
        raise InputError("config.json: head_dim", "at least 4 with dynamic rope_scaling", "2")
    if heads * head_dim > _LARGEST_WIDTH:  # the inputs of o_proj
        raise InputError(
            "config.json: num_attention_heads",
            f"at most {_LARGEST_WIDTH} values in all heads",
            f"{heads} of {head_dim}",
        )
    if context > _LARGEST_CONTEXT:
        raise InputError("config.json: rope_scaling", f"at most {_LARGEST_CONTEXT} tokens of context", f"{context}")


def _rope(values: dict[str, Any], context: int) -> RopeConfig:
    """Read either spelling: `rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError("config.json: rope_scaling", "an object", type(scaling).__name__)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError("config.json: rope_scaling", f"one of {', '.join(ROPE_TYPES)}", shown(kind))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: partial_rotary_factor", "1.0", hint="the engine rotates whole heads")
    theta = _number(values, "rope_theta", 1, _LARGEST_THETA, default=10000.0)
    theta = _number(scaling, "rope_theta", 1, _LARGEST_THETA, default=theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if "factor" not in scaling:
        raise InputError("config.json: rope_scaling", f"a factor with type {kind!r}", "none")
    factor = _number(scaling, "factor", 1, _LARGEST_FACTOR)  # below 1 it would shorten the context
    if kind != "llama3":
        return RopeConfig(theta=theta, kind=kind, factor=factor, original_context=context)
    low, high = (_number(scaling, f"{end}_freq_factor", *_TURNS_RANGE) for end in ("low", "high"))
    if low >= high:
        raise InputError("config.json: high_freq_factor", f"more than low_freq_factor {low}", f"{high}")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=_count(scaling, "original_max_position_embeddings"),
    )


def _count(values: dict[str, Any], key: str, default: int | None = None, limit: int = _LARGEST_COUNT) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise InputError(f"config.json: {key}", f"a positive integer up to {limit}", shown(value, 40))
    return value


def _number(values: dict[str, Any], key: str, smallest: float, largest: float, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not smallest <= value <= largest:
        raise InputError(f"config.json: {key}", f"a number from {smallest:g} to {largest:g}", shown(value, 40))
    return float(value)


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key}", "true or false", shown(value))
    return value


def _token(value: object) -> int | None:
    tokens = _tokens(value)
    return tokens[0] if tokens else None


def _tokens(value: object) -> tuple[int, ...]:
    """Return token ids from a list, as Llama 3 has, or from one number, as Llama 2 has."""
    tokens: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
        raise InputError("config.json: token ids", "whole numbers", shown(value))
    return tuple(tokens)
