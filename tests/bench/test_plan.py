"""`llamita plan` and `llamita inspect`: exact sizes from a config.json alone, estimates that add up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from foreign_models import make_gguf_checkpoint
from packed_models import pack
from tiny import CONFIGS, make_checkpoint

from llamita import cli
from llamita.bench import plan
from llamita.bench.plan import Machine, describe, estimate_all
from llamita.errors import InputError
from llamita.loading import load
from llamita.models.checkpoint import Checkpoint
from llamita.models.sizes import make_plan
from llamita.numerics.scheme import PRESETS, make_scheme
from llamita.quantize.pipeline import quantize

MACHINE = Machine(bandwidth=20e9, int8_rate=200e9, memory=8 * 10**9, memory_free=10**9, threads=2, cache=2**25)
LLAMA_1B = {
    **CONFIGS["llama32"], "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    return tmp_path / "config.json"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("family", "dtype"), [("llama32", "BF16"), ("llama3", "F16"), ("tinyllama", "F32")])
def test_a_config_alone_gives_the_bytes_that_quantize_writes(
    tmp_path: Path, preset: str, family: str, dtype: str
) -> None:
    group_size = 32 if family == "tinyllama" else None
    scheme = make_scheme(preset, group_size)
    source, out = tmp_path / "src", pack(tmp_path, scheme, None, 100_000, family=family, dtype=dtype)
    model = describe(str(source / "config.json"))
    made = make_plan(model.config, scheme, model.float_dtype, shard_bytes=100_000)
    written = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert made.file_bytes == sum(written.values())
    assert made.files == sorted(written)
    headers = sum(int.from_bytes((out / name).read_bytes()[:8], "little") + 8 for name in written)
    assert made.tensor_bytes == sum(written.values()) - headers
    begin = int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little") + 8
    assert made.source_bytes == (source / "model.safetensors").stat().st_size - begin


def test_llama_1b_has_the_published_sizes(config_file: Path) -> None:
    estimates = {e.name: e for e in estimate_all(describe(str(config_file)), MACHINE)}
    assert estimates["float"].tensor_bytes == 2_471_628_800  # of the released model.safetensors
    assert estimates["llama3.2"].tensor_bytes < 0.82e9
    cache = estimates["llama3.2"].cache_bytes_per_token
    assert cache == 2 * 16 * 8 * 64 * 2
    for estimate in estimates.values():
        memory = estimate.memory
        assert set(memory) == {2048, 8192}
        assert memory[8192] - memory[2048] == 6144 * estimate.cache_bytes_per_token
        assert memory[2048] > estimate.tensor_bytes
        assert estimate.fits == (memory[2048] <= MACHINE.memory_free)
    assert estimates["llama3.2"].fits
    assert not estimates["float"].fits
    assert 2 < estimates["llama3.2"].decode / estimates["float"].decode < 4
    assert estimates["llama3.2"].decode < MACHINE.bandwidth / estimates["llama3.2"].tensor_bytes


def test_a_type_of_the_cache_changes_its_bytes(config_file: Path) -> None:
    model = describe(str(config_file))
    by_default = {e.name: e.cache_bytes_per_token for e in estimate_all(model, MACHINE)}
    assert by_default["float"] == 2 * by_default["arm"]
    floats = estimate_all(model, MACHINE, kv_dtype="f32")
    assert {e.cache_bytes_per_token for e in floats} == {by_default["float"]}
    with pytest.raises(InputError, match="--kv-cache: expected one of f32, f16"):
        estimate_all(model, MACHINE, kv_dtype="f8")


def test_small_models_are_bound_by_their_layers_not_by_memory(tmp_path: Path) -> None:
    """However fast the machine, a layer takes its time."""
    model = describe(str(make_checkpoint(tmp_path)))
    fast = replace(MACHINE, bandwidth=1e18, int8_rate=1e18)
    estimate = estimate_all(model, fast, [make_scheme("llama3.2")])[1]
    assert estimate.decode == pytest.approx(1 / (2 * 10e-6))
    assert estimate.prefill == pytest.approx(1 / (2 * 2e-6))
    deeper = replace(model, config=replace(model.config, layers=4))
    assert estimate_all(deeper, fast)[0].decode == pytest.approx(estimate.decode / 2)


def test_what_fits_the_caches_is_read_faster(tmp_path: Path) -> None:
    model = describe(str(make_checkpoint(tmp_path)))
    cached, uncached = (estimate_all(model, replace(MACHINE, bandwidth=1e6, cache=size))[0].decode
                        for size in (2**25, 0))  # fmt: skip
    assert cached == pytest.approx(1.5 * uncached, rel=1e-3)


def test_the_memory_beside_weights_and_cache_is_buffers_and_process(config_file: Path) -> None:
    """Of Llama 3.2 1B, 4-bit: 512 tokens of 15,360 float32 and 12,288 int8, and the logits twice."""
    (_, estimate) = estimate_all(describe(str(config_file)), MACHINE, [make_scheme("llama3.2")])
    rest = estimate.memory[2048] - estimate.tensor_bytes - 2048 * estimate.cache_bytes_per_token
    assert rest == 32e6 + 512 * (4 * 15_360 + 12_288) + 8 * 128_256


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_buffers_are_those_that_a_step_writes(tmp_path: Path, preset: str | None) -> None:
    """Every buffer between the layers is filled with NaN; those that a step wrote are finite."""
    scheme = make_scheme(preset, 32) if preset else None
    llm = load(make_checkpoint(tmp_path), scheme=scheme)
    ids = np.arange(8, dtype=np.int32)
    llm.model.step([(llm.new_sequence(8), ids)])
    buffers = [*llm.model._buffers._streams, *llm.model._buffers._floats]
    for buffer in buffers:
        buffer.fill(np.nan)
    llm.model.step([(llm.new_sequence(8), ids)])
    written = sum(buffer.shape[1] for buffer in buffers if np.isfinite(buffer[:2]).all())
    assert plan.buffer_widths(llm.config, scheme)[0] == written


def test_an_untied_embedding_is_not_read_for_every_token(config_file: Path) -> None:
    tied = describe(str(config_file))
    config_file.write_text(json.dumps({**LLAMA_1B, "tie_word_embeddings": False}))
    untied = describe(str(config_file))
    for first, second in zip(estimate_all(tied, MACHINE), estimate_all(untied, MACHINE), strict=True):
        assert second.tensor_bytes > first.tensor_bytes
        assert second.decode == pytest.approx(first.decode, rel=1e-3)


def test_a_short_context_is_planned_for_as_it_is(tmp_path: Path) -> None:
    (estimate, *_) = estimate_all(describe(str(make_checkpoint(tmp_path))), MACHINE)
    assert set(estimate.memory) == {512}


def test_a_packed_model_is_planned_for_by_itself(tmp_path: Path) -> None:
    pack(tmp_path, "arm")
    (estimate,) = estimate_all(describe(str(tmp_path / "out")), MACHINE)
    assert estimate.name == "arm"
    assert estimate.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    with pytest.raises(InputError, match="float model"):
        describe(str(tmp_path / "out" / "config.json"))


def test_a_gguf_is_planned_for_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is converted: the data of its tensors could be anything."""
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_gguf_checkpoint(tmp_path, "llama3")
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    assert run("export", tmp_path / "packed", "--to", "gguf", "-o", tmp_path / "out") == 0
    file = tmp_path / "out" / "model.gguf"
    assert describe(str(file)).config == describe(str(model)).config
    assert run("plan", file) == 0
    assert run("quantize", file, "--dry-run") == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["/no/such/place", "nonsense"])
