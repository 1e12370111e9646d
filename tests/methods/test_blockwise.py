"""Blocks in steps against transformers' own model, and chains of methods from end to end."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import assert_nothing_is_left, one_line, run
from places import HELD_OUT
from tiny import make_checkpoint

import llamita
import llamita.numerics.packing
from llamita import _native
from llamita.errors import InputError, RunError
from llamita.imports.open import resolve
from llamita.methods.chain import parse_chain, rounder
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import keep_float
from llamita.models.names import HEAD
from llamita.models.packed import PackedModel
from llamita.models.verify import verify
from llamita.numerics.affine import dequantize, quantize_activations, to_f32
from llamita.numerics.hadamard import fast_hadamard
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import make_scheme
from llamita.quantize.calibration import load_calibration
from llamita.quantize.pipeline import quantize
from llamita.quantize.rounded import RoundedSource
from llamita.system.kept_work import kept_work

torch = pytest.importorskip("torch", reason="calibrated methods are on the Torch side")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
blocks = pytest.importorskip("llamita.methods.blocks")
calibrated = pytest.importorskip("llamita.methods.blockwise")
fakequant = pytest.importorskip("llamita.methods.activations")
layerwise = pytest.importorskip("layerwise")

TEXT = HELD_OUT.read_text("utf-8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than they work on models this small."""
    before = _native.threads()
    _native.set_threads(1)
    torch.set_num_threads(1)
    yield
    _native.set_threads(before)


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
        rotary = blocks.rotary_tables(source.config, tokens.shape[1])
        states = blocks.embed(source, tokens, None)
        for index in range(source.config.layers):
            assert torch.equal(states, expected[index]) or torch.allclose(states, expected[index], atol=1e-5, rtol=1e-5)
            states = blocks.Block(source, index, rotary)(states)
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
    options = ("--calibration", tmp_path / "text", "--samples", "4", "--length", "64", "--threads", "1", "--json")
    assert run("quantize", tmp_path / "src", "-o", out, "--method", method, *options) == 0
    assert verify(out).problems == []
    metadata = json.loads((out / "llamita.json").read_text())
    assert metadata["method"] == method
    assert metadata["calibration"]["samples"] == 4
    assert metadata["seed"] == 0
    source, packed = Checkpoint(tmp_path / "src"), PackedModel(out)
    calibration = load_calibration(str(tmp_path / "text"), source, 4, 64, 0)
    rounded = RoundedSource(source, make_scheme("llamita"), method, Setup(calibration))
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        found, expected = packed.weight(name), rounded.weight(name)
        np.testing.assert_array_equal(found.packed, expected.packed)  # type: ignore[union-attr]
        np.testing.assert_array_equal(found.scales, expected.scales)  # type: ignore[union-attr]
    assert_nothing_is_left(tmp_path, "src", "text", "out")


@pytest.mark.parametrize("kept", [(), ("*.v_proj", "*.down_proj", "model.layers.3.*")])
def test_the_rounded_stream_is_what_the_engine_computes(kept: tuple[str, ...]) -> None:
    """Activations of the quantized blocks, in front of every layer and the head, against the engine's."""
    source = Checkpoint(resolve("embedded"))
    scheme = keep_float(source.config, make_scheme("llama3.2"), kept)
    llm = llamita.load("embedded", preset=scheme, kv_dtype="f32")
    tokens = np.array(llm.tokenizer.encode(TEXT)[:128], np.int32)
    rounded, passed = RoundedSource(source, scheme), layerwise.watch(llm, tokens)
    guide = layerwise.Guide(rounded, passed)
    rotary = blocks.rotary_tables(source.config, len(tokens))
    states = blocks.embed(source, tokens[None], scheme)
    with torch.no_grad():
        for index in range(source.config.layers):
            states = guided_block(guide, source, rounded, index, rotary)(states)
        head = torch.from_numpy(layerwise.values_of(rounded.weight("model.embed_tokens"))).float()
        gamma = torch.from_numpy(source.vector("model.norm.weight"))
        normed = gamma * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + source.config.norm_eps)
        guide.write(HEAD, fakequant.quantize_activations(guide.read(HEAD, normed)) @ head.T)
    guide.finish()


