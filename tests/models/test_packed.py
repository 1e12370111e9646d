"""Packed models: what is written is read, sealed, sharded, and opened by transformers or refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from packed_models import assert_same_weight, float_weight, needs_transformers, pack, pack_rotated, reseal
from tiny import CONFIGS, make_checkpoint

from llamita.errors import InputError
from llamita.imports.open import open_source
from llamita.loading import load
from llamita.models.checkpoint import Checkpoint
from llamita.models.metadata import Metadata, self_hash_holds
from llamita.models.names import linear_names, table_names, vector_names
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight, bias_of
from llamita.numerics.affine import to_f32
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.quantize.rounded import RoundedSource

# ---- what is written is read ---------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("preset", "dtype"), [("arm", "F32"), ("llama3.2", "BF16"), ("llamita", "F16")])
def test_directory_and_rounding_on_the_fly_are_the_same(tmp_path: Path, preset: str, family: str, dtype: str) -> None:
    group_size = 32 if family == "tinyllama" else None  # 352 inputs of down_proj
    out = pack(tmp_path, preset, group_size, family=family, dtype=dtype, attention_bias=True, mlp_bias=True)
    packed = PackedModel(out)
    checkpoint = Checkpoint(tmp_path / "src")
    rounded = RoundedSource(checkpoint, make_scheme(preset, group_size))
    assert packed.scheme == rounded.scheme
    assert packed.config == rounded.config
    for name in [*table_names(packed.config), *linear_names(packed.config)]:
        assert_same_weight(packed.weight(name), rounded.weight(name))
        difference = float_weight(packed.weight(name)) - to_f32(checkpoint.weight(name))
        assert (difference**2).mean() < 0.02 * (to_f32(checkpoint.weight(name)) ** 2).mean()
    for name in vector_names(packed.config):
        np.testing.assert_array_equal(packed.vector(name), checkpoint.vector(name))
    np.testing.assert_array_equal(
        bias_of(packed, "model.layers.1.mlp.down_proj"), bias_of(rounded, "model.layers.1.mlp.down_proj")
    )
    assert isinstance(open_source(out), PackedModel)


def test_scale_dtypes_follow_the_scheme(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    weight = PackedModel(pack(tmp_path, "arm")).weight(name)
    assert isinstance(weight, Int4Weight)
    assert weight.scales.dtype == np.float32
    weight = PackedModel(pack(tmp_path / "2", "llama3.2")).weight(name)
    assert isinstance(weight, Int4Weight)
    assert weight.scales.dtype == np.uint16


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    whole = PackedModel(pack(tmp_path / "1"))
    sharded_path = pack(tmp_path / "2", shard_bytes=40_000)
    sharded = PackedModel(sharded_path)
    assert len(sharded.files) > 3
    assert all((sharded_path / file).stat().st_size < 60_000 for file in sharded.files)
    for name in [*table_names(whole.config), *linear_names(whole.config)]:
        assert_same_weight(sharded.weight(name), whole.weight(name))
    index = json.loads((sharded_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        i.stop - i.start for i in whole.files["model.safetensors"].tensors.values()
    )
    assert "model.safetensors" not in {path.name for path in sharded_path.iterdir()}


@pytest.mark.parametrize("family", ["llama32", "llama3"])  # one table with an odd number of scales, or two
def test_an_odd_vocabulary_keeps_every_tensor_aligned(tmp_path: Path, family: str) -> None:
    out = pack(tmp_path, family=family, vocab_size=321)
    for name, info in PackedModel(out).files["model.safetensors"].tensors.items():
        size = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "I8": 1}[info.dtype]
        assert info.start % size == 0, name
    loaded = safetensors.numpy.load_file  # the package maps tensors by offset and insists on alignment
    assert "model.embed_tokens.weight_scale" in loaded(_without_bf16(out))


def _without_bf16(out: Path) -> Path:
    """NumPy knows no bf16: the header says U16 in its place, with as many characters."""
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"U16" '))
    return path


def test_small_files_travel_along(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "src")
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE", "generation_config.json", "chat_template.jinja",
                 "special_tokens_map.json", "README.md", "optimizer.pt", "notes.txt"):  # fmt: skip
        (tmp_path / "src" / name).write_text(f"the {name}")
    (tmp_path / "src" / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT")
    quantize(Checkpoint(tmp_path / "src"), "src", tmp_path / "out", make_scheme("llama3.2"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    copied = {"LICENSE.txt", "USE_POLICY.md", "NOTICE", "generation_config.json", "chat_template.jinja",
              "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    made = {"config.json", "SOURCE_README.md", "README.md", "model.safetensors", "llamita.json"}
    assert names == copied | made
    assert (tmp_path / "out" / "SOURCE_README.md").read_text() == "the README.md"
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("Built with Llama", "llama.com/llama3_2/use-policy", "responsible-use-guide", "llama3.2", "int4"):
        assert text in card


def test_what_llamita_json_says(tmp_path: Path) -> None:
    out = pack(tmp_path, "arm", family="llama3")
    values = json.loads((out / "llamita.json").read_text())
    assert list(values) == [
        "self_sha256", "format", "llamita", "scheme", "method", "settings", "seed", "rotations",
        "calibration", "source", "float_layers", "error", "files",
    ]  # fmt: skip
    assert values["format"] == 1
    assert values["source"]["name"] == "src"
    weights = (tmp_path / "src" / "model.safetensors").read_bytes()
    assert values["source"]["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert set(values["float_layers"]) == {"model.embed_tokens", "lm_head"}
    assert set(values["error"]["layers"]) == set(linear_names(PackedModel(out).config))
    assert 0.005 < values["error"]["relative"] < 0.02
    for name, record in values["files"].items():
        data = (out / name).read_bytes()
        assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(values["files"]) == {path.name for path in out.iterdir()} - {"llamita.json"}
    assert self_hash_holds((out / "llamita.json").read_bytes())


def test_metadata_that_was_read_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    out = pack_rotated(tmp_path)
    (tmp_path / "again").mkdir()
    Metadata.read(out).write(tmp_path / "again")
    assert (tmp_path / "again" / "llamita.json").read_bytes() == (out / "llamita.json").read_bytes()


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = pack(tmp_path / "1"), pack(tmp_path / "2")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


# ---- what is damaged is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "newer llamita"),
        ({"format": "1"}, "format"),
        ({"format": 0}, "format"),
        ({"rotations": ["r1"]}, "rotations"),
        ({"scheme": {"name": "x"}}, "scheme"),
        ({"scheme": None}, "scheme"),
        ({"more": 1}, "keys"),
        ({"files": []}, "files"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, "files"),
        ({"files": {"": {"size": 1, "sha256": ""}}}, "files"),
        ({"llamita": 1}, "llamita.json: llamita: expected a text, got 1"),
        ({"method": None}, "method"),
        ({"settings": []}, "settings"),
        ({"float_layers": ["lm_head"]}, "float_layers"),
        ({"error": None}, "error"),
        ({"error": {"relative": None}}, "error"),
        ({"error": {"layers": {}}}, "error"),
        ({"error": {"relative": "0.1", "layers": {}}}, "error"),
        ({"error": {"relative": 0.1, "layers": {"lm_head": "0.1"}}}, "error"),
        ({"source": None}, "source"),
        ({"source": {"name": 1, "files": {}}}, "source"),
        ({"source": {"name": "x"}}, "source"),
        ({"source": {"name": "x", "files": ["config.json"]}}, "source"),
        ({"source": {"name": "x", "files": {"/dev/zero": "0" * 64}}}, "source"),
        ({"source": {"name": "x", "files": {"..": "0" * 64}}}, "source"),
        ({"source": {"name": "x", "files": {"config.json": "0" * 63}}}, "source"),
        ({"source": {"name": "x", "files": {"config.json": None}}}, "source"),
        ({"files": {"gone.safetensors": {"size": 1, "sha256": ""}}}, "gone.safetensors"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    out = pack(tmp_path)
    reseal(out, **changes)
    with pytest.raises(InputError, match=message):
        open_source(out)


def test_a_scheme_that_the_tensors_contradict_is_refused(tmp_path: Path) -> None:
    out = pack(tmp_path)
    scheme = json.loads((out / "llamita.json").read_text())["scheme"]
    for change in ({"group_size": 64}, {"scale_dtype": "float32", "scale_rule": "torchao"}, {"table_bits": None}):
        reseal(out, scheme=scheme | change)
        with pytest.raises(InputError, match="expected"):
            open_source(out)
    reseal(out, scheme=scheme)
    open_source(out).close()


def test_weights_that_llamita_json_does_not_list_are_refused(tmp_path: Path) -> None:
    out = pack(tmp_path)
    files = json.loads((out / "llamita.json").read_text())["files"]
    reseal(out, files={name: files[name] for name in files if name != "model.safetensors"})
    with pytest.raises(InputError, match=r"model\.safetensors: expected among the files"):
        open_source(out)


def test_packed_weights_without_llamita_json_say_what_is_missing(tmp_path: Path) -> None:
    out = pack(tmp_path)
    (out / "llamita.json").unlink()
    with pytest.raises(InputError, match=r"llamita\.json: expected next to packed weights, got none; try"):
        open_source(out)


def test_packed_weights_that_are_plain_compressed_tensors_are_read_as_that(tmp_path: Path) -> None:
    """With float tables and nothing to do at run time, config.json alone says what they are."""
    out = pack(tmp_path, "arm")
    written = open_source(out).weight("model.layers.0.mlp.up_proj")
    (out / "llamita.json").unlink()
    again = open_source(out).weight("model.layers.0.mlp.up_proj")
    assert isinstance(written, Int4Weight)
    assert isinstance(again, Int4Weight)
    np.testing.assert_array_equal(again.packed, written.packed)
    np.testing.assert_array_equal(again.scales, written.scales)


def test_edited_files_are_refused(tmp_path: Path) -> None:
    out = pack(tmp_path)
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace("500000.0", "10000.0"))
    with pytest.raises(InputError, match=r"config.json: differs"):
        open_source(out)
    (out / "config.json").write_text(text)
    metadata = (out / "llamita.json").read_text()
    (out / "llamita.json").write_text(metadata.replace('"rtn"', '"gptq"'))
    with pytest.raises(InputError, match=r"llamita.json: differs"):
        open_source(out)


@pytest.mark.parametrize("bits", [0x0000, 0x0040, 0x7F80, 0x7FC0, 0xBC00])
def test_scales_that_no_runtime_accepts_are_refused(tmp_path: Path, bits: int) -> None:
    out = pack(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    info = PackedModel(out).files["model.safetensors"].tensors[f"{name}.weight_scale"]
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(info.start)
        file.write(bits.to_bytes(2, "little"))  # zero, subnormal, infinite, NaN, negative
    with pytest.raises(InputError, match="scales"):
        PackedModel(out).weight(name)


# ---- transformers --------------------------------------------------------------------------------


@needs_transformers
@pytest.mark.parametrize(("family", "dtype", "group_size"), [("llama32", "BF16", 128), ("llama3", "F16", 64)])
def test_transformers_opens_an_arm_directory_and_computes_the_same(
    tmp_path: Path, family: str, dtype: str, group_size: int
) -> None:
    import torch
    from layerwise import guided, linear_modules, watch
    from transformers import AutoModelForCausalLM

    out = pack(tmp_path, "arm", group_size, family=family, dtype=dtype, attention_bias=family == "llama3")
    packed = PackedModel(out)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    opened: Any = AutoModelForCausalLM.from_pretrained(out)
    assert opened.dtype == torch.float32
    passed, modules = watch(load(out, kv_dtype="f32"), ids), linear_modules(opened, packed)

    def run() -> None:
        with guided(modules, packed, passed):
            opened(ids)

    run()
    # What is compared is found: inputs that are not rounded, a wrong weight, another norm.
    last = modules["model.layers.1.mlp.down_proj"]
    last.quantization_enabled = False
    with pytest.raises(AssertionError, match="output of"):
        run()
    last.quantization_enabled = True
    last.weight.data[3, 5] += 0.01  # a fraction of a code's distance
    with pytest.raises(AssertionError, match="output of"):
        run()
    opened.model.layers[1].input_layernorm.weight.data[7] *= 1.01
    with pytest.raises(AssertionError, match="input of"):
        run()


@needs_transformers
@pytest.mark.parametrize("family", ["llama32", "llama3"])
def test_transformers_refuses_int8_tables(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    out = pack(tmp_path, "llama3.2", family=family)
    with pytest.raises(ValueError, match="llamita"):
        AutoConfig.from_pretrained(out)
    with pytest.raises(ValueError, match="llamita"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(ValueError, match="group_tables"):  # even when told that it is a Llama
        LlamaForCausalLM.from_pretrained(out)
