"""Blocks in steps against transformers' own model, and chains of methods from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import assert_nothing_is_left, one_line, run
from tiny import make_checkpoint

import llamita
import llamita.packing
from llamita.affine import dequantize, quantize_activations
from llamita.calibration import load_calibration
from llamita.checkpoint import Checkpoint, resolve
from llamita.errors import InputError
from llamita.methods.chain import parse_chain
from llamita.methods.setup import Calibration, Setup
from llamita.packed import PackedModel
from llamita.quantize import RoundedSource
from llamita.scheme import make_scheme
from llamita.verify import verify

torch = pytest.importorskip("torch", reason="calibrated methods are on the Torch side")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
blocks = pytest.importorskip("llamita.methods.blocks")
fakequant = pytest.importorskip("llamita.methods.fakequant")

TEXT = (Path(__file__).parents[1] / "src" / "llamita" / "embedded" / "heldout.txt").read_text("utf-8")


def tokens_of(source: Checkpoint, samples: int = 3, length: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, source.config.vocab_size, (samples, length)).astype(np.int32)


def setup_of(source: Checkpoint, **options: Any) -> Setup:
    return Setup(Calibration("random", "0" * 64, tokens_of(source, **options)))


@pytest.mark.parametrize("family", ["llama2", "llama31", "llama32", "tinyllama"])
def test_blocks_one_after_the_other_are_the_model_of_transformers(tmp_path: Path, family: str) -> None:
    source = Checkpoint(make_checkpoint(tmp_path, family, dtype="F32", attention_bias=True, mlp_bias=True))
    tokens = tokens_of(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model.model(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
        config = blocks.llama_config(source.config)
        rotary = blocks.rotary_tables(config, tokens.shape[1])
        states = blocks.embed(source, tokens, None)
        for index in range(source.config.layers):
            assert torch.equal(states, expected[index]) or torch.allclose(
                states, expected[index], atol=1e-5, rtol=1e-5
            )
            states = blocks.Block(source, config, index, rotary)(states)
        final = model.model.norm(states)
    torch.testing.assert_close(final, expected[-1], atol=1e-5, rtol=1e-4)


def test_activations_have_the_codes_of_the_specification() -> None:
    x = np.random.default_rng(0).normal(0, 3, (50, 96)).astype(np.float32)
    x[0], x[1], x[2] = 0, np.abs(x[1]), -np.abs(x[2])
    codes, scales, zero_points = quantize_activations(x)
    found = fakequant.activation_codes(torch.from_numpy(x))
    np.testing.assert_array_equal(found[0].numpy(), codes)
    np.testing.assert_array_equal(found[1].numpy()[:, 0], scales)
    np.testing.assert_array_equal(found[2].numpy()[:, 0], zero_points)
    np.testing.assert_array_equal(
        fakequant.quantize_activations(torch.from_numpy(x)).numpy(), dequantize(codes, scales, zero_points)
    )


def test_gradients_pass_through_the_rounding_of_activations() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (fakequant.quantize_activations(x) * torch.arange(8.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(8.0).expand(3, 8))


@pytest.mark.parametrize("method", ["gptq", "qronos"])
def test_a_chain_from_end_to_end(tmp_path: Path, method: str) -> None:
    make_checkpoint(tmp_path / "src")
    (tmp_path / "text").write_text(TEXT[:4000])
    out = tmp_path / "out"
    options = ("--calibration", tmp_path / "text", "--samples", "4", "--length", "64", "--json")
    assert run("quantize", tmp_path / "src", "-o", out, "--method", method, *options) == 0
    assert verify(out).problems == []
    metadata = json.loads((out / "llamita.json").read_text())
    assert metadata["method"] == method
    assert metadata["calibration"]["samples"] == 4
    assert metadata["seed"] == 0
    source, packed = Checkpoint(tmp_path / "src"), PackedModel(out)
    tokenizer = llamita.load(tmp_path / "src").tokenizer
    calibration = load_calibration(str(tmp_path / "text"), source, tokenizer, 4, 64, 0)
    rounded = RoundedSource(source, make_scheme("llamita"), method, Setup(calibration))
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        found, expected = packed.weight(name), rounded.weight(name)
        np.testing.assert_array_equal(found.packed, expected.packed)  # type: ignore[union-attr]
        np.testing.assert_array_equal(found.scales, expected.scales)  # type: ignore[union-attr]
    assert_nothing_is_left(tmp_path, "src", "text", "out")


def test_the_rounded_stream_is_what_the_engine_computes() -> None:
    """Last hidden states of the quantized blocks, through norm and head, against the engine's logits."""
    source, scheme = Checkpoint(resolve("embedded")), make_scheme("llama3.2")
    llm = llamita.load("embedded", preset=scheme, kv_dtype="f32")
    tokens = np.array(llm.tokenizer.encode(TEXT)[:128], np.int32)
    rounded = RoundedSource(source, scheme)
    config = blocks.llama_config(source.config)
    rotary = blocks.rotary_tables(config, len(tokens))
    states = blocks.embed(source, tokens[None], scheme)
    with torch.no_grad():
        for index in range(source.config.layers):
            block = blocks.Block(source, config, index, rotary, fakequant.quantize_activations)
            for name in block.linears:
                weight: Any = rounded.weight(f"{block.name}.{name}")
                codes = llamita.packing.unpack_int4(weight.packed)
                block.set_weight(name, torch.from_numpy(dequantize(codes, weight.scales)))
            states = block(states)
        table: Any = rounded.weight("model.embed_tokens")
        gamma = torch.from_numpy(source.vector("model.norm.weight"))
        normed = gamma * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + source.config.norm_eps)
        head = torch.from_numpy(dequantize(table.codes, table.scales))
        logits = (fakequant.quantize_activations(normed) @ head.T)[0].numpy()
    ours = llm.logits(tokens)
    assert np.abs(ours - logits).mean() < 0.02 * np.abs(logits).mean()
    assert (ours.argmax(axis=1) == logits.argmax(axis=1)).mean() > 0.95


# ---- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rtn", "rtn"),
        ("tune", "tune"),
        ("rtn+tune", "tune"),
        ("spinquant", "spinquant"),
        ("equalize + spinquant+qronos+tune", "equalize+spinquant+qronos+tune"),
    ],
)
def test_chains_are_read(text: str, names: str) -> None:
    assert str(parse_chain(text)) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of rtn"),
        ("gptq+magic", "got 'magic'"),
        ("gptq+qronos", "at most one of rtn, gptq, qronos"),
        ("tune+tune", "at most one of tune"),
        ("tune+gptq", "try gptq\\+tune"),
        ("gptq+equalize", "try equalize\\+gptq"),
    ],
)
def test_chains_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"--method: .*{message}"):
        parse_chain(text)


def test_calibration_that_cannot_be_had(tmp_path: Path, capsys: Any) -> None:
    make_checkpoint(tmp_path / "src")
    (tmp_path / "text").write_text("too short")
    common = ("quantize", tmp_path / "src", "-o", tmp_path / "out", "--method", "gptq")
    for options, message in (
        (("--calibration", tmp_path / "none"), "found none"),
        (("--calibration", tmp_path / "text"), "expected 128 samples"),
        (("--length", "100000"), "--length: expected at most"),
    ):
        assert run(*common, *options) == 2
        assert message in one_line(capsys)
        assert_nothing_is_left(tmp_path, "src", "text")
