"""Import quantized models of other tools: the very codes and scales, or a refusal."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter, read_adapter_tensors
from command import one_line, run
from foreign_models import export, make_gguf_checkpoint, write_ranks
from packed_models import tensors_of
from tiny import llama3_rope, make_checkpoint

import llamita
from llamita.errors import InputError
from llamita.imports.codes import Coded, find_kinds, with_positive_scales
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.packed import PackedModel
from llamita.models.verify import verify
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
FORMATS = ["compressed-tensors", "torchao", "meta", "gguf"]


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama32", ()),
        ("llama2", ("--group-size", "64")),
        ("llama31", ("--preset", "arm", "--scales", "search")),
        ("llama3", ("--preset", "arm")),
    ],
    ids=["tied", "group-64", "float-tables", "float32-scales"],
)
def test_a_packed_model_comes_back_with_identical_tensors(
    tmp_path: Path, target: str, family: str, options: tuple[str, ...]
) -> None:
    scaled: dict[str, Any] = {"rope_scaling": llama3_rope(32.0)} if family in ("llama31", "llama32") else {}
    model = make_gguf_checkpoint(tmp_path, family, **scaled)
    if target == "gguf" and "arm" in options:
        pytest.skip("GGUF has scales in float16: rounded there, on request")
    assert run("quantize", model, "-o", tmp_path / "packed", *options) == 0
    source = export(tmp_path / "packed", target, tmp_path / "there")
    assert run("import", source, "-o", tmp_path / "back") == 0
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "packed")
    assert verify(tmp_path / "back").problems == []
    back, packed = PackedModel(tmp_path / "back"), PackedModel(tmp_path / "packed")
    assert back.config.tied == packed.config.tied
    assert back.scheme is not None
    assert packed.scheme is not None
    assert back.scheme.layers == packed.scheme.layers
    found, expected = (llamita.load(tmp_path / name).logits(IDS) for name in ("back", "packed"))
    np.testing.assert_array_equal(found, expected)


def test_mixed_kinds_come_back(tmp_path: Path) -> None:
    """Groups of several sizes, int8 and float layers; group sizes are found in the scales."""
    from llamita.models.layer_kinds import with_layers
    from llamita.numerics.scheme import make_scheme
    from llamita.quantize.pipeline import quantize

    model = make_checkpoint(tmp_path / "model", "llama3")
    kinds = {"model.layers.0.mlp.up_proj": "w4g128", "model.layers.1.self_attn.k_proj": "w8",
             "model.layers.0.self_attn.o_proj": "float", "lm_head": "w4g32"}  # fmt: skip
    scheme = with_layers(make_scheme("llama3.2"), kinds)
    quantize(Checkpoint(model), str(model), tmp_path / "packed", scheme)
    for target in ("compressed-tensors", "torchao"):
        source, back = export(tmp_path / "packed", target, tmp_path / target), tmp_path / f"{target}-back"
        assert run("import", source, "-o", back) == 0
        assert tensors_of(back) == tensors_of(tmp_path / "packed")


def test_what_was_imported_is_like_any_packed_model(tmp_path: Path, capsys: Any) -> None:
    model = make_gguf_checkpoint(tmp_path, "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source, back = export(tmp_path / "packed", "gguf", tmp_path / "there"), tmp_path / "back"
    capsys.readouterr()
    assert run("import", source, "-o", back, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["taken"]["activations"] == "int8 activations in blocks of 32"
    assert record["taken"]["scheme"]["scale_rule"] == "given"
    assert run("inspect", back) == 0
    assert "imported" in capsys.readouterr().out
    assert "unknown: the float model was not available" in (back / "README.md").read_text("utf-8")
    adapter = make_adapter(tmp_path / "adapter", model)
    assert run("merge", back, adapter, "-o", tmp_path / "merged") == 0
    merged = PackedModel(tmp_path / "merged").scheme
    assert merged is not None
    assert merged.scale_rule == "search"
    capsys.readouterr()
    assert run("quantize", back, "-o", tmp_path / "again") == 2
    assert "expected a float" in one_line(capsys)


def test_every_command_takes_it_and_says_that_it_was_converted(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_checkpoint(tmp_path / "model", "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source = export(tmp_path / "packed", "compressed-tensors", tmp_path / "there")
    capsys.readouterr()
    assert run("generate", source, "--prompt", "ab", "--max-tokens", "2") == 0
    assert f"{source}: converted; the result is kept in" in capsys.readouterr().err
    first = resolve(source)
    assert capsys.readouterr().err == ""  # the second time it is there
    config = source / "config.json"
    config.write_text(config.read_text() + "\n")
    second = resolve(source)
    assert second != first
    assert first.exists()  # someone may just be opening it
    os.utime(first, (1, 1))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    third = resolve(source)
    assert (third / "chat_template.jinja").exists()  # what lies beside the weights counts, too
    assert not first.exists()  # made long ago, of another source
    assert second.exists()


def test_a_tensor_below_a_vector_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Its module would have the name of the missing vector."""
    model = make_checkpoint(tmp_path / "model", "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source = export(tmp_path / "packed", "compressed-tensors", tmp_path / "there")
    (path,) = source.glob("*.safetensors")
    data = path.read_bytes()
    name = b'"model.norm.weight":'
    size = int.from_bytes(data[:8], "little") + len(b".scale")
    header = data[8:].replace(name, name[:-2] + b'.scale":', 1)
    path.write_bytes(size.to_bytes(8, "little") + header)
    capsys.readouterr()
    assert run("import", source, "-o", tmp_path / "back") == 2
    assert "model.norm.weight: unexpected" in one_line(capsys)


def test_loading_a_gguf_prints_nothing_and_reports_progress(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Library code never prints; without Torch, as GGUF is read and written on the lean side."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_gguf_checkpoint(tmp_path, "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    reports: list[tuple[str, int, int]] = []
    capfd.readouterr()
    llm = llamita.load(tmp_path / "out" / "model.gguf", progress=lambda *report: reports.append(report))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert reports[0][0].startswith("looking at model.embed_tokens")
    assert any(what.startswith("writing model.layers.1.") for what, _, _ in reports)
    assert all(0 <= done <= total for _, done, total in reports)
    np.testing.assert_array_equal(llm.logits(IDS), llamita.load(tmp_path / "packed").logits(IDS))


# ---- Meta's quantized releases -------------------------------------------------------------------


def test_metas_spinquant_release(tmp_path: Path) -> None:
    """R4 at run time, tables apart, tokenizer.model: logits of the model that it was made of."""
    model = make_checkpoint(tmp_path / "model", "llama3", vocab_size=514)
    packed = tmp_path / "packed"
    options = ("--method", "spinquant", "--set", "spinquant.rotations=R4", "--preset", "llama3.2")
    assert run("quantize", model, "-o", packed, *options) == 0
    source = export(packed, "meta", tmp_path / "there")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    write_ranks(source)
    assert run("import", source, "-o", tmp_path / "back") == 0
    back = PackedModel(tmp_path / "back")
    assert back.rotations.names == ("R4",)
    assert tensors_of(tmp_path / "back") == tensors_of(packed)
    found, expected = (llamita.load(one).logits(IDS) for one in (tmp_path / "back", packed))
    np.testing.assert_array_equal(found, expected)
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**params, "quantization_args": {"scheme": "int2"}}))
    assert run("import", source, "-o", tmp_path / "other") == 2