def test_names_that_lead_nowhere(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", name])
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_measures_this_machine(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PROBE_BYTES", 2**24)
    cli.main(["plan", str(config_file), "--preset", "llama3.2", "--kv-cache", "f32", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["bandwidth"] > 1e8
    assert values["machine"]["int8_rate"] > 1e8
    assert [e["name"] for e in values["estimates"]] == ["float", "llama3.2"]


def test_a_preset_that_does_not_fit_is_left_out_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamita.commands.plan.measure_machine", lambda: MACHINE)
    model = make_checkpoint(tmp_path, hidden_size=192, num_attention_heads=6)
    assert run("plan", model, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in values["estimates"]] == ["float", "llama3.2", "llamita"]
    assert values["notes"] == [
        "arm: does not fit: 192 inputs are no multiple of 128; try --group-size 64, or --fit-groups"
    ]
    assert run("plan", model) == 0
    assert values["notes"][0] in capsys.readouterr().err
    for named in (("--preset", "arm"), ("--group-size", "128")):
        assert run("plan", model, *named) == 2
        assert "expected inputs in groups of 128, got 192; try --group-size 64, or" in capsys.readouterr().err
    assert run("plan", model, "--group-size", "64", "--json") == 0
    names = [e["name"] for e in json.loads(capsys.readouterr().out)["estimates"]]
    assert names == ["float", *(f"{preset}, groups of 64" for preset in PRESETS)]
    assert run("plan", model, "--fit-groups", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in values["estimates"]] == ["float", "arm, fitted", "llama3.2", "llamita"]
    assert values["notes"] == ["arm, fitted: w4g64 (12), w4g128 (2)"]
    assert run("quantize", model, "-o", tmp_path / "out", "--preset", "arm", "--fit-groups") == 0
    assert values["estimates"][1]["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_published_shape_needs_no_files(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.commands.plan.measure_machine", lambda: MACHINE)
    cli.main(["plan", "--shape", "1b", "--preset", "llama3.2", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["source"] == "llama-3.2-1b"
    assert round(values["estimates"][1]["tensor_bytes"] / 1e6) == 810
    for arguments, text in (([], "got neither"), (["embedded", "--shape", "1b"], "got both")):
        with pytest.raises(SystemExit):
            cli.main(["plan", *arguments])
        assert f"plan: expected a model or --shape, {text}" in capsys.readouterr().err


def test_the_speeds_of_small_models_are_said_to_be_rough(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache, rough in ((2**30, True), (1, False)):
        monkeypatch.setattr("llamita.commands.plan.measure_machine", lambda c=cache: replace(MACHINE, cache=c))
        cli.main(["plan", "embedded", "--preset", "arm"])
        assert ("its speeds are rough" in capsys.readouterr().err) is rough


def test_the_command_prints_estimates_as_such(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamita.commands.plan.measure_machine", lambda: MACHINE)
    cli.main(["plan", str(config_file), "--preset", "arm", "--group-size", "256"])
    assert "estimates" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", str(config_file), "--preset", "q4"])
    assert exit_.value.code == 2


def test_what_is_no_model_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    packed = pack(tmp_path, "arm")
    (packed / "llamita.json").write_text("{")
    for arguments, line in (
        (("inspect", empty), f"{empty}: expected a model directory, got one without config.json"),
        (("inspect", packed), f"{packed}: llamita.json: expected valid JSON"),
        (("verify", empty), f"{empty}: expected a directory with llamita.json or llamita_export.json, got a directory"),
        (("verify", tmp_path / "src"), "got a float checkpoint, which records no hashes"),
        (("import", "nowhere", "-o", tmp_path / "new"), "got no such file or directory"),
    ):
        assert run(*arguments) == 2
        assert line in one_line(capsys)


@pytest.mark.parametrize(
    ("changes", "family", "others"),
    [
        ({}, "llama", ["rope default"]),
        ({"model_type": "mistral", "sliding_window": 100}, "mistral", ["window 100 positions, in 2 of 2 layers"]),
        ({"model_type": "granite", "residual_multiplier": 0.5}, "granite, read as a Llama", []),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 2048},
            "llama",
            ["rope yarn, factor 4, from 2,048 tokens"],
        ),
    ],
)
def test_inspect_names_the_family(
    tmp_path: Path, capsys: Any, changes: dict[str, Any], family: str, others: list[str]
) -> None:
    make_checkpoint(tmp_path / "src", "llama3", **changes)
    assert run("inspect", tmp_path / "src", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model_type"] == changes.get("model_type", "llama")
    assert values["window"] == ({"positions": 100, "layers": 2} if "sliding_window" in changes else None)
    assert values["rope_factor"] == (4 if "rope_scaling" in changes else None)
    assert run("inspect", tmp_path / "src") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {f"family {family}", *others} <= set(lines)
    assert ("window" in values and any(line.startswith("window") for line in lines)) is ("sliding_window" in changes)
    assert not any(line.startswith("layers by kind") for line in lines)


def test_inspect_shows_float_and_packed_models(tmp_path: Path, capsys: Any) -> None:
    quantize(Checkpoint(make_checkpoint(tmp_path / "src")), "the-source", tmp_path / "out", make_scheme("arm"))
    cli.main(["inspect", str(tmp_path / "src"), "--json"])
    before = json.loads(capsys.readouterr().out)
    cli.main(["inspect", str(tmp_path / "out"), "--json"])
    after = json.loads(capsys.readouterr().out)
    assert before["scheme"] is None
    assert after["scheme"]["name"] == "arm"
    assert before["weights"] == after["weights"]
    assert after["tensor_bytes"] < before["tensor_bytes"]
    assert after["source"]["name"] == "the-source"
    cli.main(["inspect", str(tmp_path / "out"), "--layers"])
    out = capsys.readouterr().out
    assert "the-source" in out
    assert out.count("_proj") == 14
