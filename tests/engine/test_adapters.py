"""Adapters in the engine: PEFT's arithmetic, several at once, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import LINEARS, PROMPT, make_adapter, read_adapter_tensors, replace_adapter_tensors
from command import one_line, run
from tiny import make_checkpoint

import llamita
from llamita import _native as ops
from llamita.engine.adapters import FUSED, prepare_adapter
from llamita.engine.requests import Generation
from llamita.errors import InputError
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.peft import read_adapter
from llamita.numerics.affine import bf16_to_f32
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny float checkpoint."""
    return make_checkpoint(tmp_path / "model")


def test_a_layers_part_is_that_of_its_formula(model: Path, tmp_path: Path, isa: str) -> None:
    """y += s·B·(A·x) to 1e-5, in every layer, for one token and for many."""
    del isa
    config = Checkpoint(model).config
    path = make_adapter(tmp_path / "a", model)
    adapter = prepare_adapter("a", read_adapter(path, config), config)
    stored = {name: bf16_to_f32(v).astype(np.float64) for name, v in read_adapter_tensors(path).items()}
    random = np.random.default_rng(1)
    for fused, names in FUSED.items():
        shapes = [config.linear_shapes()[name] for name in names]
        for tokens in (1, 7):
            x = random.standard_normal((tokens, shapes[0][1])).astype(np.float32)
            out = random.standard_normal((tokens, sum(rows for rows, _ in shapes))).astype(np.float32)
            expected = out.astype(np.float64)
            prefix = "base_model.model.model.layers.1."
            parts = [
                2.0 * x.astype(np.float64) @ stored[f"{prefix}{name}.lora_A.weight"].T
                @ stored[f"{prefix}{name}.lora_B.weight"].T
                for name in names
            ]  # fmt: skip
            expected += np.concatenate(parts, 1)
            ops.low_rank(adapter.blocks[1][fused], x, out)
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_every_instruction_set_gives_the_same_bits(model: Path, tmp_path: Path) -> None:
    adapter = prepare_adapter(
        "a",
        read_adapter(make_adapter(tmp_path / "a", model, rank=5), Checkpoint(model).config),
        Checkpoint(model).config,
    )
    random = np.random.default_rng(0)
    before = ops.isa()
    for fused, low_rank in adapter.blocks[0].items():
        outputs = {"qkv": 256, "attention_out": 128, "gate_up": 512, "down": 128}[fused]
        for tokens in (1, 3, 4, 9):
            x = random.standard_normal((tokens, 256 if fused == "down" else 128)).astype(np.float32)
            start = random.standard_normal((tokens, outputs)).astype(np.float32)
            found = {}
            try:
                for name in ops.available_isas():
                    ops.set_isa(name)
                    found[name] = start.copy()
                    ops.low_rank(low_rank, x, found[name])
            finally:
                ops.set_isa(before)
            for name, values in found.items():
                np.testing.assert_array_equal(values, found["scalar"], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [1, 15, 17, 48])
