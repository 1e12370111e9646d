"""config.json: what is read, and what is refused."""

import numpy as np
import pytest

from llamita import _native
from llamita.engine.rope import rope_frequencies
from llamita.errors import InputError
from llamita.models import config
from llamita.models.config import ModelConfig
from llamita.models.rope import RopeConfig

LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_32_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}


def test_llama_32() -> None:
    config = ModelConfig.from_hf(LLAMA_32_1B)
    assert config.rope == RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (16, 32, 8, 64)
    assert config.context == 131072
    assert config.tied
    assert config.eos_token_ids == (128001, 128008, 128009)


def test_linear_shapes_add_up_to_the_published_size() -> None:
    config = ModelConfig.from_hf(LLAMA_32_1B)
    linear = config.layers * sum(o * i for o, i in config.linear_shapes().values())
    norms = (2 * config.layers + 1) * config.hidden_size
    assert linear + norms + config.vocab_size * config.hidden_size == 1_235_814_400  # Meta's model card: 1.23B


def test_both_spellings_of_rope_agree() -> None:
    new = {k: v for k, v in LLAMA_32_1B.items() if not k.startswith("rope")}
    new["rope_parameters"] = LLAMA_32_1B["rope_scaling"] | {"rope_theta": 500000.0}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(LLAMA_32_1B)


def test_llama_2_defaults() -> None:
    values = {k: LLAMA_32_1B[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 16, "max_position_embeddings": 4096, "eos_token_id": 2}
    config = ModelConfig.from_hf(values)
    assert (config.kv_heads, config.head_dim, config.rope.theta) == (16, 128, 10000.0)
    assert config.eos_token_ids == (2,)
    assert not config.tied


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_stretched_context(kind: str) -> None:
    values = LLAMA_32_1B | {"max_position_embeddings": 2048, "rope_scaling": {"type": kind, "factor": 4.0}}
    config = ModelConfig.from_hf(values)
    assert (config.context, config.rope.original_context, config.rope.kind) == (8192, 2048, kind)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"sliding_window": -1, "model_type": "mistral"}, "sliding_window"),
        ({"sliding_window": 64, "model_type": "mistral", "layer_types": ["odd"] * 16}, "layer_types"),
        ({"no_rope_layers": [1], "model_type": "smollm3"}, "no_rope_layers"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"residual_multiplier": 0, "model_type": "granite"}, "residual_multiplier"),
        ({"logits_scaling": "8", "model_type": "granite"}, "logits_scaling"),
        ({"model_type": "mllama", "text_config": 5}, "text_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 65}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "token ids"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"intermediate_size": 65792}, "intermediate_size"),
        ({"hidden_size": 65552}, "hidden_size"),
        ({"head_dim": 2048}, "head_dim"),
        ({"num_attention_heads": 2048}, "num_attention_heads"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "head_dim"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps"),
        ({"rope_theta": 1e308, "rope_scaling": None}, "rope_theta"),
        ({"rope_theta": float("nan"), "rope_scaling": None}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 1e305}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-4}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e15}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e6}}, "tokens of context"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 1e-300}}, "low_freq_factor"),
    ],
)
def test_refuses(change: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word) as error:
        ModelConfig.from_hf(LLAMA_32_1B | change)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 250


def test_limits_are_those_of_the_kernels() -> None:
    """What the configuration lets through, the native code takes; one more it does not."""
    widest, largest = config._LARGEST_WIDTH, config._LARGEST_HEAD
    _native.Activations(1, widest)
    with pytest.raises(ValueError, match=str(widest)):
        _native.Activations(1, widest + 1)
    frequencies = rope_frequencies(RopeConfig(), largest, 1)
    _native.KVCache(1, 1, largest, 1, "f32", frequencies, 1.0)
    with pytest.raises(ValueError, match=str(largest)):
        _native.KVCache(1, 1, largest + 2, 1, "f32", rope_frequencies(RopeConfig(), largest + 2, 1), 1.0)


def test_frequencies_are_finite_at_every_limit() -> None:
    for head_dim in (4, 64, config._LARGEST_HEAD):
        extreme = {"head_dim": head_dim, "num_attention_heads": 8, "max_position_embeddings": 134}
        extreme |= {"rope_theta": 1e12, "rope_scaling": {"type": "dynamic", "factor": 1e6}}
        model = ModelConfig.from_hf(LLAMA_32_1B | extreme)
        with np.errstate(all="raise"):
            assert np.isfinite(rope_frequencies(model.rope, head_dim, model.context)).all()
