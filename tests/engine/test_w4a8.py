"""W4A8 against a fake-quantized Torch model with the same codes.

Operation by operation on the engine's own inputs, where only the order of float sums differs; then end to
end, where one activation code that rounds the other way moves the logits, so that distributions compare.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distances import mean_kl
from tiny import make_checkpoint

import llamita
from llamita import _native
from llamita.engine import model as model_module
from llamita.engine.llm import LLM
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.numerics.affine import to_f32
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import make_scheme
from llamita.quantize.rounded import RoundedSource

torch = pytest.importorskip("torch", reason="the oracle is a fake-quantized Torch model")
transformers = pytest.importorskip("transformers", reason="the oracle is a fake-quantized Torch model")

TOLERANCE = 1e-5  # largest difference over largest output
TIE = 1e-5  # a code may be off by one for a value this near to a half, relatively
TEXT = "Once upon a time there was a little dog named Max. He loved to run in the park. " * 4


class Recorder:
    """Replaces `_native` in the forward pass: passes every call on and keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any], list[Any]]] = []  # name, arguments before and after

    def __getattr__(self, name: str) -> Any:
        function = getattr(_native, name)
        if isinstance(function, type):
            return function

        def call(*arguments: Any) -> Any:
            before = [snapshot(a) for a in arguments]
            result = function(*arguments)
            self.calls.append((name, before, [snapshot(a) for a in arguments]))
            return result

        return call


def snapshot(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.get() if isinstance(value, _native.Activations) and value.tokens else value


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "ops", recorder)
        yield recorder


def dequantized(weight: Int4Weight | Int8Weight | np.ndarray) -> np.ndarray:
    """float64 (rows, columns)."""
    if isinstance(weight, Int4Weight):
        codes = unpack_int4(weight.packed).astype(np.float64)
        return codes * np.repeat(to_f32(weight.scales).astype(np.float64), weight.group_size, axis=1)
    if isinstance(weight, Int8Weight):
        return weight.codes.astype(np.float64) * to_f32(weight.scales)[:, None]
    return to_f32(weight).astype(np.float64)


def rounded(path: Path | str, preset: str) -> RoundedSource:
    return RoundedSource(Checkpoint(resolve(path)), make_scheme(preset))


