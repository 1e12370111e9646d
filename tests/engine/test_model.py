"""The float forward pass against transformers' own Llama, for small twins of every family it claims."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distances import relative_error
from tiny import make_checkpoint

import llamita
from llamita.engine.rope import rope_frequencies
from llamita.errors import InputError
from llamita.models.rope import RopeConfig

torch = pytest.importorskip("torch", reason="the oracle is transformers' Llama")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers' Llama")

TOKENS = 300  # past two blocks of 128 keys, and past one chunk of prefill
TOLERANCE = 1e-5  # largest difference over largest logit; 1.5e-6 is what float32 sums in another order make
SHORT = 128  # a trained context that TOKENS goes beyond
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama2", {}),
    "llama 3": ("llama3", {}),
    "llama 3.1": ("llama31", {}),
    "llama 3.2, tied": ("llama32", {}),
    "tinyllama, grouped heads": ("tinyllama", {}),
    "linear rope": ("llama2", {"max_position_embeddings": SHORT, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "dynamic rope": (
        "llama2",
        {"max_position_embeddings": SHORT, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "dynamic rope, short": ("llama2", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "attention bias": ("llama3", {"attention_bias": True}),
    "mlp bias": ("llama3", {"mlp_bias": True}),
    "both biases, tied": ("llama32", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama3", {"head_dim": 64}),
    "odd sizes": (
        "llama3",
        {"hidden_size": 104, "head_dim": 26, "intermediate_size": 184, "num_hidden_layers": 3, "vocab_size": 331},
    ),
    "many heads to one": ("llama3", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}),
    "large epsilon": ("llama3", {"rms_norm_eps": 0.1}),
}


def oracle(directory: Path, ids: np.ndarray) -> np.ndarray:
    """Return the logits of transformers in float32: (tokens, vocab)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def random_ids(vocab_size: int, count: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, count)


@pytest.mark.parametrize("name", TWINS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = TWINS[name]
    make_checkpoint(tmp_path, family, dtype="F32", **overrides)
    llm = llamita.load(tmp_path)
    ids = random_ids(llm.config.vocab_size)
    assert relative_error(llm.logits(ids), oracle(tmp_path, ids)) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_weights_are_taken_as_they_are(dtype: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama32", dtype=dtype, attention_bias=True, shards=3)
    llm = llamita.load(tmp_path)
    ids = random_ids(llm.config.vocab_size, 40)
    assert relative_error(llm.logits(ids), oracle(tmp_path, ids)) <= TOLERANCE


def test_the_embedded_model_is_that_of_transformers() -> None:
    llm = llamita.load("embedded")
    ids = np.array(llm.tokenizer.encode("Once upon a time there was a dog. " * 20))
    assert relative_error(llm.logits(ids), oracle(llm.path, ids)) <= TOLERANCE


def test_keys_and_values_in_fewer_bits_change_little(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", dtype="F32")
    ids = random_ids(320)
    bytewise, halves, whole = (llamita.load(tmp_path, kv_dtype=kv).logits(ids) for kv in ("int8", "f16", "f32"))
    assert 0 < relative_error(halves, whole) < 5e-3
    assert relative_error(halves, whole) < relative_error(bytewise, whole) < 5e-2


ROPES = {
    "default": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 3.0}, {"kind": "linear", "factor": 3.0}),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 3.0},
        {"kind": "dynamic", "factor": 3.0, "original_context": 128},
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"kind": "llama3", "factor": 32.0, "original_context": 8192},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"kind": "yarn", "factor": 4.0, "original_context": 64},
    ),
    "yarn, other ends": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0,
         "beta_slow": 2.0, "truncate": False},
        {"kind": "yarn", "factor": 4.0, "original_context": 64, "beta_fast": 24.0, "beta_slow": 2.0,
         "is_truncated": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("length", [100, 300])
def test_rotary_frequencies_are_those_of_transformers(kind: str, theta: float, head_dim: int, length: int) -> None:
    """To two units in the last place: Torch's vectorized power is itself off by one."""
    theirs, ours = ROPES[kind]
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=128, rope_parameters={**theirs, "rope_theta": theta}
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1, 1, head_dim), torch.arange(length)[None])
    expected = rotary.inv_freq.numpy()
    found = rope_frequencies(RopeConfig(theta=theta, **ours), head_dim, length)
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, expected, maxulp=2)


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tinyllama")  # 352 inputs of down_proj: no multiple of 128
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj.*128.*352"):
        llamita.load(tmp_path, scheme="arm")
