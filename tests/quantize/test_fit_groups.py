"""`--fit-groups`: layers whose inputs the group size does not divide take the next smaller size that does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from packed_models import assert_same_weight
from places import HELD_OUT
from tiny import make_checkpoint

import llamita
from llamita.errors import InputError
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import count_kinds, fit_groups, keep_float, with_layers
from llamita.models.names import linear_names
from llamita.models.packed import PackedModel, layout
from llamita.models.verify import verify
from llamita.models.weights import Int4Weight
from llamita.numerics.affine import round_weights
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.quantize.rounded import RoundedSource

# As SmolLM2 does, this model has 192 = 3 · 64 inputs in all layers but down_proj, which has 256
SHAPE: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}
FIT = ("--group-size", "128", "--fit-groups")
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "src", "llama2", **SHAPE)


def config_of(path: Path) -> ModelConfig:
    return Checkpoint(path).config


# ---- the rule ------------------------------------------------------------------------------------


def test_only_layers_that_do_not_fit_shrink(model: Path) -> None:
    scheme = fit_groups(config_of(model), make_scheme("llama3.2", 128))
    for name in linear_names(config_of(model)):
        assert scheme.kind(name).group_size == (128 if name in DOWN else 64)
    assert scheme.name == "custom"
    assert scheme.layers == dict.fromkeys(DOWN, "w4g128")  # the scheme's own size is that of most layers
    layout(config_of(model), scheme, lambda _: "BF16")


def test_a_scheme_that_fits_stays_as_it_is(model: Path) -> None:
    for scheme in (make_scheme("llama3.2"), with_layers(make_scheme("llama3.2", 64), {DOWN[0]: "w4g256"})):
        assert fit_groups(config_of(model), scheme) is scheme


def test_where_all_layers_shrink_alike_one_size_is_left(tmp_path: Path) -> None:
    config = config_of(make_checkpoint(tmp_path, **SHAPE, intermediate_size=320))
    assert fit_groups(config, make_scheme("llama3.2", 256)) == make_scheme("llama3.2", 64)


def test_other_kinds_stay(tmp_path: Path) -> None:
    config = config_of(make_checkpoint(tmp_path, "llama3", **SHAPE))
    kinds = {"model.layers.0.mlp.up_proj": "w8", "lm_head": "w4g256"}
    scheme = keep_float(config, with_layers(make_scheme("llama3.2", 128), kinds), ["*.q_proj"])
    fitted = fit_groups(config, scheme)
    assert count_kinds(config, fitted) == {"w4g64": 9, "float": 2, "w4g128": 2, "w8": 1}
    assert fitted.kind("lm_head").name == "w4g64"
    assert fitted.kind("model.embed_tokens").name == "w8"


def test_a_layer_that_no_size_fits_is_named(tmp_path: Path) -> None:
    config = config_of(make_checkpoint(tmp_path, intermediate_size=208))  # 13 · 16
    scheme = fit_groups(config, make_scheme("llama3.2", 64))
    with pytest.raises(
        InputError,
        match=rf"{DOWN[0]}: expected inputs in groups of 64, got 208; no group size fits this layer; try --keep-float",
    ):
        layout(config, scheme, lambda _: "BF16")


# ---- the command ---------------------------------------------------------------------------------


def test_the_packed_model_has_these_sizes_and_runs(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", model, "-o", out, *FIT) == 0
    assert verify(out).problems == []
    packed, source = PackedModel(out), Checkpoint(model)
    assert count_kinds(packed.config, packed.scheme) == {"w4g64": 12, "w4g128": 2}
    for name in linear_names(packed.config):
        weight = packed.weight(name)
        assert isinstance(weight, Int4Weight)
        codes, scales, _ = round_weights(source.weight(name), 4, 128 if name in DOWN else 64, "search")
        np.testing.assert_array_equal(unpack_int4(weight.packed), codes, err_msg=name)
        assert weight.scales.shape == scales.shape
    ids = np.arange(40) % 256
    loaded = llamita.load(model, scheme=fit_groups(source.config, make_scheme("llama3.2", 128)))
    np.testing.assert_array_equal(llamita.load(out).logits(ids), loaded.logits(ids))
    assert "w4g64 (12), w4g128 (2)" in (out / "README.md").read_text("utf-8")


@pytest.mark.parametrize("options", [("--preset", "arm"), ("--group-size", "128"), ("--group-size", "256")])
def test_without_the_option_it_is_offered(model: Path, tmp_path: Path, capsys: Any, options: tuple[str, ...]) -> None:
    for more in (("-o", tmp_path / "out"), ("--dry-run",)):
        assert run("quantize", model, *options, *more) == 2
        assert "q_proj: expected inputs in groups of" in (line := one_line(capsys))
        assert "got 192; try --group-size 64, or --fit-groups" in line


def test_a_dry_run_shows_kinds_and_size(model: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("quantize", model, "-o", tmp_path / "out", *FIT, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert run("quantize", model, "--dry-run", *FIT, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["scheme"] == made["scheme"]
    assert planned["file_bytes"] == made["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert run("quantize", model, "--dry-run", *FIT) == 0
    assert "w4g64 (12), w4g128 (2)" in capsys.readouterr().out


def test_layers_kept_in_float_stay_so(model: Path, tmp_path: Path) -> None:
    assert run("quantize", model, "-o", tmp_path / "out", *FIT, "--keep-float", "*.q_proj") == 0
    packed = PackedModel(tmp_path / "out")
    assert count_kinds(packed.config, packed.scheme) == {"w4g64": 10, "float": 2, "w4g128": 2}


def test_gptq_rounds_in_these_groups(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text = ("--calibration", HELD_OUT, "--samples", "4", "--length", "64")
    assert run("quantize", model, "-o", tmp_path / "out", *FIT, "--method", "gptq", *text) == 0
    packed = PackedModel(tmp_path / "out")
    nearest = RoundedSource(Checkpoint(model), packed.scheme)
    for name in linear_names(packed.config):
        found, usual = packed.weight(name), nearest.weight(name)
        assert isinstance(found, Int4Weight)
        assert isinstance(usual, Int4Weight)
        assert found.group_size == usual.group_size == (128 if name in DOWN else 64)
        assert (found.packed != usual.packed).any()


def test_choosing_for_a_goal_fits_by_itself(model: Path, tmp_path: Path, capsys: Any) -> None:
    goal = ("--preset", "arm", "--max-size", "1MB", "--calibration", HELD_OUT, "--samples", "2", "--length", "64")
    assert run("quantize", model, "-o", tmp_path / "out", *goal) == 0
    capsys.readouterr()
    assert run("quantize", model, "-o", tmp_path / "other", *goal, "--fit-groups") == 2
    assert "--fit-groups: expected neither --max-size nor --max-loss" in one_line(capsys)


def test_transformers_and_meta_get_it_or_a_refusal(model: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("compressed_tensors")
    assert run("quantize", model, "-o", tmp_path / "out", *FIT) == 0
    assert run("export", tmp_path / "out", "--to", "compressed-tensors", "-o", tmp_path / "ct") == 0
    assert run("import", tmp_path / "ct", "-o", tmp_path / "back") == 0
    packed, back = PackedModel(tmp_path / "out"), PackedModel(tmp_path / "back")
    for name in linear_names(packed.config):
        assert_same_weight(back.weight(name), packed.weight(name))
    capsys.readouterr()
    assert run("export", tmp_path / "out", "--to", "meta", "-o", tmp_path / "meta") == 2
    assert "--to meta: expected one group size for all layers, got several" in one_line(capsys)


def test_a_scheme_with_fitted_groups_goes_through_json(model: Path) -> None:
    scheme = fit_groups(config_of(model), make_scheme("arm"))
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
