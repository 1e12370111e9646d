"""Check merging: PEFT's arithmetic in float, the base's scheme in 4 bits, messages and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import PROMPT, make_adapter, replace_adapter_tensors
from command import assert_nothing_is_left, one_line, run
from distances import relative_error
from tiny import make_checkpoint

import llamita
from llamita.engine.llm import LLM
from llamita.formats.safetensors import TensorFile, TensorWriter
from llamita.imports.open import open_source, resolve
from llamita.loading import open_adapters
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.dequantized import DequantizedSource
from llamita.models.layer_kinds import with_layers
from llamita.models.names import expected_tensors
from llamita.models.packed import PackedModel
from llamita.models.peft import CONFIG, WEIGHTS
from llamita.models.weights import as_stored
from llamita.numerics.affine import bf16_to_f32, to_f32
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.train.merge import MergedSource, measure, merge_float, merge_packed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny float checkpoint."""
    return make_checkpoint(tmp_path / "model")


def merged_source(base: Path, adapter: Path) -> MergedSource:
    opened = open_source(base)
    assert isinstance(opened, Checkpoint | PackedModel)
    return MergedSource(opened, adapter)


def packed(model: Path, out: Path, preset: str = "llama3.2", method: str = "rtn", **settings: Any) -> Path:
    quantize(Checkpoint(model), str(model), out, make_scheme(preset), method, Setup(settings=settings))
    return out


@pytest.mark.parametrize(
    ("family", "dtype", "shards", "changed"),
    [("llama32", "F32", 1, {}), ("llama2", "BF16", 2, {"attention_bias": True}), ("llama3", "F16", 1, {})],
)
def test_a_float_model_is_pefts(tmp_path: Path, family: str, dtype: str, shards: int, changed: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = make_checkpoint(tmp_path / "model", family, dtype=dtype, shards=shards, **changed)
    adapter, out = make_adapter(tmp_path / "a", base, use_rslora=family == "llama3"), tmp_path / "out"
    merge_float(merged_source(base, adapter), str(base), out)
    loaded = transformers.LlamaForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(loaded, adapter).merge_and_unload().state_dict()
    before, ours = Checkpoint(base), Checkpoint(out)
    precision = {"F32": 1e-6, "BF16": 2.0**-7, "F16": 2.0**-10}[dtype]  # of PEFT's own sums, and a last bit
    for name in expected_tensors(ours.config):
        assert ours.info(name).dtype == before.info(name).dtype == dtype
        found = to_f32(ours.files[ours._where[name]].read(name))
        expected = theirs[name].float().numpy()
        np.testing.assert_allclose(found, expected, rtol=precision, atol=1e-6, err_msg=name)
        differing = np.count_nonzero(found != expected) / found.size
        assert dtype == "F32" or differing < 0.01, name  # all but the ones halfway
    moved = to_f32(ours.weight("model.layers.0.mlp.up_proj")) - to_f32(before.weight("model.layers.0.mlp.up_proj"))
    assert np.abs(moved).max() > 0.01


def test_a_merged_checkpoint_has_all_that_its_base_has(model: Path, tmp_path: Path) -> None:
    (model / "LICENSE").write_text("terms")
    (model / "README.md").write_text("card")
    adapter, out = make_adapter(tmp_path / "a", model, targets=["mlp.up_proj"]), tmp_path / "out"
    merge_float(merged_source(model, adapter), str(model), out)
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / "SOURCE_README.md").read_text() == "card"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    record = json.loads((out / "llamita_merge.json").read_text())
    assert record["source"]["name"] == str(model)
    assert set(record["source"]["files"]) == {"config.json", "model.safetensors"}
    assert set(record["adapter"]["files"]) == {CONFIG, WEIGHTS}
    before, after = Checkpoint(model), Checkpoint(out)
    untouched = "model.layers.0.mlp.gate_proj"
    np.testing.assert_array_equal(before.weight(untouched), after.weight(untouched))
    beside = llamita.load(model, adapters={"a": adapter}).logits(PROMPT, adapter="a")
    plain = llamita.load(model).logits(PROMPT)
    assert relative_error(llamita.load(out).logits(PROMPT), beside) < 0.02  # weights are bf16
    assert relative_error(plain, beside) > 0.2


