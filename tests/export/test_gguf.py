"""Packed models as GGUF, weight by weight, and what the format cannot hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from foreign_models import make_gguf_checkpoint
from packed_models import float_weight
from tiny import random_tensors, replace_tensors

from llamita.export.source import module_names
from llamita.formats.gguf import GgufFile
from llamita.formats.gguf_blocks import floats_of
from llamita.models.checkpoint import Checkpoint
from llamita.models.foreign_names import gguf_name, pair_order
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight, Int8Weight, bias_of
from llamita.numerics.affine import f32_to_bf16, to_f32


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama31", "llama32"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_every_weight_is_carried_exactly(tmp_path: Path, family: str, group_size: int) -> None:
    model = make_gguf_checkpoint(tmp_path, family)
    options = ("--preset", "llama3.2", "--group-size", group_size)
    assert run("quantize", model, "-o", tmp_path / "packed", *options) == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    packed, file = PackedModel(tmp_path / "packed"), GgufFile(tmp_path / "out" / "model.gguf")
    for name in module_names(packed):
        weight, found = packed.weight(name), gguf_name(f"{name}.weight")
        read = floats_of(file.tensors[found].kind, file.read(found))
        assert isinstance(weight, Int4Weight | Int8Weight)
        assert file.tensors[found].kind == ("Q4_0" if isinstance(weight, Int4Weight) else "Q8_0")
        expected = float_weight(weight)
        if name.endswith(("q_proj", "k_proj")):
            heads = packed.config.heads if name.endswith("q_proj") else packed.config.kv_heads
            half = len(expected) // heads // 2
            # rows 0, half, 1, half + 1, … of each head, one head after the other
            ordered = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)]
            expected = expected[ordered]
        np.testing.assert_array_equal(read, expected, err_msg=name)
    assert ("output.weight" in file.tensors) == (not packed.config.tied)
    assert ("rope_freqs.weight" in file.tensors) == (packed.config.rope.kind == "llama3")
    assert file.values["llama.block_count"] == packed.config.layers
    assert len(file.values["tokenizer.ggml.tokens"]) == packed.config.vocab_size


def test_groups_of_two_sizes_are_carried_exactly(tmp_path: Path, capsys: Any) -> None:
    model = make_gguf_checkpoint(tmp_path, "tinyllama")  # 352 inputs of down_proj, 128 of the other layers
    assert run("quantize", model, "-o", tmp_path / "packed", "--group-size", "128", "--fit-groups") == 0
    capsys.readouterr()
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["equal_layers"] == record["layers"]


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, capsys: Any) -> None:
    model = make_gguf_checkpoint(tmp_path)
    rotated = ("--method", "spinquant", "--set", "spinquant.rotations=R4")
    assert run("quantize", model, "-o", tmp_path / "r4", *rotated) == 0
    assert run("quantize", model, "-o", tmp_path / "arm", "--preset", "arm", "--group-size", "32") == 0
    capsys.readouterr()
    out = ("-o", tmp_path / "out")
    assert run("export", tmp_path / "r4", "--to", "gguf", *out) == 2
    assert "needs no rotation at run time, got R4" in one_line(capsys)
    assert run("export", tmp_path / "arm", "--to", "gguf", *out) == 2
    assert "expected scales on the grid of f16, got others; try --round-scales" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    assert run("export", tmp_path / "arm", "--to", "gguf", *out, "--round-scales") == 0
    shown = capsys.readouterr()
    assert "scales rounded, by 0.0" in shown.err
    for wrong, message in (
        ((model, "--to", "gguf", *out), "expected a packed model, got a float model"),
        ((tmp_path / "arm", "--to", "nothing", *out), "--to: expected one of executorch, adapters, compressed-tensors"),
        ((tmp_path / "arm", "--to", "gguf"), "--out: expected the directory to make"),
        ((tmp_path / "arm", "--to", "gguf", *out), "exists; try --overwrite"),
        ((tmp_path / "arm", "--to", "gguf", "-o", tmp_path / "b", "--context", "64"), "--context: gguf takes none"),
    ):
        assert run("export", *wrong) == 2
        assert message in one_line(capsys)
    assert run("export", tmp_path / "arm", "--to", "gguf", *out, "--round-scales", "--overwrite") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
    ],
)  # fmt: skip
def test_tokenizers_that_split_otherwise_are_refused(tmp_path: Path, capsys: Any, change: dict[str, Any]) -> None:
    model = make_gguf_checkpoint(tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | change), "utf-8")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 2
    assert "tokenizer.json: pre_tokenizer: expected a way to split a text that llama.cpp has a name for" in one_line(
        capsys
    )


def test_groups_of_zeros_and_tiny_scales_are_counted_and_exact(tmp_path: Path, capsys: Any) -> None:
    model = make_gguf_checkpoint(tmp_path, "llama3")
    tensors = random_tensors(Checkpoint(model).config)
    tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0  # 3 rows of 128 inputs: 12 groups of 32
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(2.0**-10)
    replace_tensors(model, {name: f32_to_bf16(values) for name, values in tensors.items()}, "BF16")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    shown = capsys.readouterr().err
    assert "12 groups are zeros" in shown
    assert "scales are subnormal in f16, and exact" in shown
    assert "21 of 21 tensors have the same values" in shown
    assert run("import", tmp_path / "out" / "model.gguf", "-o", tmp_path / "back") == 0
    first, second = PackedModel(tmp_path / "packed"), PackedModel(tmp_path / "back")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        one, other = first.weight(name), second.weight(name)
        assert isinstance(one, Int4Weight)
        assert isinstance(other, Int4Weight)
        np.testing.assert_array_equal(one.packed, other.packed)
        np.testing.assert_array_equal(one.scales, other.scales)


def test_biases_go_with_their_rows(tmp_path: Path) -> None:
    model = make_gguf_checkpoint(tmp_path, "llama3", attention_bias=True)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    packed, file = PackedModel(tmp_path / "packed"), GgufFile(tmp_path / "out" / "model.gguf")
    bias = bias_of(packed, "model.layers.1.self_attn.q_proj")
    assert bias is not None
    ordered = bias[pair_order(len(bias), packed.config.heads)]
    np.testing.assert_array_equal(file.read("blk.1.attn_q.bias").view("<f4"), ordered)


def test_float_tables_stay_as_they_are(tmp_path: Path) -> None:
    model = make_gguf_checkpoint(tmp_path, "llama3")
    keep = ("--keep-float", "lm_head", "--keep-float", "model.embed_tokens")
    assert run("quantize", model, "-o", tmp_path / "packed", *keep) == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    packed, file = PackedModel(tmp_path / "packed"), GgufFile(tmp_path / "out" / "model.gguf")
    assert file.tensors["output.weight"].kind == "BF16"
    expected = to_f32(np.asarray(packed.weight("lm_head")))
    np.testing.assert_array_equal(floats_of("BF16", file.read("output.weight")), expected)