def test_adapters_of_the_float_model_do_not_fit_a_rotated_release(tmp_path: Path, capsys: Any) -> None:
    """R1 and R2 are in its weights, and nothing but `spinquant` says so."""
    model = make_checkpoint(tmp_path / "model", "llama3")
    adapter = make_adapter(tmp_path / "adapter", model)
    options = ("--method", "spinquant", "--set", "spinquant.steps=0")
    assert run("quantize", model, "-o", tmp_path / "packed", *options) == 0
    source = export(tmp_path / "packed", "meta", tmp_path / "there")
    assert run("import", source, "-o", tmp_path / "back") == 0
    capsys.readouterr()
    for base in ("packed", "back"):
        assert run("generate", tmp_path / base, "--adapter", adapter, "--prompt", "a") == 2
        assert "got one changed by R1 and R2" in one_line(capsys)
    changed_params(source, lora_args={"rank": 4, "scale": 2.0})
    assert run("import", source, "-o", tmp_path / "other") == 2
    assert "lora_args: expected adapters among the weights" in one_line(capsys)
    changed_params(source, lora_args=None)
    assert run("import", source, "-o", tmp_path / "other") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.attention.q_norm.weight": (128,)}, "'layers.0.attention.q_norm.weight': expected a Llama's"),
        ({"output.adaptor.A.weight": (4, 9), "output.adaptor.B.weight": (9, 4)}, "'output.adaptor.A.weight'"),
        ({"layers.0.attention.wq.adaptor.B.weight": (128, 4)}, "'layers.0.attention.wq.adaptor.B.weight'"),
        ({"layers.0.attention.wq.weight": (128, 128)}, "'layers.0.attention.wq.scales'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_tensor_of_a_release_is_left_out(
    tmp_path: Path, capsys: Any, changes: dict[str, tuple[int, ...]], message: str
) -> None:
    torch = pytest.importorskip("torch", reason="Meta's files are read by torch.load")
    model = make_checkpoint(tmp_path / "model", "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source = export(tmp_path / "packed", "meta", tmp_path / "there")
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    state |= {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in changes.items()}
    torch.save(state, source / "consolidated.00.pth")
    capsys.readouterr()
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert message in one_line(capsys)


def changed_params(source: Path, **changes: Any) -> None:
    """params.json with other values."""
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps(params | changes))


