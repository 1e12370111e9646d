"""GGUF: the container, and packed models in it, weight by weight."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from tiny import make_checkpoint, random_tensors, write_tensors

from llamita.errors import InputError
from llamita.export.source import module_names
from llamita.formats.gguf import GgufFile, write_gguf
from llamita.formats.gguf_blocks import floats_of
from llamita.imports.forms import convert
from llamita.imports.gguf import _ends
from llamita.imports.tokenizers import with_scores
from llamita.models.checkpoint import Checkpoint, Int4Weight, Int8Weight
from llamita.models.foreign_names import gguf_name, pair_order, rope_factors
from llamita.models.packed import PackedModel
from llamita.numerics.affine import dequantize, f32_to_bf16, to_f32
from llamita.numerics.packing import unpack_int4
from llamita.text.tokenizer import Tokenizer

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def model_of(directory: Path, family: str = "llama32", **overrides: Any) -> Path:
    """A tiny checkpoint whose tokenizer splits texts as GPT-2's does."""
    path = make_checkpoint(directory / "model", family, **overrides)
    tokenizer = json.loads((path / "tokenizer.json").read_text("utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                  "use_regex": True}  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return path


def small(path: Path) -> Path:
    """A file with a value of each kind and two tensors."""
    values = {"a": 3, "b": 1.5, "c": True, "d": "text", "e": ["x", "yy"], "f": np.arange(3, dtype=np.int32)}
    tensors = {"one": ("F32", (3,)), "two": ("Q8_0", (2, 64))}
    blocks = np.arange(2 * 68, dtype=np.uint8).reshape(2, 68)
    write_gguf(path, values, tensors, iter([("one", np.ones(3, np.float32)), ("two", blocks)]))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = GgufFile(small(tmp_path / "a.gguf"))
    assert {key: file.values[key] for key in "abcde"} == {
        "a": 3, "b": 1.5, "c": True, "d": "text", "e": ["x", "yy"]
    }  # fmt: skip
    np.testing.assert_array_equal(file.values["f"], [0, 1, 2])
    assert file.tensors["two"].shape == (2, 64)
    np.testing.assert_array_equal(file.read("two").ravel(), np.arange(136))
    assert file.tensors["two"].start % 32 == 0


def test_a_damaged_file_is_one_typed_error(tmp_path: Path) -> None:
    """Mutated and cut anywhere; what is read then lies within the file."""
    good, path = small(tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf"
    random, refused = np.random.default_rng(0), 0
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] = (0, 1, 127, 255, int(random.integers(256)))[random.integers(5)]
        path.write_bytes(data[: random.integers(len(data))] if random.random() < 0.3 else data)
        try:
            file = GgufFile(path)
        except InputError:
            refused += 1
            continue
        for name in file.tensors:
            file.read(name)
    assert refused > 500


@pytest.mark.parametrize(
    ("at", "form", "value", "told"),
    [
        (0, "4s", b"GGML", "another beginning"),
        (4, "<I", 9, "version: expected 2 or 3, got 9"),
        (8, "<Q", 1 << 60, "tensors: expected at most"),
        (16, "<Q", 1 << 60, "metadata: expected at most"),
        (24, "<Q", 1 << 60, "expected a text of at most"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(
    tmp_path: Path, at: int, form: str, value: Any, told: str
) -> None:
    path = small(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)
    with pytest.raises(InputError, match=told):
        GgufFile(path)


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama31", "llama32"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_every_weight_is_carried_exactly(tmp_path: Path, family: str, group_size: int) -> None:
    model = model_of(tmp_path, family)
    options = ("--preset", "llama3.2", "--group-size", group_size)
    assert run("quantize", model, "-o", tmp_path / "packed", *options) == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    packed, file = PackedModel(tmp_path / "packed"), GgufFile(tmp_path / "out" / "model.gguf")
    for name in module_names(packed):
        weight, found = packed.weight(name), gguf_name(f"{name}.weight")
        read = floats_of(file.tensors[found].kind, file.read(found))
        assert isinstance(weight, Int4Weight | Int8Weight)
        assert file.tensors[found].kind == ("Q4_0" if isinstance(weight, Int4Weight) else "Q8_0")
        codes = unpack_int4(weight.packed) if isinstance(weight, Int4Weight) else np.asarray(weight.codes)
        expected = dequantize(codes, weight.scales)
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


def test_rows_go_where_neighbours_are_rotated() -> None:
    np.testing.assert_array_equal(pair_order(8, 2), [0, 2, 1, 3, 4, 6, 5, 7])


def test_frequencies_are_divided_as_llama_31_does(tmp_path: Path) -> None:
    values = {"head_dim": 128, "rope_theta": 500000.0, "rope_scaling": SCALED}
    config = Checkpoint(model_of(tmp_path, "llama31", **values)).config
    factors = rope_factors(config)
    assert factors[0] == 1.0  # turns often: left alone
    assert factors[-1] == pytest.approx(config.rope.factor)  # turns seldom: stretched
    assert (np.diff(factors) >= 0).all()


def test_what_the_form_cannot_hold_is_refused(tmp_path: Path, capsys: Any) -> None:
    model = model_of(tmp_path)
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
    for wrong, told in (
        ((model, "--to", "gguf", *out), "expected a quantized directory, got a float model"),
        (
            (tmp_path / "arm", "--to", "nothing", *out),
            "--to: expected one of executorch, adapters, compressed-tensors",
        ),
        ((tmp_path / "arm", "--to", "gguf"), "--out: expected the directory to make"),
        ((tmp_path / "arm", "--to", "gguf", *out), "exists; try --overwrite"),
        (
            (tmp_path / "arm", "--to", "gguf", "-o", tmp_path / "b", "--context", "64"),
            "--context: gguf takes none",
        ),
    ):
        assert run("export", *wrong) == 2
        assert told in one_line(capsys)
    assert run("export", tmp_path / "arm", "--to", "gguf", *out, "--round-scales", "--overwrite") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
    ],
)  # fmt: skip
def test_tokenizers_that_split_otherwise_are_refused(
    tmp_path: Path, capsys: Any, change: dict[str, Any]
) -> None:
    model = model_of(tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | change), "utf-8")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 2
    assert "tokenizer.json: pre_tokenizer: expected GPT-2's" in one_line(capsys)


def test_groups_of_zeros_and_tiny_scales_are_counted_and_exact(tmp_path: Path, capsys: Any) -> None:
    model = model_of(tmp_path, "llama3")
    tensors = random_tensors(Checkpoint(model).config)
    tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0  # 3 rows of 128 inputs: 12 groups of 32
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(2.0**-10)
    (model / "model.safetensors").unlink()
    write_tensors(model, {name: f32_to_bf16(values) for name, values in tensors.items()}, "BF16")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "12 groups are zeros" in told
    assert "scales are subnormal in f16, and exact" in told
    assert "21 of 21 tensors have the same values" in told
    assert run("import", tmp_path / "out" / "model.gguf", "-o", tmp_path / "back") == 0
    first, second = PackedModel(tmp_path / "packed"), PackedModel(tmp_path / "back")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        one, other = first.weight(name), second.weight(name)
        assert isinstance(one, Int4Weight)
        assert isinstance(other, Int4Weight)
        np.testing.assert_array_equal(one.packed, other.packed)
        np.testing.assert_array_equal(one.scales, other.scales)


def test_biases_go_with_their_rows(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama3", attention_bias=True)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    packed, file = PackedModel(tmp_path / "packed"), GgufFile(tmp_path / "out" / "model.gguf")
    bias = packed.bias("model.layers.1.self_attn.q_proj")
    assert bias is not None
    ordered = bias[pair_order(len(bias), packed.config.heads)]
    np.testing.assert_array_equal(file.read("blk.1.attn_q.bias").view("<f4"), ordered)


def test_float_tables_stay_as_they_are(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama3")
    keep = ("--keep-float", "lm_head", "--keep-float", "model.embed_tokens")
    assert run("quantize", model, "-o", tmp_path / "packed", *keep) == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    packed, file = PackedModel(tmp_path / "packed"), GgufFile(tmp_path / "out" / "model.gguf")
    assert file.tensors["output.weight"].kind == "BF16"
    expected = to_f32(np.asarray(packed.weight("lm_head")))
    np.testing.assert_array_equal(floats_of("BF16", file.read("output.weight")), expected)


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
    scaled = {"rope_scaling": SCALED} if family != "llama2" else {}
    model = model_of(tmp_path, family, **scaled)
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
        codes = unpack_int4(weight.packed) if isinstance(weight, Int4Weight) else np.asarray(weight.codes)
        sign = -1 if isinstance(weight, Int4Weight) else 1
        expected = sign * dequantize(codes, weight.scales)
        np.testing.assert_array_equal(again.weight(name), expected, err_msg=name)
    texts = ["Once upon a time", "naïve — 1234567", "a  b\n\nc", "it's <|eot_id|> x"]
    for text in texts:
        assert Tokenizer(again.path).encode(text) == Tokenizer(model).encode(text)
    assert run("quantize", file, "-o", tmp_path / "third") == 0  # every command takes the file itself


def test_q6_k_is_as_its_definition_has_it() -> None:
    """Against a loop over the weights of a block, as ggml's reference counts them."""
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (2, 3 * 210), dtype=np.uint8)
    blocks = data.reshape(-1, 210)
    blocks[:, 208:] = random.normal(0, 0.01, (6, 1)).astype("<f2").view(np.uint8)
    expected = np.empty((6, 256), np.float32)
    for block, out in zip(blocks, expected, strict=True):
        scale = block[208:].copy().view("<f2").astype(np.float32)[0]
        for place in range(256):
            half, within = divmod(place, 128)
            quarter, lane = divmod(within, 32)
            low = block[64 * half + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2)) & 15
            high = block[128 + 32 * half + lane] >> (2 * quarter) & 3
            own = block[192 + place // 16].astype(np.int8)
            out[place] = scale * np.float32(own) * np.float32(int(low | high << 4) - 32)
    np.testing.assert_array_equal(floats_of("Q6_K", data), expected.reshape(2, -1))


def test_special_tokens_and_flags_of_llama_2s_kind_hold() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256))]
    pieces += [
        (text, -float(i)) for i, text in enumerate(["\u2581", "a", "b", "<|im|>", "<", "|", "i", "m", ">"])
    ]
    plain = with_scores(pieces, ["<unk>", "<s>", "</s>", "<|im|>"], None, False)
    assert plain.encode("a<|im|>b").tokens == ["a", "<|im|>", "b"]
    assert plain.decode(plain.encode("a b").ids) == "a b"
    usual = with_scores(pieces)
    assert usual.encode("a").tokens == ["<s>", "\u2581", "a"]