def test_outputs_beside_an_adapters_stay_as_they_are(dtype: type, rows: int) -> None:
    random = np.random.default_rng(0)
    down, up = random.standard_normal((3, 24)).astype(dtype), random.standard_normal((rows, 3)).astype(dtype)
    padded = np.zeros((-(-rows // 16) * 16, 3), dtype)
    padded[:rows] = up
    panels = np.ascontiguousarray(padded.reshape(-1, 16, 3).transpose(0, 2, 1))
    low_rank = ops.LowRank([down], [(panels, 2, rows)], rows + 5, 0.5)
    x = random.standard_normal((2, 24)).astype(np.float32)
    out = np.full((2, rows + 5), 7.0, np.float32)
    ops.low_rank(low_rank, x, out)
    added = 0.5 * x.astype(np.float64) @ down.astype(np.float64).T @ up.astype(np.float64).T
    np.testing.assert_allclose(out[:, 2 : 2 + rows], 7.0 + added, rtol=1e-5, atol=1e-5)
    assert (out[:, :2] == 7.0).all()
    assert (out[:, 2 + rows :] == 7.0).all()


PATTERNS = {"rank_pattern": {"v_proj": 8, "down_proj": 2}, "alpha_pattern": {"up_proj": 3, ".*1.self_attn.q_proj": 1}}


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (LINEARS, {}),
        (["self_attn.v_proj", "mlp.up_proj"], {}),
        (LINEARS, PATTERNS),
        (LINEARS, {**PATTERNS, "use_rslora": True}),
    ],
)
def test_a_float_model_with_an_adapter_is_pefts(
    model: Path, tmp_path: Path, targets: list[str], settings: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = make_adapter(tmp_path / "a", model, targets=targets, **settings)
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([PROMPT])).logits[0].numpy()
    llm = llamita.load(model, adapters={"a": path})
    found = llm.logits(PROMPT, adapter="a")
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * scale
    plain = llamita.load(model).logits(PROMPT)
    assert np.abs(plain - expected).max() > 1e-2 * scale  # so the adapter does something
    assert np.abs(llm.logits(PROMPT) - plain).max() < 1e-5 * scale  # and nothing where it is not asked for


def test_sequences_of_several_adapters_share_steps(model: Path, tmp_path: Path) -> None:
    paths = {name: make_adapter(tmp_path / name, model, seed) for seed, name in enumerate(("a", "b"))}
    llm = llamita.load(model, scheme="llama3.2", adapters=paths)
    options: dict[str, Any] = {"max_tokens": 12, "greedy": True}
    alone = {name: llm.generate(PROMPT, adapter=name, **options).token_ids for name in (None, "a", "b")}
    assert len({tuple(ids) for ids in alone.values()}) == 3
    streams = {name: llm.stream(PROMPT, adapter=name, **options) for name in ("b", None, "a")}
    for name, stream in streams.items():
        *_, last = stream
        assert isinstance(last, Generation)
        assert last.token_ids == alone[name]


def test_kept_keys_and_values_are_an_adapters_own(model: Path, tmp_path: Path) -> None:
    llm = llamita.load(model, adapters={"a": make_adapter(tmp_path / "a", model)})
    options: dict[str, Any] = {"max_tokens": 4, "greedy": True, "speculate": 0}
    llm.generate(PROMPT, **options)
    first = llm.generate(PROMPT, adapter="a", **options)
    assert first.timings.reused_tokens == 0
    again = llm.generate(PROMPT, adapter="a", **options)
    assert again.timings.reused_tokens == len(PROMPT) - 1
    assert again.token_ids == first.token_ids
    assert llm.generate(PROMPT, **options).timings.reused_tokens == len(PROMPT) - 1


def test_adapters_read_the_inputs_before_r4(model: Path, tmp_path: Path) -> None:
    """R4 rotates the inputs of down_proj, but an adapter of the source must get them unrotated."""
    pytest.importorskip("torch")
    path = make_adapter(tmp_path / "a", model, targets=["mlp.down_proj"])
    out = tmp_path / "rotated"
    setup = Setup(settings={"spinquant.rotations": "R4"})
    quantize(Checkpoint(model), str(model), out, make_scheme("llama3.2"), "spinquant", setup)
    plain = llamita.load(model, adapters={"a": path})
    rotated = llamita.load(out, adapters={"a": path})
    moved = plain.logits(PROMPT, adapter="a") - plain.logits(PROMPT)
    found = rotated.logits(PROMPT, adapter="a") - rotated.logits(PROMPT)
    assert np.corrcoef(found.ravel(), moved.ravel())[0, 1] > 0.9  # rounding; turned, they are unrelated


def test_models_whose_channels_changed_are_refused(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    adapters = {"a": make_adapter(tmp_path / "a", model)}
    for method, named, whose in (("equalize", "equalize", ""), ("spinquant", "R1 and R2", "spinquant's ")):
        out = tmp_path / method
        settings = {} if method == "equalize" else {"spinquant.rotations": "R1,R2", "spinquant.steps": 0}
        quantize(Checkpoint(model), str(model), out, make_scheme("llama3.2"), method, Setup(settings=settings))
        with pytest.raises(InputError, match=f"changed by {named}; try quantizing without {whose}{named}$"):
            llamita.load(out, adapters=adapters)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora: expected False, got True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true, got 'pissa'"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number"),
        ({"r": 8}, r"expected floats \(8, 128\), got BF16 \(4, 128\)"),
        ({"r": 0}, "r: expected 1 to 4096, got 0"),
        ({"lora_alpha": "much"}, "lora_alpha: expected a number, got 'much'"),
    ],
)
def test_what_is_not_known_is_refused(model: Path, tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    path = make_adapter(tmp_path / "a", model, **settings)
    with pytest.raises(InputError, match=named):
        prepare_adapter("a", read_adapter(path, Checkpoint(model).config), Checkpoint(model).config)


def test_rank_stabilized_adapters_have_their_own_scaling(model: Path, tmp_path: Path) -> None:
    config = Checkpoint(model).config
    for use, expected in ((False, 2.0), (True, 4.0)):  # alpha 8 over 4, over √4
        path = make_adapter(tmp_path / str(use), model, use_rslora=use)
        assert prepare_adapter("a", read_adapter(path, config), config).blocks[0]["qkv"].scaling == expected


def test_broken_adapters_are_refused(model: Path, tmp_path: Path) -> None:
    config = Checkpoint(model).config
    path = make_adapter(tmp_path / "a", model)
    tensors = read_adapter_tensors(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed: dict[str, np.ndarray]) -> str:
        replace_adapter_tensors(path, changed)
        with pytest.raises(InputError) as caught:
            prepare_adapter("a", read_adapter(path, config), config)
        return str(caught.value)

    assert "q_proj: expected both lora_A and lora_B" in refused({n: t for n, t in tensors.items() if n != name})
    assert "expected adapters, got none" in refused({})
    assert "expected adapters of this model's linear layers" in refused({**tensors, "lm_head.weight": tensors[name]})
    assert "layers.9" in refused({**tensors, name.replace("layers.0", "layers.9"): tensors[name]})
    again = name.replace(".weight", ".default.weight")
    assert "once, got it twice" in refused({**tensors, again: tensors[name]})
    nan = tensors[name].copy()
    nan[0, 0] = 0x7FC0
    assert "lora_A" in refused({**tensors, name: nan})


def test_commands_take_an_adapter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_adapter(tmp_path / "a", model)
    texts = []
    for options in ((), ("--adapter", path)):
        command = ("generate", model, "--prompt", "hello", "--greedy", "--max-tokens", "8", "--json", *options)
        assert run(*command) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    expected = llamita.load(model, adapters={"x": path}).generate("hello", greedy=True, max_tokens=8, adapter="x")
    assert texts[1] == expected.text != texts[0]
    assert run("generate", model, "--prompt", "hello", "--adapter", tmp_path / "none") == 2
    assert (
        "none: expected a directory with adapter_config.json, as PEFT writes adapters, got no such directory"
        in one_line(capsys)
    )


def test_an_unknown_name_is_refused(model: Path, tmp_path: Path) -> None:
    llm = llamita.load(model, adapters={"a": make_adapter(tmp_path / "a", model)})
    with pytest.raises(InputError, match="adapter: expected one of a, got 'b'"):
        llm.generate(PROMPT, adapter="b")
    with pytest.raises(InputError, match="expected none, because the model was loaded without, got 'a'"):
        llamita.load(model).logits(PROMPT, adapter="a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"(a+)+$": 4}}, r"adapter_config.json: expected names, or expressions with at most 3 stars"),
        ({"rank_pattern": {".*.*.*.*q_proj": 4}}, "at most 3 stars"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected 1 to 4096, got 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: expected a number, got 'x'"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected a number"),
    ],
)
def test_patterns_that_cannot_be_are_refused(
    model: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = make_adapter(tmp_path / "a", model)
    values = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(values | settings))
    with pytest.raises(InputError, match=message):
        llamita.load(model, adapters={"a": path})
