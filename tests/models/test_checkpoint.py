"""Float checkpoints: every family, and whatever can be wrong with one; names."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIGS, make_checkpoint, random_tensors, replace_tensors, write_file

from llamita.errors import InputError
from llamita.formats.safetensors import TensorFile
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.names import linear_names, table_names, vector_names
from llamita.models.weights import bias_of, check_finite
from llamita.numerics.affine import f32_to_bf16


def bf16_tensors(family: str = "llama32", **overrides: Any) -> dict[str, np.ndarray]:
    config = ModelConfig.from_hf({**CONFIGS[family], **overrides})
    return {name: f32_to_bf16(x) for name, x in random_tensors(config).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_comes_as_it_was_written(tmp_path: Path, family: str, dtype: str, shards: int) -> None:
    make_checkpoint(tmp_path, family, dtype=dtype, shards=shards, attention_bias=True, mlp_bias=True)
    source = Checkpoint(tmp_path)
    expected = random_tensors(source.config)
    tolerance = {"BF16": 2**-8, "F16": 2**-10, "F32": 0}[dtype]
    for name in [*table_names(source.config), *linear_names(source.config)]:
        found = source.weight(name)
        assert found.dtype == {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]
        assert found.shape == expected[f"{name}.weight"].shape
    for name in vector_names(source.config):
        np.testing.assert_allclose(source.vector(name), expected[name], rtol=tolerance, atol=1e-6)
    bias = bias_of(source, "model.layers.0.self_attn.q_proj")
    assert bias is not None
    np.testing.assert_allclose(bias, expected["model.layers.0.self_attn.q_proj.bias"], rtol=tolerance, atol=1e-6)
    source.close()


def test_without_biases_there_are_none(tmp_path: Path) -> None:
    source = Checkpoint(make_checkpoint(tmp_path))
    assert bias_of(source, "model.layers.1.mlp.down_proj") is None
    assert bias_of(source, "model.embed_tokens") is None
    assert bias_of(source, "lm_head") is None


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    buffer = np.zeros(16, np.uint16)
    replace_tensors(tmp_path, bf16_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": buffer}, "BF16")
    Checkpoint(tmp_path).close()


def test_a_tied_head_written_twice_must_be_the_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = bf16_tensors()
    replace_tensors(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, "BF16")
    Checkpoint(tmp_path).close()
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] ^= 1
    replace_tensors(tmp_path, tensors | {"lm_head.weight": other}, "BF16")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: expected by config.json, missing"),
        (lambda t: t.pop("lm_head.weight"), "tie_word_embeddings"),
        (lambda t: t.update({"model.extra.weight": np.zeros(4, np.uint16)}), "model.extra.weight: unexpected"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.zeros(256, np.uint16)}), "up_proj.bias: unexpected"),
        (lambda t: t.update({"model.norm.weight": np.zeros(64, np.uint16)}), r"model.norm.weight: shape: .*\(128,\)"),
        (lambda t: t.update({"model.norm.weight": np.zeros((128, 1), np.uint16)}), "model.norm.weight: shape"),
        (lambda t: [t.pop(n) for n in list(t) if ".1." in n], "and 6 more"),
    ],
)
def test_tensors_that_do_not_fit_the_architecture_are_named(tmp_path: Path, change: Any, message: str) -> None:
    make_checkpoint(tmp_path, "llama3")
    tensors = bf16_tensors("llama3")
    change(tensors)
    replace_tensors(tmp_path, tensors, "BF16")
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "F64"])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path)
    numpy_dtype = {"I8": np.int8, "F64": np.float64}[dtype]
    replace_tensors(tmp_path, {name: x.astype(numpy_dtype) for name, x in bf16_tensors().items()}, dtype)
    with pytest.raises(InputError, match=f"dtype: expected one of BF16, F16, F32, got {dtype}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
        ("model_type", "gemma3", "model_type"),
        ("model_type", "qwen3", "self_attn.k_norm.weight"),
        ("model_type", "llamita", "llamita.json"),
        ("num_hidden_layers", 10**6, "num_hidden_layers"),
        ("num_hidden_layers", 3, "model.layers.2"),
        ("hidden_act", "gelu", "hidden_act"),
        ("tie_word_embeddings", False, "lm_head"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    make_checkpoint(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_that_are_not_finite_are_found_with_their_place(dtype: str) -> None:
    x = np.ones((3000, 2048), np.float32)
    x[2500, 17] = -np.inf
    stored = {"BF16": f32_to_bf16, "F16": lambda a: a.astype(np.float16), "F32": lambda a: a}[dtype](x)
    with pytest.raises(InputError, match="row 2507, column 17"):
        check_finite("w", stored, first_row=7)
    check_finite("w", stored[:2500])


# ---- files ---------------------------------------------------------------------------------------


def sharded(directory: Path) -> dict[str, Any]:
    make_checkpoint(directory, shards=2)
    return json.loads((directory / "model.safetensors.index.json").read_text())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        Checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model-00002-of-00002.*truncated"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "x/../y.safetensors", "..", "", "a\0.safetensors", 7, None, "config.json"],
)
def test_an_index_may_not_lead_out_of_the_directory(tmp_path: Path, name: Any) -> None:
    index = sharded(tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model" / "model-00001-of-00002.safetensors").read_bytes())
    index["weight_map"]["model.norm.weight"] = name
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        Checkpoint(tmp_path / "model")


def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    write_file(tmp_path / "more.safetensors", {"model.norm.weight": np.zeros(128, np.uint16)}, "BF16")
    index["weight_map"]["x"] = "more.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="two files"):
        Checkpoint(tmp_path)


def test_links_out_of_the_directory_are_refused_but_for_the_hubs_cache(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "elsewhere")
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "123"
    for directory in (tmp_path / "linked", snapshot):
        directory.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    (tmp_path / "elsewhere").rename(blobs)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
        (tmp_path / "linked" / name).symlink_to(blobs / name)
    Checkpoint(snapshot).close()
    with pytest.raises(InputError, match="link"):
        Checkpoint(tmp_path / "linked")


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="regular file"):
        Checkpoint(tmp_path)


def test_a_huge_json_file_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    os.truncate(tmp_path / "config.json", 2**40)  # sparse: takes no room
    with pytest.raises(InputError, match="at most"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"), [("pytorch_model.bin", "pickled"), ("m.gguf", "GGUF"), ("x.txt", "neither")]
)
def test_other_weights_are_named(tmp_path: Path, file: str, message: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).touch()
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_leads_to_another_directory_is_refused(tmp_path: Path, absolute: bool) -> None:
    directory = make_checkpoint(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (directory / "model.safetensors").rename(tmp_path / "other" / "w.safetensors")
    file = str(tmp_path / "other" / "w.safetensors") if absolute else "../other/w.safetensors"
    tensors = TensorFile(tmp_path / "other" / "w.safetensors").tensors
    index = {"weight_map": dict.fromkeys(tensors, file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="expected the name of a file in this directory"):
        Checkpoint(directory)


# ---- names ---------------------------------------------------------------------------------------


def test_a_directory_is_itself_and_a_file_is_refused(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="directory"):
        resolve(str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "/no/such/directory", "./x/y", "a/../b", ""])
def test_what_can_be_no_hub_name_is_not_looked_up(name: str) -> None:
    with pytest.raises(InputError, match="model directory"):
        resolve(name)