def test_every_end_of_llama_3_ends_an_answer(tmp_path: Path) -> None:
    file = GgufFile(small(tmp_path / "a.gguf"))
    file.values["tokenizer.ggml.eos_token_id"] = 1
    tokens = ["a", "</s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    assert _ends(file, tokens) == [1, 2, 4, 3]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("general.architecture", "bert", "general.architecture: expected llama, got 'bert'"),
        ("llama.block_count", 3, "blk.2.attn_q.weight: expected"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.type: expected linear or none, got 'yarn'"),
        ("tokenizer.ggml.pre", "odd", "tokenizer.ggml.pre: expected one of gpt-2"),
        ("tokenizer.ggml.tokens", ["a"], "token_embd.weight: expected \\(1, 128\\)"),
        ("llama.embedding_length", 1.5, "llama.embedding_length: expected a whole number"),
        (
            "llama.rope.dimension_count",
            8,
            "llama.rope.dimension_count: expected 32, got 8: not a plain",
        ),
        ("llama.attention.scale", 0.5, "llama.attention.scale: expected 0.0, got 0.5"),
        ("llama.attention.causal", False, "llama.attention.causal: expected True"),
        ("llama.logit_scale", ["x"], "llama.logit_scale: expected 1.0"),
    ],
)
def test_a_file_that_is_no_llama_is_told(tmp_path: Path, key: str, value: Any, told: str) -> None:
    model = model_of(tmp_path, rope_scaling=SCALED)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    file = GgufFile(tmp_path / "out" / "model.gguf")
    tensors = {name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()}
    write_gguf(
        tmp_path / "b.gguf", {**file.values, key: value}, tensors, ((n, file.read(n)) for n in tensors)
    )
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=told):
        convert(tmp_path / "b.gguf", tmp_path / "b")
