"""GGUF files as float checkpoints: their values, tokens and ends, and files that are no Llama."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from foreign_models import make_gguf_checkpoint, write_in_blocks, write_small_gguf
from packed_models import float_weight
from tiny import llama3_rope

import llamita
from llamita.bench.plan import describe
from llamita.errors import InputError
from llamita.evaluate.scores import Contender
from llamita.export.source import module_names
from llamita.formats.gguf import GgufFile, write_gguf
from llamita.formats.gguf_blocks import floats_of
from llamita.formats.gguf_parts import GgufModel
from llamita.imports.convert import convert
from llamita.imports.gguf_config import _ends
from llamita.imports.open import open_source
from llamita.imports.tokenizers import with_scores
from llamita.models.checkpoint import Checkpoint
from llamita.models.foreign_names import hf_order
from llamita.models.names import linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.text.tokenizer import Tokenizer


def negated(source: Path, out: Path) -> Path:
    """The file with the sign of every scale of Q4_0 turned: some codes are -8, so that none can be kept."""
    file = GgufFile(source)
    tensors = {name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()}

    def data() -> Iterator[tuple[str, np.ndarray]]:
        for name, (kind, _) in tensors.items():
            values = file.read(name).copy()
            if kind == "Q4_0":
                values.reshape(-1, 18)[:, 1] ^= 0x80  # the upper byte of the scale
            yield name, values

    write_gguf(out, file.values, tensors, data())
    return out


@pytest.mark.parametrize("family", ["llama2", "llama31", "llama32"])
def test_a_file_with_scales_of_either_sign_becomes_a_float_checkpoint(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the very values of the packed model, its tokens, and its configuration."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    scaled = {"rope_scaling": llama3_rope(8.0)} if family != "llama2" else {}
    model = make_gguf_checkpoint(tmp_path, family, **scaled)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    file = negated(tmp_path / "out" / "model.gguf", tmp_path / "negated.gguf")
    assert run("import", file, "-o", tmp_path / "again") == 0
    packed, again = PackedModel(tmp_path / "packed"), Checkpoint(tmp_path / "again")
    assert again.config.rope == packed.config.rope
    assert again.config.tied == packed.config.tied
    for name in module_names(packed):
        weight = packed.weight(name)
        assert isinstance(weight, Int4Weight | Int8Weight)
        sign = -1 if isinstance(weight, Int4Weight) else 1
        expected = sign * float_weight(weight)
        np.testing.assert_array_equal(again.weight(name), expected, err_msg=name)
    texts = ["Once upon a time", "naïve — 1234567", "a  b\n\nc", "it's <|eot_id|> x"]
    for text in texts:
        assert Tokenizer(again.path).encode(text) == Tokenizer(model).encode(text)
    assert run("quantize", file, "-o", tmp_path / "third") == 0  # every command takes the file itself


def test_a_q6_k_table_is_multiplied_out_next_to_kept_codes(tmp_path: Path) -> None:
    """llama.cpp stores the output of its Q4_0 files so; the codes of the linear layers are kept."""
    model = make_gguf_checkpoint(tmp_path, "llama3", hidden_size=256, num_attention_heads=8)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    file = GgufFile(tmp_path / "out" / "model.gguf")
    tensors = {name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()}
    tensors["output.weight"] = ("Q6_K", tensors["output.weight"][1])
    blocks = np.random.default_rng(0).integers(0, 256, (320, 210)).astype(np.uint8)
    blocks[:, 208:] = np.full((320, 1), 0.001, "<f2").view(np.uint8)
    data = ((name, blocks if name == "output.weight" else file.read(name)) for name in tensors)
    write_gguf(tmp_path / "mixed.gguf", file.values, tensors, data)
    assert run("import", tmp_path / "mixed.gguf", "-o", tmp_path / "back") == 0
    packed, back = PackedModel(tmp_path / "packed"), PackedModel(tmp_path / "back")
    np.testing.assert_array_equal(np.asarray(back.weight("lm_head")), floats_of("Q6_K", blocks))
    name = "model.layers.1.mlp.down_proj"
    one, other = packed.weight(name), back.weight(name)
    assert isinstance(one, Int4Weight)
    assert isinstance(other, Int4Weight)
    np.testing.assert_array_equal(one.packed, other.packed)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q2_K", "Q4_K", "Q5_K", "IQ4_XS", "IQ3_S", "MXFP4"])
def test_a_file_in_other_blocks_becomes_a_float_checkpoint(tmp_path: Path, kind: str, capsys: Any) -> None:
    """With the values of each block, q and k in transformers' order of rows; every command takes it."""
    model = make_gguf_checkpoint(tmp_path, "llama3", hidden_size=256, num_attention_heads=8)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    data = write_in_blocks(tmp_path / "out" / "model.gguf", tmp_path / "a.gguf", [kind])
    capsys.readouterr()
    assert run("import", tmp_path / "a.gguf", "-o", tmp_path / "back") == 0
    assert f"weights are multiplied out: their blocks ({kind})" in capsys.readouterr().err
    back = Checkpoint(tmp_path / "back")
    for module, name in (("mlp.down_proj", "ffn_down"), ("self_attn.k_proj", "attn_k")):
        expected = floats_of(kind, data[f"blk.1.{name}.weight"])
        order = hf_order(f"model.layers.1.{module}.weight", back.config)
        found = back.weight(f"model.layers.1.{module}")
        np.testing.assert_array_equal(found, expected if order is None else expected[order])
    assert run("quantize", tmp_path / "a.gguf", "-o", tmp_path / "again", "--overwrite") == 0
    assert f"the source is rounded already ({kind}): rounding adds to its loss" in capsys.readouterr().err
    in_file = sum(tensor.stop - tensor.start for tensor in GgufFile(tmp_path / "a.gguf").tensors.values())
    assert describe(str(tmp_path / "a.gguf")).source_bytes == in_file  # what plan and --dry-run show
    llm = llamita.load(tmp_path / "a.gguf")
    assert Contender("a", llm, is_baseline=True).weight_bytes == (tmp_path / "a.gguf").stat().st_size
    assert run("inspect", tmp_path / "a.gguf") == 0
    out = capsys.readouterr().out
    assert kind in out
    assert re.search(r"tokenizer +[a-z]", out)  # without quotes
    source, file = open_source(tmp_path / "a.gguf"), GgufFile(tmp_path / "a.gguf")
    assert isinstance(source, Checkpoint)
    assert source.stored_bytes() == sum(tensor.stop - tensor.start for tensor in file.tensors.values())
    weights = [source.weight(name) for name in (*table_names(source.config), *linear_names(source.config))]
    assert source.made_bytes() == sum(w.nbytes for w in weights if w.flags.writeable)  # the file's own are not


