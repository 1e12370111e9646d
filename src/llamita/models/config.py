"""Read the architecture of a model from a Hugging Face `config.json` into a plain value.

Covers Llama 2, 3, 3.1, 3.2 and the families of `models/families.py`. A key that would change the forward pass in a way
that the engine does not know is refused, never ignored.
"""

from dataclasses import dataclass
from typing import Any

from llamita.errors import InputError, shown
from llamita.models.families import FAMILIES, QUERY_FACTOR, Family, family_name, plain_config
from llamita.models.rope import RopeConfig, read_rope
from llamita.models.values import EPS_RANGE, count, flag, number

_LARGEST_DEPTH = 1024  # the deepest Llama has 126 layers; tensors are listed by name before files are read
_LARGEST_WIDTH = 65536  # inputs of a linear layer: kMaxColumns of native/pack.h, for sums within int32
_LARGEST_HEAD = 1024  # kMaxHeadDim of native/bind_cache.cpp, room of the attention kernels
_LARGEST_CONTEXT = 2**27  # tokens after stretching; ten times the longest ever announced
_FACTOR_RANGE = (1e-6, 1e6)
_FIRST_LATE = 28  # default of max_window_layers
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip

# Keys that change the forward pass, with the one value at which it is a Llama's.
_MUST_BE = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
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
    "is_causal": True,
}


@dataclass(frozen=True)
class ModelConfig:
    """Hold shapes and constants of a model. Sizes count elements; `context` counts tokens.

    Attributes:
        family: a key of `families.FAMILIES`: the architecture that other tools know the model by.
        biases: the linear layers that have a bias, by their name within a block.
        qk_norm: see `Family`.
        window: positions that attention sees in the layers `windowed`, its own included; 0 for all.
        windowed, unrotated: numbers of layers whose attention has the window, or whose heads are not rotated.
        query_factor: q_proj holds the family's own weights times this; 1 but for rewritten families.
    """

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
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    family: str = "llama"
    biases: frozenset[str] = frozenset()
    qk_norm: bool = False
    window: int = 0
    windowed: frozenset[int] = frozenset()
    unrotated: frozenset[int] = frozenset()
    query_factor: float = 1.0

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read the keys of a Hugging Face `config.json`.

        Raises:
            InputError: the architecture is not supported, a key is missing, or a value is impossible or changes the
                forward pass in an unknown way.
        """
        values = plain_config(values)
        name = family_name(values["model_type"]) or "llama"
        family = FAMILIES[name]
        values = {**family.defaults, **values}
        _check_plain(values, family)
        hidden, heads = (count(values, "hidden_size", limit=_LARGEST_WIDTH), count(values, "num_attention_heads"))
        kv_heads = count(values, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError("config.json: num_key_value_heads", f"a divisor of {heads}", f"{kv_heads}")
        head_dim = count(values, "head_dim", hidden // heads or None, limit=_LARGEST_HEAD)
        rope, context = read_rope(values, count(values, "max_position_embeddings"), head_dim)
        _check_shapes(heads, head_dim, context, rope)
        layers = count(values, "num_hidden_layers", limit=_LARGEST_DEPTH)
        unrotated = _unrotated(values, layers) if family.skips_rope else frozenset[int]()
        window, windowed = _windowed(values, family, layers, unrotated)
        if window >= context:  # no text is longer
            window, windowed = 0, frozenset()
        return cls(
            vocab_size=count(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=count(values, "intermediate_size", limit=_LARGEST_WIDTH),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=context,
            norm_eps=number(values, "rms_norm_eps", *EPS_RANGE, default=1e-6),
            rope=rope,
            tied=flag(values, "tie_word_embeddings"),
            bos_token_id=_token(values.get("bos_token_id")),
            eos_token_ids=_tokens(values.get("eos_token_id")),
            family="llama" if name == "mistral" and not windowed else name,  # then they are the same
            biases=_biases(values, family),
            qk_norm=family.qk_norm,
            window=window,
            windowed=windowed,
            unrotated=unrotated,
            query_factor=number(values, QUERY_FACTOR, *_FACTOR_RANGE, default=1.0),
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one block: name within the block to (outputs, inputs), in order of use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        return dict(zip(LINEARS, [*shapes, (inner, hidden), (inner, hidden), (hidden, inner)], strict=True))

    def has_bias(self, linear: str) -> bool:
        """Return whether the linear layer of this name (as in `linear_shapes`) has a bias."""
        return linear in self.biases

    def window_of(self, layer: int) -> int:
        """Return how many positions attention sees in a layer, its own included; 0 for all."""
        return self.window if layer in self.windowed else 0


def _check_plain(values: dict[str, Any], family: Family) -> None:
    """Raise InputError at the first key with a value that the engine does not know."""
    for key, required in _MUST_BE.items():
        if values.get(key, required) not in (required, None):
            raise InputError(f"config.json: {key}", f"{required!r}", f"{shown(values[key])}: not a plain Llama")
    if family.window is None and values.get("sliding_window") is not None:
        raise InputError("config.json: sliding_window", "None", f"{shown(values['sliding_window'])}: not a plain Llama")


def _biases(values: dict[str, Any], family: Family) -> frozenset[str]:
    """Return the linear layers with a bias: the family's own, and those of the flags that it has."""
    rooms = {room for room, key in family.bias_flags.items() if flag(values, key)}
    return frozenset(family.biases) | {name for name in LINEARS if name.partition(".")[0] in rooms}