def test_metas_qlora_release(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters become a directory of their own, and are never left out in silence."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_checkpoint(tmp_path / "model", "llama3")
    adapter = make_adapter(tmp_path / "adapter", model, rank=8)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source = export(tmp_path / "packed", "meta", tmp_path / "there", "--adapter", adapter)
    capsys.readouterr()
    assert run("generate", source, "--prompt", "a") == 2
    assert "try llamita import" in one_line(capsys)
    assert run("import", source, "-o", tmp_path / "back") == 0
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "packed")
    assert "Its adapters are in a directory of their own" in (tmp_path / "back" / "README.md").read_text("utf-8")
    beside = tmp_path / "back-adapter"
    found, given = (read_adapter_tensors(one) for one in (beside, adapter))
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in given.items()}
    engines = [llamita.load(base, adapters={"a": one})
               for base, one in ((tmp_path / "back", beside), (tmp_path / "packed", adapter))]  # fmt: skip
    first, second = (one.logits(IDS, adapter="a") for one in engines)
    np.testing.assert_array_equal(first, second)
    assert run("generate", tmp_path / "back", "--adapter", beside, "--prompt", "a", "--max-tokens", "2") == 0
    params = json.loads((source / "params.json").read_text())
    params.pop("lora_args")
    (source / "params.json").write_text(json.dumps(params))
    capsys.readouterr()
    assert run("import", source, "-o", tmp_path / "other") == 2
    assert "lora_args: expected rank and scale" in one_line(capsys)
    assert not (tmp_path / "other-adapter").exists()


def test_adapters_that_are_there_are_not_replaced(tmp_path: Path, capsys: Any) -> None:
    """OUT-adapter was not named by the user, and may be what finetune has left."""
    model = make_checkpoint(tmp_path / "model", "llama3")
    adapter = make_adapter(tmp_path / "adapter", model)
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    source = export(tmp_path / "packed", "meta", tmp_path / "there", "--adapter", adapter)
    (tmp_path / "out-adapter").mkdir()
    (tmp_path / "out-adapter" / "llamita_training.json").write_text("{}")
    capsys.readouterr()
    assert run("import", source, "-o", tmp_path / "out", "--overwrite") == 2
    assert "out-adapter, the place of this release's adapters, holds something else" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out-adapter" / "llamita_training.json").unlink()
    (tmp_path / "out-adapter").rmdir()
    for options in ((), ("--overwrite",)):
        assert run("import", source, "-o", tmp_path / "out", *options) == 0
        assert (tmp_path / "out-adapter" / "adapter_config.json").exists()


# ---- values --------------------------------------------------------------------------------------


def test_scales_become_positive_without_changing_a_weight() -> None:
    codes = np.array([[3, -7, 0, 0, 5, 5, 1, 2]], np.int8)
    scales = np.array([[-0.5, 0.25, 0.0, 2.0]], np.float32)
    changed, count = with_positive_scales("x", Coded(codes, scales, 4))
    assert changed is not None
    assert count == 2
    np.testing.assert_array_equal(changed.floats(), Coded(codes, scales, 4).floats())
    assert (changed.scales > 0).all()
    lowest = Coded(np.array([[-8, 1]], np.int8), np.array([[-1.0]], np.float32), 4)
    assert with_positive_scales("x", lowest) == (None, 0)  # 8 is no int4
    assert find_kinds("x", lowest).kinds == ("float",)
    zeros = Coded(np.zeros((2, 64), np.int8), np.full((2, 2), 1e-40, np.float32), 4)
    found, count = with_positive_scales("x", zeros)
    assert found is not None
    assert count == 4
    np.testing.assert_array_equal(found.scales, np.ones((2, 2)))


def test_groups_are_the_largest_that_scales_allow() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (4, 512)).astype(np.int8)
    for group_size in (32, 64, 128, 256):
        scales = bf16_to_f32(f32_to_bf16(random.uniform(0.5, 2, (4, 512 // group_size)).astype(np.float32)))
        blocks = np.repeat(scales, group_size // 32, axis=1)
        found = find_kinds("model.layers.0.mlp.up_proj", Coded(codes, blocks, 4))
        assert found.kinds[-1] == f"w4g{group_size}"
        assert found.on_bf16
        assert not found.is_uniform
    channel = find_kinds("model.layers.0.mlp.up_proj", Coded(codes, scales[:, :1], 4))
    assert channel.kinds[-1] == "w4g256"
    with pytest.raises(InputError, match="expected scales for groups of 32"):
        find_kinds("x", Coded(codes, random.uniform(0.5, 2, (4, 32)).astype(np.float32), 4))
