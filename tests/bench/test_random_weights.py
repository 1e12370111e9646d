"""Random weights of any shape: the layouts of real models, finite logits, no two matrices alike."""

from typing import Any

import numpy as np
import pytest
from tiny import CONFIGS

from llamita import _native
from llamita.bench.random_weights import RandomSource
from llamita.bench.shapes import SHAPES, find_shape
from llamita.engine.llm import LLM
from llamita.errors import InputError
from llamita.models.config import ModelConfig
from llamita.models.names import expected_tensors, linear_names, table_names
from llamita.models.weights import Int4Weight, Int8Weight, bias_of
from llamita.numerics.affine import bf16_to_f32
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import PRESETS, make_scheme

TINY = ModelConfig.from_hf(CONFIGS["llama32"])


@pytest.mark.parametrize("preset", [*PRESETS, None])
@pytest.mark.parametrize("family", ["llama32", "llama3"])
def test_a_random_model_runs(family: str, preset: str | None) -> None:
    scheme = make_scheme(preset) if preset else None
    llm = LLM(RandomSource(ModelConfig.from_hf(CONFIGS[family]), scheme, "random"))
    logits = llm.logits(np.arange(40))
    assert logits.shape == (40, 320)
    assert np.isfinite(logits).all()
    assert logits.std() > 1e-3
    assert llm.scheme == scheme


def test_biases_are_there_where_the_architecture_has_them() -> None:
    config = ModelConfig.from_hf({**CONFIGS["llama32"], "attention_bias": True})
    source = RandomSource(config, None, "random")
    bias = bias_of(source, "model.layers.0.self_attn.k_proj")
    assert bias is not None
    assert bias.tolist() == [0.0] * 64
    assert bias_of(source, "model.layers.0.mlp.up_proj") is None


def test_weights_have_the_deviation_that_llama_begins_with() -> None:
    source = RandomSource(TINY, PRESETS["llama3.2"], "random")
    linear, table = source.weight("model.layers.1.mlp.up_proj"), source.weight("model.embed_tokens")
    assert isinstance(linear, Int4Weight)
    assert isinstance(table, Int8Weight)
    rows, columns = linear_names(TINY)["model.layers.1.mlp.up_proj"]
    assert linear.packed.shape == (rows, columns // 8)
    assert linear.scales.shape == (rows, columns // 32)
    codes = unpack_int4(linear.packed)
    assert codes.min() == -8
    assert codes.max() == 7
    weights = codes * np.repeat(bf16_to_f32(linear.scales), 32, axis=1)
    assert weights.std() == pytest.approx(0.02, rel=0.05)
    assert table.codes.shape == table_names(TINY)["model.embed_tokens"]
    assert (table.codes * bf16_to_f32(table.scales)[:, None]).std() == pytest.approx(0.02, rel=0.05)


def test_scales_take_the_memory_of_real_ones() -> None:
    """Scales that all lay on the bf16 grid would be packed in half the bytes."""
    sizes = {}
    for preset in ("arm", "llama3.2"):
        scheme = make_scheme(preset, 128)
        weight = RandomSource(TINY, scheme, "random").weight("model.layers.0.mlp.down_proj")
        assert isinstance(weight, Int4Weight)
        sizes[preset] = _native.pack_w4([weight.packed], [weight.scales], 128).nbytes
    rows, columns = linear_names(TINY)["model.layers.0.mlp.down_proj"]
    assert sizes["arm"] - sizes["llama3.2"] == rows * columns // 128 * 2


@pytest.mark.parametrize("preset", ["llama3.2", None])
def test_matrices_differ_and_are_the_same_again(preset: str | None) -> None:
    def bits(source: RandomSource, layer: int) -> np.ndarray:
        weight = source.weight(f"model.layers.{layer}.self_attn.q_proj")
        return weight.packed if isinstance(weight, Int4Weight) else np.asarray(weight)

    scheme = make_scheme(preset) if preset else None
    first, second = (RandomSource(TINY, scheme, "random") for _ in range(2))
    assert np.array_equal(bits(first, 0), bits(second, 0))
    assert not np.array_equal(bits(first, 0), bits(first, 1))
    assert not np.shares_memory(bits(first, 0), bits(first, 1))  # one would keep the other in the cache


def test_groups_that_do_not_fit_are_refused() -> None:
    config = ModelConfig.from_hf({**CONFIGS["tinyllama"], "hidden_size": 160})
    with pytest.raises(InputError, match="try --group-size 32"):
        RandomSource(config, make_scheme("arm"), "random")


@pytest.mark.parametrize(("shape", "weights"), [("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248)])
def test_shapes_have_the_published_numbers_of_weights(shape: str, weights: int) -> None:
    _, config = find_shape(shape)
    tensors = expected_tensors(ModelConfig.from_hf(config))
    assert sum(int(np.prod(size)) for size in tensors.values()) == weights


@pytest.mark.parametrize(
    "name", ["1b", "1B", "3.2-1b", "llama-3.2-1b", "Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"]
)
def test_spellings_of_a_shape(name: str) -> None:
    assert find_shape(name) == ("llama-3.2-1b", SHAPES["llama-3.2-1b"])


@pytest.mark.parametrize("name", ["", "b", "70b", "llama", "-1b", "1b "])
def test_other_names_are_refused_with_the_list(name: Any) -> None:
    with pytest.raises(InputError, match=r"--shape: expected one of llama-3.2-1b.*try 1b, 3b or 8b"):
        find_shape(name)
