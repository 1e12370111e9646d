"""Every family through the whole path, on tiny models that transformers' own classes made.

In float the oracle is transformers; after rounding it is transformers' classes with fake-quantized layers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter, read_adapter_tensors, replace_adapter_tensors
from command import run
from distances import relative_error
from families import FAMILIES, make_family, write_family_gguf
from foreign_models import write_parts
from jsonl import write_jsonl

import llamita
from llamita.errors import InputError
from llamita.export.source import module_names
from llamita.imports.open import open_source, resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import linear_names, table_names, vector_names
from llamita.models.packed import PackedModel
from llamita.models.weights import ModelSource, row_blocks

torch = pytest.importorskip("torch", reason="the oracle is transformers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

from layerwise import guided, linear_modules, watch  # noqa: E402
from torch_forward import logits_of  # noqa: E402

from llamita.methods import chain as chains  # noqa: E402
from llamita.methods.setup import Setup  # noqa: E402
from llamita.train.load import load_float  # noqa: E402
from llamita.train.prepare import prepare  # noqa: E402

TOLERANCE = 1e-4  # largest difference over largest logit, both in float32; the families differ by far more
IDS = np.random.default_rng(1).integers(0, 256, 300)  # beyond every window, and beyond a block of 128 keys
SHORT = IDS[:40]
OWN_GGUF = (
    "llama",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "granite, untied",
    "phi3",
    "phi3, window",
    "phi3, longrope",
)
TEXT = "The quick brown fox jumps over the lazy dog. " * 40
OFTEN = ("compressed-tensors",)  # of the formats that transformers opens; the others are in the slow set


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Return the name of a family."""
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint of the family."""
    return make_family(tmp_path_factory.mktemp("model") / "model", family)


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint, quantized."""
    out = tmp_path_factory.mktemp("packed") / "packed"
    assert run("quantize", model, "-o", out) == 0
    return out


def theirs(path: Path, ids: np.ndarray) -> np.ndarray:
    """Return the logits of transformers' own class in float32: (tokens, vocab)."""
    is_vision = json.loads((path / "config.json").read_text("utf-8"))["model_type"] == "mllama"
    kind = transformers.MllamaForConditionalGeneration if is_vision else transformers.AutoModelForCausalLM
    with torch.no_grad():
        return kind.from_pretrained(path, dtype=torch.float32)(torch.from_numpy(ids)[None]).logits[0].numpy()


def test_float_logits_are_those_of_transformers(model: Path) -> None:
    assert relative_error(llamita.load(model).logits(IDS), theirs(model, IDS)) <= TOLERANCE