def guided_block(guide: Any, source: Checkpoint, rounded: RoundedSource, index: int, rotary: Any) -> Any:
    """A block with the codes of `rounded`, whose layers read what the engine's read."""
    name = f"model.layers.{index}"
    floats = [n for n in rounded.config.linear_shapes() if not rounded.scheme.kind(f"{name}.{n}").bits]
    # A step's input is rounded once, for the first of its layers; not at all for a float o_proj or down_proj.
    read = iter([step[0] for step in blocks.STEPS if len(step) > 1 or step[0] not in floats])

    def activations(x: Any) -> Any:
        return fakequant.quantize_activations(guide.read(f"{name}.{next(read)}", x))

    def attach(linear: Any, full: str, is_float: bool) -> None:
        if is_float:
            linear.register_forward_pre_hook(lambda _module, given: (guide.read(full, given[0]),))
        linear.register_forward_hook(lambda _module, _given, out: guide.write(full, out))

    block = blocks.Block(source, index, rotary, activations, floats=floats)
    for own, linear in block.linears.items():
        block.set_weight(own, torch.from_numpy(layerwise.values_of(rounded.weight(f"{name}.{own}"))).float())
        attach(linear, f"{name}.{own}", own in floats)
    return block


def test_float_layers_read_what_was_not_rounded() -> None:
    """As in the engine: each by itself gives the float block's output of that layer."""
    source = Checkpoint(resolve("embedded"))
    rotary = blocks.rotary_tables(source.config, 8)
    states = torch.randn(1, 8, source.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def seen(name: str, floats: tuple[str, ...], rounds: Any) -> Any:
        block, found = blocks.Block(source, 0, rotary, rounds, floats=floats), []
        block.linears[name].register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].clone()))
        block(states)
        return found[0]

    exact, rounds = seen("self_attn.q_proj", (), None), fakequant.quantize_activations
    assert torch.equal(seen("self_attn.q_proj", ("self_attn.q_proj",), rounds), exact)
    assert not torch.equal(seen("self_attn.k_proj", ("self_attn.q_proj",), rounds), exact)
    alone = tuple(name for step in blocks.STEPS for name in step if name != "mlp.down_proj")
    for name in ("self_attn.o_proj", "mlp.up_proj"):
        torch.testing.assert_close(seen(name, alone, rounds), seen(name, (), None), rtol=0, atol=0)


class Rotated:
    """A checkpoint whose down_proj expects rotated inputs: the same function with R4 at run time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.rotations = Rotations(("R4",), checkpoint.config.intermediate_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def weight(self, name: str) -> np.ndarray:
        weight = to_f32(self._checkpoint.weight(name))
        return fast_hadamard(weight) if name.endswith("down_proj") else weight


def test_runtime_rotations_are_part_of_both_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint(make_checkpoint(tmp_path))
    setup, kept = setup_of(source), []
    sources: list[Any] = [source, Rotated(source)]

    def keep(store: Any, index: int, after: dict[str, Any], layers: Any) -> None:
        kept.append(after)
        original(store, index, after, layers)

    original = calibrated.Store.keep
    monkeypatch.setattr(calibrated.Store, "keep", keep)
    for which in sources:
        rounder(which, make_scheme("llama3.2"), parse_chain("qronos"), setup)
    plain, rotated = kept[1], kept[3]
    torch.testing.assert_close(plain["float"], rotated["float"], atol=1e-4, rtol=1e-4)
    lost = (plain["quantized"] - plain["float"]).norm()
    assert (rotated["quantized"] - rotated["float"]).norm() < 2 * lost


# ---- killed and resumed ---------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal that no program can handle."""