def test_special_tokens_and_flags_of_llama_2s_kind_hold() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256))]
    pieces += [(text, -float(i)) for i, text in enumerate(["\u2581", "a", "b", "<|im|>", "<", "|", "i", "m", ">"])]
    plain = with_scores(pieces, ["<unk>", "<s>", "</s>", "<|im|>"], None, False)
    assert plain.encode("a<|im|>b").tokens == ["a", "<|im|>", "b"]
    assert plain.decode(plain.encode("a b").ids) == "a b"
    usual = with_scores(pieces)
    assert usual.encode("a").tokens == ["<s>", "\u2581", "a"]


def test_every_end_of_llama_3_ends_an_answer(tmp_path: Path) -> None:
    file = GgufModel(write_small_gguf(tmp_path / "a.gguf"))
    file.values["tokenizer.ggml.eos_token_id"] = 1
    tokens = ["a", "</s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    assert _ends(file, tokens) == [1, 2, 4, 3]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "bert", "general.architecture: expected one of llama, qwen2.*, got 'bert'"),
        ("llama.block_count", 3, "blk.2.attn_q.weight: expected"),
        ("llama.rope.scaling.type", "odd", "rope.scaling.type: expected linear, yarn, longrope or none, got 'odd'"),
        ("tokenizer.ggml.pre", "odd", "tokenizer.ggml.pre: expected one of llama-bpe"),
        ("tokenizer.ggml.tokens", ["a"], "token_embd.weight: expected \\(1, 128\\)"),
        ("llama.embedding_length", 1.5, "llama.embedding_length: expected a whole number"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count: expected 32, got 8: not a plain"),
        ("llama.attention.scale", 0.5, "llama.attention.scale: expected 0.0, got 0.5"),
        ("llama.attention.causal", False, "llama.attention.causal: expected True"),
        ("llama.logit_scale", ["x"], "llama.logit_scale: expected 1.0"),
    ],
)
def test_a_file_that_is_no_llama_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    model = make_gguf_checkpoint(tmp_path, rope_scaling=llama3_rope(8.0))
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    file = GgufFile(tmp_path / "out" / "model.gguf")
    tensors = {name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()}
    write_gguf(tmp_path / "b.gguf", {**file.values, key: value}, tensors, ((n, file.read(n)) for n in tensors))
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "b.gguf", tmp_path / "b")