def test_a_token_at_a_time_gives_the_bits_of_the_whole_text(model: Path) -> None:
    """Also beyond the window, and where a layer does not rotate."""
    llm = llamita.load(model, kv_dtype="int8")
    ids, whole = IDS[:150].astype(np.int32), llm.logits(IDS[:150])
    cache = llm.new_sequence(len(ids))
    parts = [llm.model.step([(cache, ids[:100])], np.arange(100)).copy()]
    parts += [llm.model.step([(cache, ids[i : i + 1])]).copy() for i in range(100, len(ids))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_rounded_layers_are_those_of_fake_quantized_ones(model: Path, packed: Path) -> None:
    rounded, passed = PackedModel(packed), watch(llamita.load(packed, kv_dtype="f32"), SHORT)
    other = load_float(Checkpoint(model))
    prepare(other, rounded)
    with guided(linear_modules(other, rounded), rounded, passed):
        other.eval()(torch.from_numpy(SHORT)[None])


@pytest.mark.parametrize("method", ["equalize", "equalize+spinquant"])
def test_transforms_keep_the_function(model: Path, method: str) -> None:
    """Scaled channels; R1, R2 and R4 with random signs."""
    source = Checkpoint(model)
    setup = Setup(settings={"spinquant.steps": 0} if "spinquant" in method else {})
    changed = chains.transform(source, chains.parse_chain(method), setup)
    before, after = (logits_of(one, SHORT[None]).numpy() for one in (source, changed))
    assert relative_error(after, before) <= TOLERANCE


@pytest.mark.slow
def test_learned_and_calibrated_methods_make_a_better_model(model: Path, packed: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, "utf-8")
    chain = ("--method", "spinquant+gptq+tune", "--set", "spinquant.steps=2", "--set", "tune.steps=2")
    sizes = ("--calibration", text, "--samples", "8", "--length", "64")
    assert run("quantize", model, "-o", out, *chain, *sizes) == 0
    ids = np.array(llamita.load(model).tokenizer.encode(TEXT))[:64]
    floats = llamita.load(model).logits(ids)
    nearest, better = (np.abs(llamita.load(path).logits(ids) - floats).mean() for path in (packed, out))
    assert better < nearest


@pytest.mark.slow
def test_twenty_steps_of_training_lower_the_loss(model: Path, tmp_path: Path, capsys: Any) -> None:
    """With rounding in the loop and adapters; the engine runs what was trained."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": f"say {i % 7} and {i % 7}"} for i in range(64)])
    fast = ("--set", "steps=20", "--set", "batch=4", "--set", "length=64", "--set", "learning_rate=2e-3")
    out = tmp_path / "out"
    capsys.readouterr()
    assert run("finetune", model, "--data", data, "--method", "qat-lora", "-o", out, *fast, "--json") == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses[-1] < losses[0]
    adapter = next(path for path in tmp_path.iterdir() if (path / "adapter_config.json").exists())
    assert run("generate", out, "--adapter", adapter, "--prompt", "say 3", "--max-tokens", "4") == 0


def same_values(one: ModelSource, other: ModelSource) -> None:
    """Check that two models have the same values in every matrix and vector."""
    for name in module_names(one):
        for mine, its in zip(row_blocks(one.weight(name)), row_blocks(other.weight(name)), strict=True):
            np.testing.assert_array_equal(mine, its, err_msg=name)
    for name in vector_names(one.config):
        np.testing.assert_array_equal(one.vector(name), other.vector(name), err_msg=name)


@pytest.mark.parametrize("target", [*OFTEN, *(pytest.param(t, marks=pytest.mark.slow) for t in ("torchao", "hf"))])
def test_checkpoints_of_other_libraries_hold_it(target: str, packed: Path, tmp_path: Path, capsys: Any) -> None:
    """transformers opens the export by the family's own class; its weights and logits are compared."""
    capsys.readouterr()
    assert run("export", packed, "--to", target, "-o", tmp_path / "out", "--json") == 0
    proof = json.loads(capsys.readouterr().out)["proof"]
    assert proof["holds"], proof
    if target != "hf":
        assert run("import", tmp_path / "out", "-o", tmp_path / "back") == 0
        same_values(PackedModel(packed), PackedModel(tmp_path / "back"))


def test_gguf_there_and_back(family: str, packed: Path, tmp_path: Path, capsys: Any) -> None:
    code = run("export", packed, "--to", "gguf", "-o", tmp_path / "out")
    if family == "phi3, longrope":
        assert code != 0
        assert "--to gguf: expected rotary embeddings that do not depend on the length" in capsys.readouterr().err
        return
    assert code == 0
    note = "tokens: llama.cpp has no window here"
    assert (note in capsys.readouterr().err) == bool(PackedModel(packed).config.windowed)
    assert run("import", tmp_path / "out" / "model.gguf", "-o", tmp_path / "back") == 0
    same_values(PackedModel(packed), PackedModel(tmp_path / "back"))


@pytest.mark.parametrize("name", OWN_GGUF)
def test_its_own_gguf_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the family's own architecture, keys, fused matrices and order of rows, as llama.cpp writes it."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_family(tmp_path / "model", name)
    file = write_family_gguf(model, tmp_path / "model.gguf")
    assert relative_error(llamita.load(file).logits(IDS), theirs(model, IDS)) <= TOLERANCE
    source = open_source(file)
    assert isinstance(source, Checkpoint)
    weights = [source.weight(module) for module in (*table_names(source.config), *linear_names(source.config))]
    assert source.made_bytes() == sum(w.nbytes for w in weights if w.flags.writeable)  # what is mapped is not


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "granite, untied"])
def test_an_adapter_acts_as_in_peft_and_can_be_merged(name: str, tmp_path: Path, capsys: Any) -> None:
    """On the family's own weights: Granite's q_proj is scaled here, and so is what an adapter adds to it."""
    peft = pytest.importorskip("peft", reason="the oracle is PEFT")
    model = make_family(tmp_path / "model", name)
    adapter = make_adapter(tmp_path / "adapter", model)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, adapter)(torch.from_numpy(SHORT)[None]).logits[0].numpy()
    found = llamita.load(model, adapters={"a": adapter}).logits(SHORT, "a")
    assert relative_error(found, expected) <= TOLERANCE
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    exported = tmp_path / "exported"
    assert run("export", tmp_path / "packed", "--to", "adapters", "--adapter", adapter, "-o", exported) == 0
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        found = peft.PeftModel.from_pretrained(again, exported)(torch.from_numpy(SHORT)[None]).logits[0].numpy()
    assert relative_error(found, expected) <= TOLERANCE
    assert run("merge", model, adapter, "-o", tmp_path / "merged", "--text", __file__) == 0
    merged = tmp_path / "merged"
    for logits in (llamita.load(merged).logits(SHORT), theirs(merged, SHORT)):
        assert relative_error(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["phi3", "mllama"])