@pytest.mark.parametrize(("method", "every"), [("gptq", 3), ("qronos", 4)])
@pytest.mark.parametrize("memory", [2**30, 1])
def test_a_run_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, every: int, memory: int
) -> None:
    """Cut off again and again; hidden states in RAM and in mapped files give the same bytes."""
    source = Checkpoint(make_checkpoint(tmp_path / "src", num_hidden_layers=3))
    setup, scheme = setup_of(source), make_scheme("llama3.2")
    quantize(source, "x", tmp_path / "whole", scheme, method, setup)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    setup, rename = replace(setup, memory=memory), Path.rename
    left, cuts = [0], 0

    def cut_off(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", cut_off)
    while not (tmp_path / "out").exists():
        left[0] = every
        try:
            quantize(source, "x", tmp_path / "out", scheme, method, setup)
        except Killed:
            cuts += 1
    assert cuts > 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert_nothing_is_left(tmp_path, "src", "whole", "out")


def killed_at_random(tmp_path: Path, kills: int) -> None:
    """Start a run again and again, each killed at some moment; what at last comes is as if unharmed."""
    source = Checkpoint(make_checkpoint(tmp_path / "src", num_hidden_layers=3))
    setup, scheme = setup_of(source), make_scheme("llama3.2")
    fork, rng, done = multiprocessing.get_context("fork"), np.random.default_rng(0), 0
    began = time.perf_counter()
    quantize(source, "x", tmp_path / "whole", scheme, "qronos", setup)
    seconds = time.perf_counter() - began
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    while done < kills:
        child = fork.Process(target=quantize, args=(source, "x", tmp_path / "out", scheme, "qronos", setup))
        child.start()
        child.join(rng.uniform(0, seconds))
        if child.is_alive():
            child.kill()
            done += 1
        child.join()
        if (tmp_path / "out").exists():
            assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
            shutil.rmtree(tmp_path / "out")
    quantize(source, "x", tmp_path / "out", scheme, "qronos", setup)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert_nothing_is_left(tmp_path, "src", "whole", "out")


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 4)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_goes_on(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 20)


def test_two_runs_to_one_place_keep_apart(tmp_path: Path) -> None:
    with kept_work(tmp_path / "out", {"a": 1}) as work:
        (work / "block-0000.npz").write_bytes(b"kept")
        with pytest.raises(RunError, match="expected no other run there"), kept_work(tmp_path / "out", {"a": 1}):
            pass
        assert (work / "block-0000.npz").exists()


def test_what_others_left_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "mine").write_text("precious")
    (tmp_path / ".link.work").symlink_to(tmp_path / ".out.work")
    (tmp_path / ".file.work").write_text("precious")
    for name in ("out", "link", "file"):
        with pytest.raises((InputError, RunError), match="try another --out"), kept_work(tmp_path / name, {}):
            pass
    assert (tmp_path / ".out.work" / "mine").read_text() == "precious"
    assert (tmp_path / ".file.work").read_text() == "precious"


def test_finished_blocks_are_not_rounded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the settings differ."""
    source = Checkpoint(make_checkpoint(tmp_path / "src"))
    setup, scheme = setup_of(source), make_scheme("llama3.2")
    done: list[int] = []

    def round_block(run: Any, index: int, *rest: Any) -> Any:
        if done == [0]:
            raise Killed
        done.append(index)
        return original(run, index, *rest)

    original = calibrated._round_block
    monkeypatch.setattr(calibrated, "_round_block", round_block)
    with pytest.raises(Killed):
        quantize(source, "x", tmp_path / "out", scheme, "gptq", setup)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".work")] == [".out.work"]
    done.append(-1)
    quantize(source, "x", tmp_path / "out", scheme, "gptq", setup)
    assert done == [0, -1, 1]
    done[:] = [0]
    with pytest.raises(Killed):
        quantize(source, "x", tmp_path / "other", scheme, "gptq", setup)
    assert_nothing_is_left(tmp_path, "src", "out")  # nothing was finished
    done.clear()
    with pytest.raises(Killed):
        quantize(source, "x", tmp_path / "other", scheme, "gptq", setup)
    done.append(-1)
    quantize(source, "x", tmp_path / "other", scheme, "gptq", replace(setup, settings={"gptq.damping": 0.1}))
    assert done == [0, -1, 0, 1]


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
        (("--calibration", tmp_path / "none"), "there is no such file"),
        (("--calibration", tmp_path / "text"), "tokens for 128 windows of 512, got 11"),
        (("--length", "100000"), "--length: expected at most"),
    ):
        assert run(*common, *options) == 2
        assert message in one_line(capsys)
        assert_nothing_is_left(tmp_path, "src", "text")
