"""Packed models as checkpoints of other libraries, opened by these."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter, read_adapter_tensors, replace_adapter_tensors
from command import one_line, run
from packed_models import pack_by_command
from tiny import llama3_rope

import llamita
from llamita.models.checkpoint import Checkpoint
from llamita.models.foreign_names import pair_order
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight
from llamita.numerics.affine import dequantize, to_f32
from llamita.numerics.packing import unpack_int4

torch = pytest.importorskip("torch", reason="these formats are read on the Torch side")
pytest.importorskip("transformers", reason="these formats are read by transformers")
pytest.importorskip("compressed_tensors", reason="these formats are read by compressed-tensors")

from layerwise import guided, linear_modules, values_of, watch  # noqa: E402

from llamita.train.load import load_float  # noqa: E402
from llamita.train.prepare import prepare  # noqa: E402

SCALED = {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}  # fmt: skip
METAS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
FORMATS = [("hf",), ("torchao",), ("compressed-tensors",), ("compressed-tensors", "--flavor", "vllm-cpu"),
         ("compressed-tensors", "--flavor", "vllm-gpu")]  # fmt: skip


@pytest.mark.parametrize("family", ["llama2", "llama32"])
@pytest.mark.parametrize("target", FORMATS, ids=" ".join)
def test_transformers_opens_it_with_the_same_weights(
    tmp_path: Path, capsys: Any, target: tuple[str, ...], family: str
) -> None:
    packed = pack_by_command(tmp_path, family)
    capsys.readouterr()
    assert run("export", packed, "--to", *target, "-o", tmp_path / "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    proof = record["proof"]
    assert proof["holds"] is True
    assert proof["equal_layers"] == proof["layers"] >= 15
    unties = target in (("torchao",), ("compressed-tensors",)) and family == "llama32"
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["model_type"] == "llama"
    assert bool(record.get("untied_bytes")) == unties
    assert config["tie_word_embeddings"] == (family == "llama32" and not unties)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_float_embedding_beside_an_int8_head(tmp_path: Path, capsys: Any) -> None:
    packed = pack_by_command(tmp_path, "llama3", "--keep-float", "model.embed_tokens")
    capsys.readouterr()
    assert run("export", packed, "--to", "compressed-tensors", "-o", tmp_path / "out", "--json") == 0
    proof = json.loads(capsys.readouterr().out)["proof"]
    assert proof["equal_layers"] == proof["layers"] == 16


def test_logits_are_those_of_our_layers(tmp_path: Path) -> None:
    """compressed-tensors in transformers, and the fake-quantized layers that training has."""
    transformers = pytest.importorskip("transformers")
    path = pack_by_command(tmp_path)
    assert run("export", path, "--to", "compressed-tensors", "-o", tmp_path / "out") == 0
    packed, passed = PackedModel(path), watch(llamita.load(path, kv_dtype="f32"), IDS)
    fake_quantized = load_float(Checkpoint(tmp_path / "model"))
    prepare(fake_quantized, packed)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for model in (fake_quantized, exported):
        with guided(linear_modules(model, packed), packed, passed):
            model.eval()(torch.tensor([IDS]))


@pytest.mark.parametrize("family", ["llama2", "llama31", "llama32"])
def test_metas_format_has_the_codes_in_its_order(tmp_path: Path, family: str) -> None:
    scaled: dict[str, Any] = {} if family == "llama2" else {"rope_scaling": llama3_rope(32.0)}
    packed = PackedModel(pack_by_command(tmp_path, family, **scaled))
    assert run("export", packed.path, "--to", "meta", "-o", tmp_path / "out") == 0
    state = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "out" / "params.json").read_text("utf-8"))
    names = {"wq": "q_proj", "wv": "v_proj"}
    for theirs, ours in names.items():
        weight = packed.weight(f"model.layers.1.self_attn.{ours}")
        assert isinstance(weight, Int4Weight)
        codes = unpack_int4(weight.packed)
        order = pair_order(len(codes), packed.config.heads) if ours == "q_proj" else np.arange(len(codes))
        found = state[f"layers.1.attention.{theirs}.weight"]
        assert found.dtype == torch.int8
        np.testing.assert_array_equal(found.numpy(), codes[order])
        scales = state[f"layers.1.attention.{theirs}.scales"]
        assert scales.dtype == torch.float32
        np.testing.assert_array_equal(scales.numpy(), to_f32(weight.scales)[order])
    table = packed.weight("model.embed_tokens")
    np.testing.assert_array_equal(
        dequantize(state["tok_embeddings.weight"].numpy(), state["tok_embeddings.scales"].numpy()),
        dequantize(table.codes, table.scales),  # type: ignore[union-attr]
    )
    assert "output.weight" in state
    hidden = int(params["ffn_dim_multiplier"] * int(2 * 4 * params["dim"] / 3))  # as Meta's code has it
    multiple = params["multiple_of"]
    assert multiple * -(-hidden // multiple) == packed.config.intermediate_size
    assert params["use_scaled_rope"] == (packed.config.rope.kind == "llama3")
    if packed.config.rope.kind == "llama3":
        assert params["rope_scale_factor"] == packed.config.rope.factor
    assert params["quantization_args"] == {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}


def test_executorchs_own_model_computes_with_metas_format(tmp_path: Path) -> None:
    """Its transforms for Meta's releases take keys, shapes and types, and the logits are the engine's."""
    pytest.importorskip("executorch", reason="its model of Llama")
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs
    from executorch.examples.models.llama.source_transformation import pre_quantization as transforms

    packed = pack_by_command(tmp_path, "llama31", rope_scaling=llama3_rope(32.0))
    assert run("export", packed, "--to", "meta", "-o", tmp_path / "out") == 0
    state = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "out" / "params.json").read_text("utf-8"))
    group_size = params.pop("quantization_args")["group_size"]
    arguments = ModelArgs(**params, use_kv_cache=False, generate_full_logits=True, max_seq_len=64, max_context_len=64)
    model = construct_transformer(arguments)
    model = transforms.transform_output_linear_for_pre_quantization(model, state, dtype=torch.float32)
    model = transforms.transform_linear_for_pre_quantization(model, state, group_size, torch.float32)
    model = transforms.transform_embedding_for_pre_quantization(
        model, state, dtype=torch.float32, bit_width=8, group_size=None
    )
    lacks = model.load_state_dict(state, strict=False)
    assert not lacks.unexpected_keys
    assert all("zeros" in key for key in lacks.missing_keys)
    source, passed = PackedModel(packed), watch(llamita.load(packed, kv_dtype="f32"), IDS)
    model_: Any = model  # typed as a plain module
    modules, orders = {HEAD: model_.output}, {}
    for i, layer in enumerate(model_.layers):
        modules |= {f"model.layers.{i}.{ours}": layer.get_submodule(theirs) for ours, theirs in METAS.items()}
        for name, heads in (("q_proj", source.config.heads), ("k_proj", source.config.kv_heads)):
            orders[f"model.layers.{i}.self_attn.{name}"] = pair_order(heads * source.config.head_dim, heads)
    rows = torch.from_numpy(values_of(source.weight(EMBEDDING))[IDS]).float()

    def in_float32(_module: Any, _given: Any, found: Any) -> Any:
        """Its embedding multiplies rows out in float16, which has 11 bits."""
        assert ((found[0] - rows).abs() <= 2.0**-11 * rows.abs()).all()
        return rows[None]

    model_.tok_embeddings.register_forward_hook(in_float32)
    with guided(modules, source, passed, orders):
        model(torch.tensor([IDS]))


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, capsys: Any) -> None:
    r4 = pack_by_command(tmp_path, "llama32", "--method", "spinquant", "--set", "spinquant.rotations=R4")
    biased = pack_by_command(tmp_path / "other", "llama3", attention_bias=True)
    capsys.readouterr()
    for source, target, message in (
        (r4, ("hf",), "--to hf: expected a model that needs no rotation at run time, got R4"),
        (r4, ("torchao",), "try quantize --no-runtime-rotation"),
        (r4, ("compressed-tensors",), "try quantize --no-runtime-rotation"),
        (biased, ("meta",), "--to meta: expected no biases"),
        (biased, ("compressed-tensors", "--flavor", "magic"), "--flavor: expected one of transformers"),
        (biased, ("hf", "--flavor", "vllm-cpu"), "--flavor: hf takes none"),
    ):
        assert run("export", source, "--to", *target, "-o", tmp_path / "out") == 2
        assert message in one_line(capsys)


def test_adapters_go_along_in_metas_format(tmp_path: Path) -> None:
    packed = pack_by_command(tmp_path, "llama3")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "model", rank=4)
    assert run("export", packed, "--to", "meta", "-o", tmp_path / "out", "--adapter", adapter) == 0
    state = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "out" / "params.json").read_text("utf-8"))
    assert params["lora_args"] == {"rank": 4, "scale": 2.0}
    down = state["layers.0.feed_forward.w2.adaptor.A.weight"]
    assert down.dtype == torch.bfloat16
    assert len(down) == 4


def test_adapters_in_pefts_format(tmp_path: Path, capsys: Any) -> None:
    """Rank-stabilized, named, of some layers: PEFT loads what comes out, with the same values and scale."""
    pytest.importorskip("peft", reason="what loads adapters")
    packed = pack_by_command(tmp_path, "llama3")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "model", rank=4, use_rslora=True,
                           targets=["self_attn.q_proj", "mlp.down_proj"])  # fmt: skip
    capsys.readouterr()
    arguments = ("export", packed, "--to", "adapters", "-o", tmp_path / "out")
    assert run(*arguments) == 2
    assert "--to adapters: expected --adapter ADAPTER" in one_line(capsys)
    former = ("export", packed, "--to", "adaptors", "-o", tmp_path / "out")  # an alias
    assert run(*former, "--adapter", adapter) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "PASS"
    assert "read back by PEFT: 4 of 4 tensors" in shown.err
    assert json.loads((tmp_path / "out" / "llamita_export.json").read_text("utf-8"))["target"] == "adapters"
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert (settings["r"], settings["lora_alpha"]) == (4, 4 * 4.0)  # 8 / sqrt(4) = 4 = 16 / 4
    first, second = (llamita.load(packed, adapters={"a": one}) for one in (adapter, tmp_path / "out"))
    np.testing.assert_array_equal(first.logits(IDS, adapter="a"), second.logits(IDS, adapter="a"))


def test_adapters_of_some_layers_alone(tmp_path: Path, capsys: Any) -> None:
    """PEFT would make new ones for the others, were they not named one by one."""
    pytest.importorskip("peft", reason="what loads adapters")
    packed = pack_by_command(tmp_path, "llama3")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "model")
    tensors = read_adapter_tensors(adapter)
    replace_adapter_tensors(adapter, {name: tensors[name].copy() for name in tensors if ".layers.0." in name})
    capsys.readouterr()
    assert run("export", packed, "--to", "adapters", "--adapter", adapter, "-o", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "read back by PEFT: 7 of 7 tensors" in shown.err
    assert "Warning" not in shown.err


def test_what_was_exported_is_verified(tmp_path: Path, capsys: Any) -> None:
    packed = pack_by_command(tmp_path)
    assert run("export", packed, "--to", "hf", "-o", tmp_path / "out") == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "llamita_export.json").read_text("utf-8"))
    assert str(tmp_path) not in json.dumps(record)  # nothing of this machine travels along
    assert record["unchecked"] is None
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "an ordinary checkpoint in BF16" in card
    assert "from_pretrained" in card
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert run("verify", tmp_path / "out") == 1
    assert "model.safetensors: content differs from what was written" in one_line(capsys)
    (tmp_path / "out" / "llamita_export.json").unlink()
    assert run("export", packed, "--to", "torchao", "-o", tmp_path / "other") == 0
    (tmp_path / "other" / "llamita_export.json").unlink()
    capsys.readouterr()
    assert run("verify", tmp_path / "other") == 2  # never its own conversion in place of it
    assert "got another tool's model" in one_line(capsys)