@pytest.mark.parametrize(("preset", "online"), [("llama3.2", False), ("arm", False), ("llama3.2", True)])
def test_what_is_rounded_again_is_the_function_of_both(model: Path, tmp_path: Path, preset: str, online: bool) -> None:
    """Dequantized weights and adapter in one matrix compute what they compute apart, also under R4."""
    method, settings = ("spinquant", {"spinquant.rotations": "R4"}) if online else ("rtn", {})
    base = packed(model, tmp_path / "base", preset, method, **settings)
    adapter = make_adapter(tmp_path / "a", model)
    source = merged_source(base, adapter)
    apart = LLM(DequantizedSource(PackedModel(base)), adapters=open_adapters(PackedModel(base), {"a": adapter}))
    beside = apart.logits(PROMPT, adapter="a")
    assert relative_error(LLM(source).logits(PROMPT), beside) < 1e-5
    assert relative_error(apart.logits(PROMPT), beside) > 0.1


@pytest.mark.parametrize("online", [False, True])
def test_a_packed_model_stays_near_and_keeps_its_scheme(model: Path, tmp_path: Path, online: bool) -> None:
    method, settings = ("spinquant", {"spinquant.rotations": "R4"}) if online else ("rtn", {})
    base = packed(model, tmp_path / "base", "llama3.2", method, **settings)
    adapter, out = make_adapter(tmp_path / "a", model), tmp_path / "out"
    source = merged_source(base, adapter)
    merge_packed(source, str(base), out)
    assert run("verify", out) == 0
    before, after = PackedModel(base), PackedModel(out)
    assert (before.scheme, before.rotations) == (after.scheme, after.rotations)
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()
    merged = after.metadata.settings["merged"]
    assert merged["base_method"] == method
    assert merged["adapter"]["name"] == str(adapter)
    assert after.metadata.source.name == str(base)
    loss = measure(source, out, "abcdefgh" * 20)
    assert loss.kl.value < loss.alone.value / 5
    plain, beside, final = loss.losses
    assert abs(final - beside) < abs(plain - beside)


def test_layers_stored_in_other_ways_are_merged_in_these(model: Path, tmp_path: Path) -> None:
    scheme = make_scheme("llama3.2")
    layers = {"model.layers.0.mlp.up_proj": "float", "model.layers.1.mlp.up_proj": "w8"}
    quantize(Checkpoint(model), str(model), tmp_path / "base", with_layers(scheme, layers))
    adapter, out = make_adapter(tmp_path / "a", model), tmp_path / "out"
    source = merged_source(tmp_path / "base", adapter)
    merge_packed(source, "base", out)
    float_one, int8_one = (PackedModel(out).weight(name) for name in layers)
    expected = source.weight("model.layers.0.mlp.up_proj")
    assert isinstance(float_one, np.ndarray)
    np.testing.assert_allclose(bf16_to_f32(float_one), expected, rtol=2.0**-8)
    values = DequantizedSource(PackedModel(out)).weight("model.layers.1.mlp.up_proj")
    assert not isinstance(int8_one, np.ndarray)
    assert relative_error(values, source.weight("model.layers.1.mlp.up_proj")) < 0.01


def test_a_calibrated_method_keeps_what_rounding_to_nearest_loses(tmp_path: Path, capsys: Any) -> None:
    """An adapter that moves weights by less than half a step: rounding to nearest leaves them, GPTQ corrects that."""
    pytest.importorskip("torch")
    model = resolve("embedded")
    base = packed(model, tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, rank=1, lora_alpha=0.5)
    options = ("--calibration", model / "heldout.txt", "--samples", "32", "--length", "128", "--json")
    kept = {}
    for method in ("rtn", "gptq"):
        given = options[method == "rtn" and 2 :]
        assert run("merge", base, adapter, "-o", tmp_path / method, "--method", method, *given) == 0
        loss = json.loads(capsys.readouterr().out)["loss"]
        kept[method] = 1 - loss["kl"]["value"] / loss["alone"]["value"]
    assert kept["rtn"] < 0.2
    assert kept["gptq"] > 0.4
    assert PackedModel(tmp_path / "gptq").metadata.method == "gptq"