def test_adapters_of_other_layers_are_refused_by_name(name: str, tmp_path: Path, capsys: Any) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_family(tmp_path / "model", name))
    tensors = read_adapter_tensors(adapter)
    renamed = {key.replace("self_attn.q_proj", "self_attn.qkv_proj"): value for key, value in tensors.items()}
    replace_adapter_tensors(adapter, renamed)
    with pytest.raises(InputError, match=r"qkv_proj.*expected adapters of this model's linear layers"):
        llamita.load(tmp_path / "model", adapters={"a": adapter})


def test_parts_that_are_links_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's cache has them: names that lead to files named by a hash."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    whole = write_family_gguf(make_family(tmp_path / "model", "qwen3"), tmp_path / "model.gguf")
    parts = write_parts(whole, tmp_path / "parts")
    (tmp_path / "snapshot").mkdir()
    for number, part in enumerate(parts):
        (tmp_path / "snapshot" / part.name).symlink_to(part.rename(tmp_path / f"blob{number}"))
    found = llamita.load(tmp_path / "snapshot" / parts[1].name).logits(SHORT)
    np.testing.assert_array_equal(found, llamita.load(whole).logits(SHORT))


def test_the_cached_directory_of_a_gguf_that_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    file = write_family_gguf(make_family(tmp_path / "model", "qwen3"), tmp_path / "model.gguf")
    place = resolve(file)
    assert not list(place.glob("*.safetensors"))  # nothing was copied
    file.unlink()
    with pytest.raises(InputError, match=r"gguf\.json: expected the GGUF that this was made from"):
        open_source(place)


def test_names_that_lead_to_files_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that led to one file and now leads to another; the first file keeps its weights under its own name."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    files = [
        write_family_gguf(make_family(tmp_path / f"m{i}", "qwen3", seed=i), tmp_path / f"{i}.gguf") for i in (0, 1)
    ]
    first, second = (llamita.load(file).logits(SHORT) for file in files)
    link = tmp_path / "current.gguf"
    for file, expected in zip([*files, files[0]], [first, second, first], strict=True):
        link.unlink(missing_ok=True)
        link.symlink_to(file)
        np.testing.assert_array_equal(llamita.load(link).logits(SHORT), expected)
        np.testing.assert_array_equal(llamita.load(files[0]).logits(SHORT), first)


def test_a_link_outside_the_cache_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_family(tmp_path / "model", "qwen3")
    before, other = llamita.load(model).logits(SHORT), make_family(tmp_path / "other", "qwen3", seed=1)
    file = write_family_gguf(other, tmp_path / "other.gguf")
    (model / "gguf.json").write_text(json.dumps({"gguf": str(file)}))
    np.testing.assert_array_equal(llamita.load(model).logits(SHORT), before)


def test_what_is_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A GGUF in a directory that llamita made, and that directory as OUT."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model, out = make_family(tmp_path / "model", "qwen3"), tmp_path / "out"
    assert run("quantize", model, "-o", out) == 0
    file = write_family_gguf(model, out / "model.gguf")
    capsys.readouterr()
    assert run("quantize", file, "-o", out, "--overwrite") == 2
    assert "holds the source" in capsys.readouterr().err
    assert file.exists()


def test_a_packed_model_without_its_record_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Its rotation would be lost, whatever the family."""
    model, out = make_family(tmp_path / "model", "qwen3"), tmp_path / "out"
    assert run("quantize", model, "-o", out, "--method", "spinquant", "--set", "spinquant.steps=0") == 0
    (out / "llamita.json").unlink()
    with pytest.raises(InputError, match=r"llamita\.json"):
        llamita.load(out)


@pytest.mark.slow
def test_executorch_says_the_same(packed: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("executorch", reason="the export is on the Torch side")
    capsys.readouterr()
    assert run("export", packed, "--to", "executorch", "-o", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["proof"]["holds"]
