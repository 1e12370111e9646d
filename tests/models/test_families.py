"""Config files of the families, as transformers' classes read them."""

from typing import Any

import pytest

from llamita.errors import InputError
from llamita.models.config import ModelConfig

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def config(model_type: str, **values: Any) -> ModelConfig:
    """Return what is read of a config.json."""
    return ModelConfig.from_hf({**BASE, "model_type": model_type, **values})


@pytest.mark.parametrize(
    ("model_type", "values", "window", "windowed"),
    [
        ("mistral", {"sliding_window": 64}, 64, range(8)),
        ("mistral", {"sliding_window": None}, 0, []),
        ("mistral", {"sliding_window": 512}, 0, []),  # no text is longer
        ("mistral", {"max_position_embeddings": 8192}, 4096, range(8)),  # the class's default
        ("qwen2", {"sliding_window": 64}, 0, []),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 6}, 64, [6, 7]),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 7 +
                   ["sliding_attention"]}, 64, [7]),
        ("smollm3", {"sliding_window": 64, "use_sliding_window": True}, 64, [3, 7]),
        ("phi3", {"sliding_window": 64}, 64, range(8)),
    ],
)  # fmt: skip
def test_windows(model_type: str, values: dict[str, Any], window: int, windowed: Any) -> None:
    found = config(model_type, **values)
    assert (found.window, sorted(found.windowed)) == (window, list(windowed))
    if not window and model_type == "mistral":
        assert found.family == "llama"


@pytest.mark.parametrize(
    ("model_type", "values", "biases"),
    [
        ("llama", {"attention_bias": True}, 4),
        ("llama", {"mlp_bias": True}, 3),
        ("mistral", {"attention_bias": True}, 0),  # the class has none, whatever the file says
        ("qwen2", {}, 3),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}, 3),
        ("qwen3", {"attention_bias": True, "mlp_bias": True}, 4),
        ("granite", {"attention_bias": True, "mlp_bias": True}, 7),
        ("phi3", {"attention_bias": True}, 0),
    ],
)
def test_biases(model_type: str, values: dict[str, Any], biases: int) -> None:
    assert len(config(model_type, **values).biases) == biases


def test_defaults_that_are_not_a_llamas() -> None:
    assert config("smollm3").tied
    assert config("smollm3").rope.theta == 2e6
    assert config("smollm3", num_hidden_layers=9, no_rope_layer_interval=3).unrotated == {2, 5, 8}
    assert config("qwen3").head_dim == 128
    assert config("phi3").norm_eps == 1e-5
    vision = ModelConfig.from_hf({"model_type": "mllama", "text_config": {**BASE, "num_hidden_layers": 40}})
    assert (vision.layers, vision.rope.theta, vision.norm_eps) == (32, 5e5, 1e-5)


def test_the_original_context_on_top_counts_first() -> None:
    """As in transformers: for every family, and 4,096 where Phi-3 does not say."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    assert config("llama", rope_scaling=yarn).rope.original_context == 128
    on_top = config("llama", rope_scaling=yarn, original_max_position_embeddings=64)
    assert on_top.rope.original_context == 64
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    phi = config("phi3", rope_scaling={"type": "su", **factors}, max_position_embeddings=8192)
    assert (phi.rope.kind, phi.rope.original_context) == ("longrope", 4096)
    assert config("phi3", rope_scaling={"type": "yarn", "factor": 2.0, **factors}).rope.kind == "longrope"


def test_nulls_are_missing_values() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"))
    assert config("llama", rope_scaling={**yarn, **nulls}).rope == config("llama", rope_scaling=yarn).rope
    assert config("llama", rope_scaling={**yarn, "beta_fast": 0}).rope == config("llama", rope_scaling=yarn).rope


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("qwen2", {"is_causal": False}, "is_causal"),
        ("mistral", {"sliding_window": 64, "layer_types": ["full_attention"] * 8}, "layer_types"),
        ("smollm3", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 8}, "use_sliding_window"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
         "rope_scaling: expected none beside other rope_parameters"),
        ("granite", {"residual_multiplier": 0.001, "rms_norm_eps": 1e-5}, "residual_multiplier"),
        ("mllama", {"cross_attention_layers": "3"}, "cross_attention_layers"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_what_would_be_computed_in_another_way_is_refused(
    model_type: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        config(model_type, **values)