def test_the_command_tells_what_was_lost(model: Path, tmp_path: Path, capsys: Any) -> None:
    base, adapter = packed(model, tmp_path / "base"), make_adapter(tmp_path / "a", model)
    text = tmp_path / "text.txt"
    text.write_text("to measure on " * 10)
    out = tmp_path / "out"
    assert run("merge", base, adapter, "-o", out) == 0
    shown = capsys.readouterr()
    assert f"{out}: a 4-bit model" in shown.out
    assert "warning: the merged weights were rounded again: KL divergence " in shown.err
    assert "of its own text)" in shown.err
    assert "--method qronos" in shown.err
    assert run("merge", base, adapter, "-o", out) == 2
    assert f"{out} exists; try --overwrite" in one_line(capsys)
    assert run("merge", base, adapter, "-o", out, "--overwrite", "--text", text, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["method"] == "rtn"
    assert 0 < values["loss"]["kl"]["value"] < values["loss"]["alone"]["value"]
    assert run("merge", model, adapter, "-o", tmp_path / "float", "--text", text) == 0
    shown = capsys.readouterr()
    assert f"{tmp_path / 'float'}: a float checkpoint" in shown.out
    assert "warning" not in shown.err
    assert "merged" in shown.err
    assert run("merge", model, adapter, "-o", tmp_path / "float", "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None
    assert run("quantize", tmp_path / "float", "-o", tmp_path / "again") == 0


def test_mistakes_give_one_line(model: Path, tmp_path: Path, capsys: Any) -> None:
    base, adapter = packed(model, tmp_path / "base"), make_adapter(tmp_path / "a", model)
    other = make_adapter(tmp_path / "b", make_checkpoint(tmp_path / "wide", intermediate_size=512))
    changed = packed(model, tmp_path / "changed", method="equalize")
    (tmp_path / "short.txt").write_text("")
    (adapter / "llamita_training.json").write_text("{}")  # so that --overwrite would replace it
    out, before = tmp_path / "out", {path.name for path in tmp_path.iterdir()}
    for arguments, message in (
        ((model, adapter), "--out: expected the directory to make, got none"),
        ((model, tmp_path / "none", "-o", out), "expected a directory with adapter_config.json"),
        ((model, other, "-o", out), "mlp.gate_proj.lora_B.weight: expected floats (256, 4), got BF16 (512, 4)"),
        ((changed, adapter, "-o", out), "changed by equalize"),
        ((model, adapter, "-o", adapter, "--overwrite"), "holds the source"),
        ((model, adapter, "-o", out, "--method", "gptq"), "--method: expected a 4-bit BASE, got a float one"),
        ((base, adapter, "-o", out, "--method", "spinquant+gptq"), "--method: expected a method that rounds"),
        ((base, adapter, "-o", out, "--method", "magic"), "--method: expected one of rtn"),
        ((base, adapter, "-o", out, "--calibration", "x"), "--calibration: expected a method that looks at"),
        ((base, adapter, "-o", out, "--text", tmp_path / "no.txt"), "--text: expected a text file, got none"),
        ((base, adapter, "-o", out, "--text", tmp_path / "short.txt"), "--text: expected at least 2 tokens"),
        (("/nowhere", adapter, "-o", out), "/nowhere"),
    ):
        assert run("merge", *arguments) == 2, message
        assert message in one_line(capsys)
        assert_nothing_is_left(tmp_path, *before)


def test_weights_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", dtype="F16")
    adapter = make_adapter(tmp_path / "a", model, lora_alpha=10**6)
    file = TensorFile(adapter / WEIGHTS)
    large = {name: np.full(info.shape, 0x4300, np.uint16) for name, info in file.tensors.items()}  # 128
    replace_adapter_tensors(adapter, large)
    with pytest.raises(llamita.InputError, match="expected finite weights"):
        merge_float(merged_source(model, adapter), "m", tmp_path / "out")
    assert_nothing_is_left(tmp_path, "model", "a")


def test_every_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", dtype="F32")
    source = Checkpoint(model)
    values = {name: source.files["model.safetensors"].read(name) for name in expected_tensors(source.config)}
    dtypes = {name: "F32" if values[name].ndim == 1 else "BF16" for name in values}
    (model / "model.safetensors").unlink()
    writer = TensorWriter(model / "model.safetensors", {n: (dtypes[n], v.shape) for n, v in values.items()})
    for name, value in values.items():
        writer.write(name, as_stored(value, dtypes[name]))
    writer.finish()
    merge_float(merged_source(model, make_adapter(tmp_path / "a", model)), "m", tmp_path / "out")
    merged = Checkpoint(tmp_path / "out")
    assert {name: merged.info(name).dtype for name in dtypes} == dtypes
    np.testing.assert_array_equal(merged.vector("model.norm.weight"), values["model.norm.weight"])
