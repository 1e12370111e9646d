"""GPTQ's checkpoints, and those of compressed-tensors and torchao that these libraries wrote themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from foreign_models import as_gptq, export, write_arrays
from packed_models import float_weight, tensors_of
from tiny import make_checkpoint

from llamita.formats.safetensors import TensorFile
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import linear_names
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight
from llamita.numerics.affine import dequantize, f32_to_bf16, round_weights, to_f32
from llamita.numerics.packing import unpack_int4

# ---- GPTQ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "version"), [(32, "gptq"), (128, "gptq_v2"), (-1, "gptq")])
def test_gptq(tmp_path: Path, capsys: Any, group_size: int, version: str) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3")
    weights = as_gptq(model, tmp_path / "gptq", group_size, checkpoint_format=version)
    assert run("import", tmp_path / "gptq", "-o", tmp_path / "out") == 0
    assert "made for float activations" in capsys.readouterr().err
    packed = PackedModel(tmp_path / "out")
    assert packed.scheme is not None
    assert packed.scheme.scale_dtype == "float32"  # float16 has more digits than bf16
    for name, expected in weights.items():
        weight = packed.weight(name)
        assert isinstance(weight, Int4Weight)
        assert weight.group_size == {32: 32, 128: 128, -1: 256 if expected.shape[1] == 256 else 128}[group_size]
        np.testing.assert_array_equal(float_weight(weight), expected)
    np.testing.assert_array_equal(packed.weight("lm_head"), Checkpoint(model).weight("lm_head"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits: expected 4, got 8"),
        ({"desc_act": True, "no_order": True}, "g_idx: expected one, as desc_act is set, got none"),
        ({"few_zeros": True}, "qzeros: expected (4, "),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: expected gptq or gptq_v2, got 'marlin'"),
        ({"order": True}, "g_idx: expected a group below 4 for each of 128 inputs"),
        ({"bias": True}, "bias: expected none by config.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_kinds_of_gptq_are_refused(tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3")
    as_gptq(model, tmp_path / "gptq", 32, **changes)
    file = TensorFile(tmp_path / "gptq" / "model.safetensors")
    tensors = {name: file.read(name).copy() for name in file.tensors}
    name = "model.layers.1.mlp.up_proj"
    if "order" in changes:
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"] + 1
    if "no_order" in changes:
        tensors.pop(f"{name}.g_idx")
    if "few_zeros" in changes:
        tensors[f"{name}.qzeros"] = tensors[f"{name}.qzeros"][:1].copy()
    if "bias" in changes:
        tensors[f"{name}.bias"][3] = 0.5
    (tmp_path / "gptq" / "model.safetensors").unlink()
    write_arrays(tmp_path / "gptq" / "model.safetensors", tensors)
    assert run("import", tmp_path / "gptq", "-o", tmp_path / "out") == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


AWQ_SETTINGS = {"quant_method": "awq", "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "gptq in another order", "awq"])
def test_codes_with_zero_points_or_in_another_order_are_multiplied_out(
    tmp_path: Path, capsys: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against scale · (code - zero point), weight by weight, of words packed one code at a time."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_checkpoint(tmp_path / "model", "llama3")
    settings = AWQ_SETTINGS if kind == "awq" else {"checkpoint_format": kind.split()[0], "sym": False}
    as_gptq(model, tmp_path / "there", 32, **settings)
    file, random = TensorFile(tmp_path / "there" / "model.safetensors"), np.random.default_rng(0)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    expected, added = {}, {"gptq": 1, "gptq in another order": 1}.get(kind, 0)
    for name, (rows, columns) in linear_names(Checkpoint(model).config).items():
        groups = columns // 32
        codes, zeros = random.integers(0, 16, (columns, rows)), random.integers(0, 16, (groups, rows))
        if "order" in kind:
            zeros[:] = 7  # which is 8: only the order is unusual
        scales, group = random.uniform(0.01, 0.02, (groups, rows)).astype(np.float16), np.arange(columns) // 32
        group = random.permutation(group) if "order" in kind else group
        expected[name] = (scales[group].astype(np.float32) * (codes - (zeros[group] + added))).T.astype(np.float32)
        tensors[f"{name}.scales"], tensors[f"{name}.qzeros"] = scales, packed_words(zeros, kind == "awq")
        tensors[f"{name}.g_idx"] = group.astype(np.int32)
        if kind == "awq":
            tensors[f"{name}.qweight"] = packed_words(codes, True)
            tensors.pop(f"{name}.g_idx")
        else:
            tensors[f"{name}.qweight"] = packed_words(codes.T, False).T.copy()
    (tmp_path / "there" / "model.safetensors").unlink()
    write_arrays(tmp_path / "there" / "model.safetensors", tensors)
    assert run("import", tmp_path / "there", "-o", tmp_path / "out") == 0
    assert "weights are multiplied out: " in capsys.readouterr().err
    made = Checkpoint(tmp_path / "out")
    for name, weight in expected.items():
        np.testing.assert_array_equal(made.weight(name), weight, err_msg=name)
    np.testing.assert_array_equal(made.weight("lm_head"), Checkpoint(model).weight("lm_head"))
    assert run("quantize", tmp_path / "there", "-o", tmp_path / "packed") == 0


def packed_words(codes: np.ndarray, is_awq: bool) -> np.ndarray:
    """Codes (rows, columns) from 0 to 15 as words of eight columns, one code at a time."""
    order = [0, 2, 4, 6, 1, 3, 5, 7] if is_awq else range(8)
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for place, column in enumerate(order):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def test_awq_without_zero_points_keeps_its_codes(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3")
    as_gptq(model, tmp_path / "there", 32, **AWQ_SETTINGS)
    file = TensorFile(tmp_path / "there" / "model.safetensors")
    tensors = {name: file.read(name).copy() for name in file.tensors}
    codes = {}
    for name, (rows, columns) in linear_names(Checkpoint(model).config).items():
        codes[name] = np.random.default_rng(0).integers(0, 16, (columns, rows))
        tensors[f"{name}.qweight"] = packed_words(codes[name], True)
        tensors[f"{name}.qzeros"] = packed_words(np.full((columns // 32, rows), 8), True)
        tensors.pop(f"{name}.g_idx")
    (tmp_path / "there" / "model.safetensors").unlink()
    write_arrays(tmp_path / "there" / "model.safetensors", tensors)
    assert run("import", tmp_path / "there", "-o", tmp_path / "out") == 0
    weight = PackedModel(tmp_path / "out").weight("model.layers.1.mlp.up_proj")
    assert isinstance(weight, Int4Weight)
    expected = codes["model.layers.1.mlp.up_proj"].T.astype(np.int8) - np.int8(8)
    np.testing.assert_array_equal(unpack_int4(weight.packed), expected)


# ---- compressed-tensors and torchao, by these libraries themselves ---------------------------------


@pytest.mark.parametrize(("strategy", "dynamic"), [("group", False), ("channel", False), ("group", True)])
def test_what_compressed_tensors_itself_wrote(tmp_path: Path, strategy: str, dynamic: bool) -> None:
    """W4A16 and W4A8, packed by the library."""
    torch = pytest.importorskip("torch", reason="compressed-tensors packs with Torch")
    ct = pytest.importorskip("compressed_tensors", reason="the library that writes them")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    model = make_checkpoint(tmp_path / "model", "llama3")
    checkpoint, tensors, weights = Checkpoint(model), {}, {}
    for name in linear_names(checkpoint.config):
        values = to_f32(checkpoint.weight(name))
        size = 64 if strategy == "group" else values.shape[1]
        codes, scales, _ = round_weights(values, 4, size, "torchao_bf16")
        weights[name] = dequantize(codes, scales)
        tensors[f"{name}.weight_packed"] = pack_to_int32(torch.from_numpy(codes), 4).numpy()
        tensors[f"{name}.weight_scale"] = f32_to_bf16(scales)
        tensors[f"{name}.weight_shape"] = np.array(codes.shape, np.int64)
    for name in checkpoint.files["model.safetensors"].tensors:
        if f"{name.removesuffix('.weight')}" not in weights:
            tensors[name] = checkpoint.files["model.safetensors"].read(name).copy()
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": strategy}
    scheme = ct.quantization.QuantizationScheme(
        targets=["Linear"], weights={**arguments, **({"group_size": 64} if strategy == "group" else {})},
        input_activations={"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token",
                           "dynamic": True} if dynamic else None,
    )  # fmt: skip
    config = ct.quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    )
    (tmp_path / "ct").mkdir()
    write_arrays(tmp_path / "ct" / "model.safetensors", tensors)
    values = json.loads((model / "config.json").read_text())
    values["quantization_config"] = config.model_dump(mode="json")
    (tmp_path / "ct" / "config.json").write_text(json.dumps(values))
    assert run("import", tmp_path / "ct", "-o", tmp_path / "out") == 0
    packed = PackedModel(tmp_path / "out")
    for name, expected in weights.items():
        weight = packed.weight(name)
        assert isinstance(weight, Int4Weight)
        np.testing.assert_array_equal(float_weight(weight), expected)


def test_what_torchao_itself_wrote(tmp_path: Path) -> None:
    """Its scheme of 8da4w: the same codes and scales as our `--scales torchao` has of the same weights."""
    torch = pytest.importorskip("torch", reason="torchao needs it")
    transformers = pytest.importorskip("transformers", reason="saves torchao's tensors")
    torchao = pytest.importorskip("torchao", reason="the library that writes them")
    model = make_checkpoint(tmp_path / "model", "llama3", dtype="F32")
    ao = torchao.quantization
    groups = {"weight_dtype": torch.int4, "weight_granularity": ao.PerGroup(128)}
    how = ao.Int8DynamicActivationIntxWeightConfig(**groups)
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        model, quantization_config=transformers.TorchAoConfig(how), dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path / "there")
    assert run("import", tmp_path / "there", "-o", tmp_path / "taken") == 0
    assert run("quantize", model, "-o", tmp_path / "ours", "--preset", "arm") == 0
    taken, ours = tensors_of(tmp_path / "taken"), tensors_of(tmp_path / "ours")
    assert {name: values for name, values in taken.items() if "layers" in name} == {
        name: values for name, values in ours.items() if "layers" in name
    }


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "marlin-24", "format: expected pack-quantized"),
        (("config_groups", "group_0", "weights", "symmetric"), False, "weights: symmetric: expected True"),
        (("config_groups", "group_0", "weights", "actorder"), "group", "actorder: expected inputs in"),
        (("config_groups", "group_0", "input_activations", "dynamic"), False, "input_activations: dynamic"),
        (("config_groups",), [], "config_groups: expected groups by name"),
        (("kv_cache_scheme",), {"num_bits": 8}, "expected weights alone"),
        (("quant_method",), "hqq", "quant_method: expected compressed-tensors, gptq, awq, torchao, got 'hqq'"),
    ],
    ids=str,
)
def test_other_kinds_of_compressed_tensors_are_refused(
    tmp_path: Path, capsys: Any, path: tuple[str, ...], value: Any, message: str
) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source = export(tmp_path / "packed", "compressed-tensors", tmp_path / "there")
    config = json.loads((source / "config.json").read_text())
    at = config["quantization_config"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (source / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert message in one_line(capsys)