def matrices(llm: LLM, source: RoundedSource) -> dict[int, np.ndarray]:
    """Return the float64 values of every native weight, by identity."""
    weights, found = llm.model.weights, {}
    head = "model.embed_tokens" if llm.config.tied else "lm_head"
    found[id(weights.head.parts[0].weights)] = dequantized(source.weight(head))
    for i, block in enumerate(weights.blocks):
        for linear, names in [
            (block.qkv, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            (block.attention_out, ["self_attn.o_proj"]),
            (block.gate_up, ["mlp.gate_proj", "mlp.up_proj"]),
            (block.down, ["mlp.down_proj"]),
        ]:
            parts = [dequantized(source.weight(f"model.layers.{i}.{name}")) for name in names]
            found[id(linear.parts[0].weights)] = np.concatenate(parts)
    return found


def quantize_like_torchao(x: Any) -> tuple[Any, Any, Any]:
    """Return codes, scales and zero points per token, as torchao 0.18 computes them, in float32."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    codes = (torch.round(x * (1.0 / scale)) + zero).clamp(-128, 127)
    return codes, scale, zero


def check_codes(acts: tuple[np.ndarray, ...], x: Any) -> None:
    """Check that codes equal those of x (float64), but for values at a half of the scale, and that scales agree."""
    codes, scales, zeros = acts
    expected, scale, zero = (t.numpy() for t in quantize_like_torchao(x.float()))
    np.testing.assert_allclose(scales, scale[:, 0], rtol=TIE)
    np.testing.assert_array_equal(zeros, zero[:, 0])
    wrong = codes != expected
    assert np.abs(codes - expected).max() <= 1
    steps = x.numpy()[wrong] / np.broadcast_to(scale, wrong.shape)[wrong]
    assert (np.abs(np.abs(steps - np.floor(steps)) - 0.5) <= TIE * np.maximum(1, np.abs(steps))).all()
    assert wrong.mean() < 1e-3


def check_close(ours: np.ndarray, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def check_linear(before: list[Any], after: list[Any], values: dict[int, np.ndarray]) -> None:
    weights, acts, out, bias, accumulate = before
    codes, scales, zeros = acts
    x = (codes.astype(np.float64) - zeros[:, None]) * scales[:, None].astype(np.float64)
    y = x @ values[id(weights)].T + (0 if bias is None else bias)
    if weights.gated:
        return check_close(after[2], swiglu(y))
    check_close(after[2], y + out if accumulate else y)


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float) -> Any:
    wide = torch.from_numpy(x).double()
    return torch.from_numpy(gamma).double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def swiglu(gate_up: np.ndarray) -> Any:
    gate, up = torch.from_numpy(gate_up).double().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def check_attention(qkv: np.ndarray, out: np.ndarray, llm: LLM) -> None:
    """Rotate q and k of the projection's output and attend, for a sequence that starts here."""
    config = llm.config
    tokens, dim = len(qkv), config.head_dim
    heads = torch.from_numpy(qkv).double().view(1, tokens, -1, dim).transpose(1, 2)
    q, k, v = heads.split([config.heads, config.kv_heads, config.kv_heads], dim=1)
    llama = transformers.models.llama.modeling_llama
    hf_config = transformers.AutoConfig.from_pretrained(llm.path)
    cos, sin = llama.LlamaRotaryEmbedding(hf_config)(q, torch.arange(tokens)[None])
    q, k = llama.apply_rotary_pos_emb(q, k, cos, sin)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    check_close(out, attended.transpose(1, 2).reshape(tokens, -1))


@pytest.mark.parametrize(
    ("family", "preset", "overrides"),
    [
        ("llama32", "llama3.2", {}),
        ("llama31", "arm", {"attention_bias": True, "mlp_bias": True}),
        ("llama2", "llamita", {"intermediate_size": 352, "num_hidden_layers": 1}),
    ],
)
def test_every_operation_is_that_of_torch(
    family: str, preset: str, overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, family, **overrides)
    llm = llamita.load(tmp_path, scheme=preset, kv_dtype="f32")
    values = matrices(llm, rounded(tmp_path, preset))
    ids = np.random.default_rng(0).integers(0, 256, 150)
    cache = llm.new_sequence(len(ids) + 1)
    with recording(monkeypatch) as recorder:
        llm.model.step([(cache, ids)], rows=np.arange(len(ids)))
        llm.model.step([(cache, ids[:1])])
    seen, projected, rotated = set(), np.empty(0), False
    for name, before, after in recorder.calls:
        seen.add(name)
        if name == "rmsnorm_quantize":
            check_codes(after[3], rms_norm(*before[:3]))
        elif name == "rmsnorm":
            check_close(after[3], rms_norm(*before[:3]))
        elif name == "quantize":
            codes, scales, zeros = after[1]
            expected = quantize_like_torchao(torch.from_numpy(before[0]))
            for ours, theirs in zip((codes, scales[:, None], zeros[:, None]), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        elif name == "linear" and before[0].kind in ("w4", "w8"):
            check_linear(before, after, values)
        elif name == "rope_and_cache":
            projected, rotated = before[2], len(before[2]) == len(ids)
        elif name == "attention" and rotated:
            check_attention(projected, after[4], llm)
    assert seen >= {"embed", "rmsnorm_quantize", "quantize", "linear", "rope_and_cache", "attention"}


class FakeQuantized(torch.nn.Linear):
    """A linear layer whose input is rounded to int8 per token, and whose weights are those of the codes."""

    def forward(self, x: Any) -> Any:
        codes, scale, zero = quantize_like_torchao(x)
        return super().forward((codes - zero) * scale)


def fake_quantized(source: RoundedSource) -> Any:
    """Return transformers' Llama in float32 with the source's codes in every linear layer and table."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            is_head = name == "lm_head"
            weight = source.weight("model.embed_tokens" if is_head and source.config.tied else name)
            module.weight.data = torch.from_numpy(dequantized(weight)).float()
            if isinstance(module, torch.nn.Linear) and not isinstance(weight, np.ndarray):
                module.__class__ = FakeQuantized
    return model


@pytest.mark.parametrize("preset", ["llama3.2", "arm", "llamita"])
def test_end_to_end_the_distributions_agree(preset: str) -> None:
    llm = llamita.load("embedded", scheme=preset, kv_dtype="f32")
    ids = np.array(llm.tokenizer.encode(TEXT))
    theirs = torch_logits(fake_quantized(rounded("embedded", preset)), ids)
    ours, floats = llm.logits(ids), llamita.load("embedded").logits(ids)
    difference, own = mean_kl(theirs, ours), mean_kl(floats, theirs)
    assert difference <= 1e-3
    assert difference <= 0.05 * own


def torch_logits(model: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def test_arm_is_what_torchao_makes() -> None:
    """Compare with the whole other implementation: its codes, its scales, its fake quantization of activations."""
    quantization = pytest.importorskip("torchao.quantization", reason="the oracle is torchao")
    llm = llamita.load("embedded", scheme="arm", kv_dtype="f32")
    ids = np.array(llm.tokenizer.encode(TEXT))
    model = transformers.AutoModelForCausalLM.from_pretrained(llm.path, dtype=torch.float32)
    floats = torch_logits(model, ids)
    config = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(128)
    )
    is_block = lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"  # noqa: E731
    quantization.quantize_(model, config, is_block)
    theirs = torch_logits(model, ids)
    assert mean_kl(theirs, llm.logits(ids)) <= min(1e-3, 0.05 * mean_kl(floats, theirs))