def _unrotated(values: dict[str, Any], layers: int) -> frozenset[int]:
    """Return the layers without rotary embedding: those with a 0 in the list, or every fourth."""
    listed = values.get("no_rope_layers")
    if listed is None:
        step = count(values, "no_rope_layer_interval", 4)
        return frozenset(range(step - 1, layers, step))
    if not isinstance(listed, list) or len(listed) < layers or not all(type(i) is int and i in (0, 1) for i in listed):
        raise InputError("config.json: no_rope_layers", f"0 or 1 for each of {layers} layers", shown(listed, 40))
    return frozenset(i for i in range(layers) if not listed[i])


def _windowed(
    values: dict[str, Any], family: Family, layers: int, unrotated: frozenset[int]
) -> tuple[int, frozenset[int]]:
    """Return attention's window, 0 for none, and the layers that have it."""
    kinds = _layer_types(values, layers)
    needs_flag = family.window in ("late", "unrotated")
    if values.get("sliding_window") is None or (needs_flag and not flag(values, "use_sliding_window")):
        if values.get("sliding_window") is not None and kinds is not None and any(kinds):
            raise InputError("config.json: use_sliding_window", "true with sliding layer_types", "false")
        return 0, frozenset()
    window, everywhere = count(values, "sliding_window", limit=_LARGEST_CONTEXT), frozenset(range(layers))
    chosen = everywhere
    if family.window == "late":
        first = number(values, "max_window_layers", 0, _LARGEST_DEPTH, default=_FIRST_LATE)
        chosen = frozenset(i for i in everywhere if i >= first)
    elif family.window == "unrotated":
        chosen = unrotated
    if kinds is None:
        return window, chosen
    if family.window == "all" and not all(kinds) and window < count(values, "max_position_embeddings"):
        raise InputError("config.json: layer_types", "sliding_attention alone", "full_attention, too")
    return window, frozenset(i for i, is_windowed in enumerate(kinds) if is_windowed)


def _layer_types(values: dict[str, Any], layers: int) -> list[bool] | None:
    """Return whether each layer has the window, None if config.json does not say."""
    kinds, known = values.get("layer_types"), {"full_attention": False, "sliding_attention": True}
    if kinds is None:
        return None
    is_list = isinstance(kinds, list) and len(kinds) == layers
    if not is_list or any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise InputError("config.json: layer_types", f"{' or '.join(known)} for each of {layers} layers", shown(kinds))
    return [known[kind] for kind in kinds]


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


def _token(value: object) -> int | None:
    tokens = _tokens(value)
    return tokens[0] if tokens else None


def _tokens(value: object) -> tuple[int, ...]:
    """Return token ids from a list, as Llama 3 has, or from one number, as Llama 2 has."""
    tokens: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
        raise InputError("config.json: token ids", "whole numbers", shown(value))
    return tuple(tokens)
