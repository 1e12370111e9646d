"""Mixed schemes: overrides by name, patterns, the directory, the engine, and transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_models import assert_same_weight, float_weight, needs_transformers, pack, reseal
from tiny import make_checkpoint

from llamita.bench.random_weights import RandomSource
from llamita.engine.llm import LLM
from llamita.engine.weights import load_weights
from llamita.errors import InputError
from llamita.loading import load
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import count_kinds, describe_groups, describe_kinds, keep_float, with_layers
from llamita.models.names import linear_names, table_names
from llamita.models.packed import PackedModel, quantization_config
from llamita.models.sizes import make_plan
from llamita.models.weights import Int4Weight
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.quantize.pipeline import quantize
from llamita.quantize.rounded import RoundedSource

BLOCK = "model.layers.0"
MIX = {
    f"{BLOCK}.self_attn.k_proj": "w8",
    f"{BLOCK}.self_attn.v_proj": "float",
    f"{BLOCK}.mlp.gate_proj": "w8",
    f"{BLOCK}.mlp.up_proj": "w8",
    f"{BLOCK}.mlp.down_proj": "w4g128",
    "model.layers.1.self_attn.q_proj": "w4g64",
    "model.layers.1.self_attn.o_proj": "float",
    "model.layers.1.mlp.up_proj": "w4g64",
    "model.layers.1.mlp.down_proj": "w8",
}  # every way to store, alone and beside others that read the same input


def mixed(preset: str = "llama3.2", more: dict[str, str] | None = None) -> QuantScheme:
    return with_layers(make_scheme(preset, 32), MIX | (more or {}))


# ---- values --------------------------------------------------------------------------------------


def test_overrides_change_their_layers_alone() -> None:
    scheme = mixed()
    assert scheme.name == "custom"
    assert scheme.kind(f"{BLOCK}.mlp.down_proj").group_size == 128
    assert scheme.kind(f"{BLOCK}.self_attn.k_proj").bits == 8
    assert scheme.kind(f"{BLOCK}.self_attn.v_proj").bits is None
    assert scheme.kind(f"{BLOCK}.self_attn.q_proj").name == "w4g32"
    assert scheme.kind("model.embed_tokens").name == "w8"
    assert make_scheme("arm").kind("lm_head").name == "float"


def test_groups_in_words() -> None:
    assert describe_groups(make_scheme("arm", 64).to_dict()) == "64"
    assert describe_groups(mixed().to_dict()) == f"32 ({len(mixed().layers)} layers otherwise)"


def test_mixed_schemes_compare_hash_and_go_through_json() -> None:
    scheme = mixed()
    same = with_layers(make_scheme("llama3.2"), dict(reversed(MIX.items())))
    assert scheme == same
    assert hash(scheme) == hash(same)
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert scheme != make_scheme("llama3.2")
    assert "layers" not in make_scheme("llama3.2").to_dict()  # older readers know no such key


def test_an_override_that_changes_nothing_is_none() -> None:
    scheme = make_scheme("llama3.2")
    assert with_layers(scheme, {f"{BLOCK}.mlp.up_proj": "w4g32", "model.embed_tokens": "w8"}) == scheme
    undone = with_layers(mixed(), dict.fromkeys(MIX, "w4g32"))
    assert undone.layers == {}


@pytest.mark.parametrize("layers", [{"x": "w5"}, {"x": 4}, {"x": None}, ["x"], None])
def test_unknown_kinds_are_refused(layers: Any) -> None:
    with pytest.raises(InputError, match="layers"):
        QuantScheme.from_dict(make_scheme("llama3.2").to_dict() | {"layers": layers})


# ---- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.down_proj"], [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]),
        (["model.layers.1.*"], None),
        (["lm_head", "*.0.*.k_proj"], ["lm_head", f"{BLOCK}.self_attn.k_proj"]),
    ],
)
def test_patterns_keep_what_they_match(tmp_path: Path, patterns: list[str], expected: list[str] | None) -> None:
    config = Checkpoint(make_checkpoint(tmp_path / "src", "llama3")).config
    if expected is None:
        expected = [name for name in linear_names(config) if name.startswith("model.layers.1.")]
    scheme = keep_float(config, make_scheme("llama3.2"), patterns)
    assert scheme.layers == dict.fromkeys(sorted(expected), "float")
    assert set(make_plan(config, scheme, lambda _: "BF16").float_layers) == set(expected)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("*.downproj", r"\*\.down_proj"), ("model.layer.0.*", r"model\.layers\.0\.\*"), ("", "try"),
     ("lm_head", "tied to the embedding; try model.embed_tokens")],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_names_near_ones(tmp_path: Path, pattern: str, hint: str) -> None:
    config = Checkpoint(make_checkpoint(tmp_path / "src")).config
    with pytest.raises(InputError, match=hint):
        keep_float(config, make_scheme("llama3.2"), [pattern])


def test_something_must_be_left_to_round(tmp_path: Path) -> None:
    config = Checkpoint(make_checkpoint(tmp_path / "src")).config
    with pytest.raises(InputError, match="leave something"):
        make_plan(config, keep_float(config, make_scheme("llama3.2"), ["*"]), lambda _: "BF16")


# ---- the directory -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama32", "llama3"])
@pytest.mark.parametrize("preset", ["arm", "llama3.2", "llamita"])
def test_a_mixed_directory_holds_what_was_rounded(tmp_path: Path, preset: str, family: str) -> None:
    more = {"lm_head": "w4g64"} if family == "llama3" else {}
    scheme = mixed(preset, more)
    out = pack(tmp_path, scheme, family=family, attention_bias=True)
    packed = PackedModel(out)
    assert packed.scheme == scheme
    checkpoint = Checkpoint(tmp_path / "src")
    rounded = RoundedSource(checkpoint, scheme)
    for name in [*table_names(packed.config), *linear_names(packed.config)]:
        assert_same_weight(packed.weight(name), rounded.weight(name))
        error = ((float_weight(packed.weight(name)) - float_weight(checkpoint.weight(name))) ** 2).mean()
        kind = scheme.kind(name)
        most = {None: 0, 8: 1e-4, 4: 0.02}[kind.bits]
        assert error <= most * 0.08**2  # the weights' deviation
    assert count_kinds(packed.config, scheme) == {"w4g32": 5, "w8": 4, "w4g64": 2, "float": 2, "w4g128": 1}
    assert describe_kinds(packed.config, scheme).startswith("w4g32 (5), w8 (4)")


def test_only_overrides_need_the_newer_format(tmp_path: Path) -> None:
    assert PackedModel(pack(tmp_path / "1", make_scheme("llama3.2"))).metadata.format == 1
    out = pack(tmp_path / "2", mixed())
    assert PackedModel(out).metadata.format == 2
    reseal(out, format=1)
    with pytest.raises(InputError, match="format: expected 2"):
        PackedModel(out)


@pytest.mark.parametrize(
    ("layers", "message"),
    [({"model.layers.9.mlp.up_proj": "w8"}, "this model's layers"), ({"x": "float"}, "this model's layers"),
     ({f"{BLOCK}.mlp.up_proj": "w4g256"}, "groups of 256"), ({"model.embed_tokens": "w4g32"}, "w8 or float")],
)  # fmt: skip
def test_overrides_that_do_not_fit_are_refused(tmp_path: Path, layers: dict[str, str], message: str) -> None:
    source = Checkpoint(make_checkpoint(tmp_path / "src"))
    with pytest.raises(InputError, match=message):
        quantize(source, "src", tmp_path / "out", with_layers(make_scheme("llama3.2"), layers))
    out = tmp_path / "made"
    quantize(source, "src", out, mixed())
    scheme = json.loads((out / "llamita.json").read_text())["scheme"]
    reseal(out, scheme=scheme | {"layers": layers})
    with pytest.raises(InputError, match=message):
        PackedModel(out)


def test_an_odd_number_of_rows_keeps_every_tensor_aligned(tmp_path: Path) -> None:
    gates = {f"model.layers.{i}.mlp.{name}_proj": "w8" for i in (0, 1) for name in ("gate", "up", "down")}
    scheme = with_layers(make_scheme("llama3.2"), gates)
    out = pack(tmp_path, scheme, intermediate_size=255)
    for name, info in PackedModel(out).files["model.safetensors"].tensors.items():
        size = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "I8": 1}[info.dtype]
        assert info.start % size == 0, name
    assert np.isfinite(load(out).logits([1, 2, 3])).all()


# ---- the engine ----------------------------------------------------------------------------------


def test_neighbours_of_one_kind_are_one_layer(tmp_path: Path) -> None:
    weights = load_weights(PackedModel(pack(tmp_path, mixed())))
    first, second = weights.blocks
    assert [part.weights.kind for part in first.qkv.parts] == ["w4", "w8", "bf16"]
    assert first.qkv.takes_codes
    assert first.qkv.takes_floats
    assert [part.weights.kind for part in first.gate_up.parts] == ["w8"]
    assert not first.gate_up.is_gated
    assert [part.weights.group_size for part in second.qkv.parts] == [64, 32]
    assert len(second.gate_up.parts) == 2


def test_logits_do_not_depend_on_how_a_text_is_cut(tmp_path: Path) -> None:
    llm = load(pack(tmp_path, mixed(), attention_bias=True))
    ids = np.arange(40) % 256
    whole = llm.logits(ids)
    pieces = np.concatenate(list(llm.iter_logits(ids, chunk=1)))
    np.testing.assert_array_equal(pieces, whole)


def test_random_weights_have_mixed_schemes(tmp_path: Path) -> None:
    config = Checkpoint(make_checkpoint(tmp_path / "src")).config
    source = RandomSource(config, mixed(), "random")
    assert np.isfinite(LLM(source).logits([1, 2, 3])).all()


# ---- transformers --------------------------------------------------------------------------------


@needs_transformers
@pytest.mark.parametrize("family", ["llama32", "llama3"])
@pytest.mark.parametrize("preset", ["arm", "llama3.2"])
def test_transformers_opens_a_mixed_directory_and_computes_the_same(tmp_path: Path, preset: str, family: str) -> None:
    import torch
    from layerwise import guided, linear_modules, watch
    from transformers import AutoModelForCausalLM

    scheme = mixed(preset, {"model.embed_tokens": "float"})
    if family == "llama3":
        scheme = with_layers(scheme, {"lm_head": "w4g64"})
    out = pack(tmp_path, scheme, family=family, attention_bias=True)
    packed = PackedModel(out)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    opened: Any = AutoModelForCausalLM.from_pretrained(out)
    passed = watch(load(out, kv_dtype="f32"), ids)
    with guided(linear_modules(opened, packed), packed, passed):
        opened(ids)
    for name in [*linear_names(packed.config), *(["lm_head"] if family == "llama3" else [])]:
        held: Any = opened.get_submodule(name)
        np.testing.assert_array_equal(held.weight.detach().numpy(), float_weight(packed.weight(name)))


def test_layers_that_differ_have_groups_of_their_own(tmp_path: Path) -> None:
    config = Checkpoint(make_checkpoint(tmp_path / "src", "llama3")).config
    values = quantization_config(config, mixed("arm"))
    *others, rest = values["config_groups"].values()
    assert rest["targets"] == ["Linear"]
    by_size = {group["weights"].get("group_size"): group["targets"] for group in others}
    assert set(by_size) == {None, 64, 128}
    assert by_size[128] == [r"re:.*layers\.(0)\.mlp\.down_proj$"]
    assert r"re:.*layers\.(0|1)\.mlp\.up_proj$" not in by_size[64]
    assert values["ignore"][0] == "lm_head"
    assert r"re:.*layers\.(1)\.self_attn\.o_proj$" in values["ignore"]
    assert values["format"] == "mixed-precision"


# ---- methods that look at activations -------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_calibrated_methods_round_the_int4_layers(tmp_path: Path, method: str) -> None:
    pytest.importorskip("torch")
    source = Checkpoint(make_checkpoint(tmp_path / "src"))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64)).astype(np.int32)
    setup = Setup(Calibration("random", "0" * 64, tokens))
    nearest = RoundedSource(source, mixed())
    rounded = RoundedSource(source, mixed(), method, setup)
    changed = []
    for name in linear_names(source.config):
        found, usual = rounded.weight(name), nearest.weight(name)
        if isinstance(found, Int4Weight):
            assert isinstance(usual, Int4Weight)
            assert found.group_size == usual.group_size == mixed().kind(name).group_size
            changed.append(bool((found.packed != usual.packed).any()))
        else:
            assert_same_weight(found, usual)
    assert len(changed) == 8
    assert all(changed)
