"""`llamita quantize` from end to end: every kind of source, every kind of mistake."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import assert_nothing_is_left, one_line, run
from tiny import make_checkpoint

from llamita.errors import InputError
from llamita.formats.safetensors import TensorFile
from llamita.methods.energy import input_importance
from llamita.models.checkpoint import Checkpoint
from llamita.models.packed import PackedModel
from llamita.models.verify import verify
from llamita.numerics.affine import to_f32
from llamita.numerics.scheme import SCALE_RULES, make_scheme
from llamita.quantize import pipeline
from llamita.quantize.calibration import CalibrationSpec
from llamita.quantize.layer_choice import Goal
from llamita.quantize.pipeline import QuantizeJob, quantize


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", "llama32", shards=2)


# ---- it works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", SCALE_RULES)
@pytest.mark.parametrize("preset", ["arm", "llama3.2", "llamita"])
def test_every_preset_with_every_rule(source: Path, tmp_path: Path, preset: str, scales: str) -> None:
    options = ("--preset", preset, "--scales", scales, "--method", "rtn", "--json")
    assert run("quantize", source, "-o", tmp_path / "out", *options) == 0
    assert verify(tmp_path / "out").problems == []
    model = PackedModel(tmp_path / "out")
    assert model.scheme == make_scheme(preset, None, scales)
    stored = {info.dtype for f in model.files.values() for n, info in f.tensors.items() if n.endswith("_scale")}
    assert stored == {"F32" if preset == "arm" and scales == "torchao" else "BF16"}


def test_search_is_better_than_torchao_and_weighted_lies_between(source: Path, tmp_path: Path) -> None:
    errors = {}
    for rule in SCALE_RULES:
        summary = quantize(Checkpoint(source), "x", tmp_path / rule, make_scheme("llama3.2", 32, rule))
        errors[rule] = summary.relative_error
        assert summary.worst(1)[0][1] == max(summary.errors.values())
    assert errors["search"] < errors["weighted"] < errors["torchao"]


def test_json_output_is_the_whole_of_stdout(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", source, "-o", tmp_path / "out", "--json", "--threads", "1") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["ratio"] == values["tensor_bytes"] / values["source_bytes"]
    assert 0 < values["relative_error"] < 0.02
    assert len(values["worst_layers"]) == 5


def test_the_summary_shows_size_error_and_worst_layers(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("quantize", source, "-o", tmp_path / "out") == 0
    captured = capsys.readouterr()
    for text in ("size before", "size after", "weight files, with headers", "relative squared error of weights",
                 "worst: model."):  # fmt: skip
        assert text in captured.out
    assert "calibrated methods" not in captured.err


def test_the_summary_says_that_a_calibrated_method_lowers_other_errors(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("torch")
    assert run("quantize", source, "-o", tmp_path / "out", "--method", "gptq", "--samples", "2", "--length", "16") == 0
    assert "the errors are those of weights; calibrated methods lower the errors of layers' outputs instead" in (
        capsys.readouterr().err
    )


def test_a_dry_run_tells_the_exact_size_and_writes_nothing(source: Path, tmp_path: Path, capsys: Any) -> None:
    before = set(source.parent.iterdir())
    assert run("quantize", source, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(source.parent.iterdir()) == before
    assert run("quantize", source, "-o", tmp_path / "out", "--json") == 0
    assert plan["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert plan["tensor_bytes"] == json.loads(capsys.readouterr().out)["tensor_bytes"]
    assert plan["seconds_estimate"] > 0
    assert run("quantize", source, "--dry-run") == 0
    assert "about" in capsys.readouterr().out


def test_a_source_in_one_file_and_in_shards_gives_the_same(tmp_path: Path) -> None:
    outs = []
    for shards in (1, 4):
        checkpoint = Checkpoint(make_checkpoint(tmp_path / f"src{shards}", shards=shards))
        quantize(checkpoint, "x", tmp_path / f"out{shards}", make_scheme("llamita"))
        outs.append((tmp_path / f"out{shards}" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_a_float_table_and_norms_keep_their_dtype(tmp_path: Path) -> None:
    for dtype in ("BF16", "F16", "F32"):
        checkpoint = Checkpoint(make_checkpoint(tmp_path / dtype, dtype=dtype))
        quantize(checkpoint, "x", tmp_path / f"out-{dtype}", make_scheme("arm"))
        file = TensorFile(tmp_path / f"out-{dtype}" / "model.safetensors")
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            assert file.tensors[name].dtype == dtype
        np.testing.assert_array_equal(file.read("model.embed_tokens.weight"), checkpoint.weight("model.embed_tokens"))


# ---- the same from Python ------------------------------------------------------------------------


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_job_gives_the_files_of_the_command(source: Path, tmp_path: Path, capsys: Any) -> None:
    """Calibrate on text that the model writes, choose layers for a size, and judge the finished model."""
    options = ("--method", "equalize", "--max-size", "345KB", "--samples", "2", "--length", "16", "--seed", "3")
    assert run("quantize", source, "-o", tmp_path / "command", *options, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    steps: list[str] = []
    text = CalibrationSpec(samples=2, length=16, seed=3)
    job = QuantizeJob(source, tmp_path / "job", method="equalize", calibration=text, goal=Goal(max_size=345_000))
    summary = pipeline.run(job, lambda what, _done, _total: steps.append(what))
    assert files_of(tmp_path / "job") == files_of(tmp_path / "command")
    assert summary is not None
    assert summary.selection is not None
    assert summary.selection.finished is not None
    assert summary.selection.finished.value == shown["selection"]["finished"]["value"] > 0
    assert summary.selection.file_bytes == summary.plan.file_bytes <= 345_000
    assert summary.scheme.to_dict() == shown["scheme"]
    assert "writing calibration text" in steps
    assert [step for step in steps if step.startswith("measuring model.layers.0")]
    assert capsys.readouterr() == ("", "")
    assert_nothing_is_left(tmp_path, "command", "job")


def test_a_job_takes_the_method_of_its_preset_unless_it_has_one(source: Path, tmp_path: Path) -> None:
    job = QuantizeJob(source, tmp_path, preset="llamita", settings={"tune.steps": 7})
    assert str(job.chain) == "equalize+spinquant+qronos+tune"
    assert job.all_settings == {"spinquant.rotations": "R4", "tune.rate": 0, "tune.steps": 7}
    assert job.needs_text
    plain = QuantizeJob(source, tmp_path, preset="llamita", runtime_rotation=False)
    assert (str(plain.chain), plain.all_settings) == ("equalize+qronos+tune", {"tune.rate": 0})
    rotated = QuantizeJob(source, tmp_path, method="spinquant", runtime_rotation=False)
    assert rotated.all_settings == {"spinquant.online": False}
    nearest = QuantizeJob(source, tmp_path, preset="llamita", method="rtn")
    assert (str(nearest.chain), nearest.all_settings, nearest.needs_text) == ("rtn", {}, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "q4"}, "expected one of arm, llama3.2, llamita"),
        ({"method": "magic"}, "expected one of rtn"),
        ({"settings": {"gptq.damping": 1}}, "gptq.damping=1: expected a setting of rtn"),
        ({"method": "gptq", "settings": {"gptq.damping": -1}}, "gptq.damping: expected a number of at least 0"),
        ({"runtime_rotation": False}, "expected a method with spinquant"),
        ({"calibration": CalibrationSpec("self")}, "expected a method that looks at activations, got rtn"),
        ({"keep_float": ("*.downproj",)}, r"try \*.down_proj"),
    ],
)
def test_a_job_with_a_mistake_writes_nothing(source: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.run(QuantizeJob(source, tmp_path / "out", **options))
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("limits", [{}, {"max_size": 10**6, "max_loss": 0.1}])
def test_a_goal_has_one_limit(limits: Any) -> None:
    with pytest.raises(InputError, match="expected one of them"):
        Goal(**limits)


# ---- expected energy -----------------------------------------------------------------------------


def test_importance_follows_the_inputs_of_a_simulated_network(tmp_path: Path) -> None:
    """Feed independent normal streams through one block and compare the root of every input's energy."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path, "llama3", mlp_bias=True))
    stored = checkpoint.weight
    # Channels of very different sizes, as in large models: random matrices give all the same energy.
    sizes = np.random.default_rng(1).lognormal(0, 1.5, 4096).astype(np.float32)

    def sized(name: str) -> np.ndarray:
        return to_f32(stored(name)) * sizes[: len(stored(name)), None]

    checkpoint.weight = sized  # type: ignore[method-assign]
    energies = input_importance(checkpoint)
    layer, rng = "model.layers.0", np.random.default_rng(0)

    def matrix(name: str) -> np.ndarray:
        return checkpoint.weight(f"{layer}.{name}")

    def normed(stream: np.ndarray, name: str) -> np.ndarray:
        scaled = stream / np.sqrt(np.square(stream).mean(axis=1, keepdims=True))
        return scaled * checkpoint.vector(f"{layer}.{name}.weight")

    table = checkpoint.weight("model.embed_tokens")
    stream = rng.normal(0, 1, (20_000, 128)).astype(np.float32) * np.sqrt(np.square(table).mean(axis=0))
    first = normed(stream, "input_layernorm")
    # What is left of a value after attention: half its energy.
    values = (first @ matrix("self_attn.v_proj").T * np.sqrt(0.5)).reshape(-1, 2, 1, 32)
    values = values.repeat(2, axis=2).reshape(-1, 128)
    second = normed(stream + values @ matrix("self_attn.o_proj").T, "post_attention_layernorm")
    bias = {s: checkpoint.vector(f"{layer}.mlp.{s}_proj.bias") for s in ("gate", "up")}
    gate, up = (second @ matrix(f"mlp.{s}_proj").T + bias[s] for s in ("gate", "up"))
    inputs = {"self_attn.q_proj": first, "self_attn.o_proj": values, "mlp.up_proj": second,
              "mlp.down_proj": gate / (1 + np.exp(-np.clip(gate, -80, 80))) * up}  # fmt: skip
    for name, x in inputs.items():
        measured, expected = np.square(x).mean(axis=0), energies[f"{layer}.{name}"]
        assert expected.mean() == pytest.approx(1, rel=0.02)
        assert expected.min() >= 0.01
        root = np.sqrt(measured)
        floored = np.maximum(root / root.mean(), 0.01)
        assert np.corrcoef(np.log(floored), np.log(expected))[0, 1] > 0.95, name


def test_importance_grows_with_what_earlier_layers_write(tmp_path: Path) -> None:
    """A channel into which o_proj writes a lot is one that the following layers must round with care."""
    path = make_checkpoint(tmp_path, "llama2")
    before = input_importance(Checkpoint(path))["model.layers.1.self_attn.q_proj"]
    source = Checkpoint(path)
    o_proj = to_f32(source.weight("model.layers.0.self_attn.o_proj")).copy()
    o_proj[5] *= 30
    original = source.weight

    def changed(name: str) -> np.ndarray:
        return o_proj if name == "model.layers.0.self_attn.o_proj" else original(name)

    source.weight = changed  # type: ignore[method-assign]
    after = input_importance(source)["model.layers.1.self_attn.q_proj"]
    assert after[5] > 2 * before[5]


# ---- mistakes: one line, exit code 2 -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "q4"), "--preset: expected one of arm, llama3.2, llamita"),
        (("--group-size", "48"), "--group-size: expected one of 32, 64, 128, 256"),
        (("--group-size", "256"), "model.layers.0.self_attn.q_proj: expected inputs in groups of 256, got 128"),
        (("--method", "magic"), "--method: expected one of rtn"),
        (("--scales", "guess"), "--scales: expected one of"),
        (("--threads", "0"), "threads"),
    ],
)
def test_options_that_make_no_sense(source: Path, tmp_path: Path, capsys: Any, options: Any, message: str) -> None:
    assert run("quantize", source, "-o", tmp_path / "out", *options) == 2
    assert message in one_line(capsys)
    assert_nothing_is_left(tmp_path)


def test_without_out_it_says_what_to_do(source: Path, capsys: Any) -> None:
    assert run("quantize", source) == 2
    assert "--dry-run" in one_line(capsys)


def test_an_existing_out_is_kept(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for options, message in (((), "exists"), (("--overwrite",), "replaces only what llamita made")):
        assert run("quantize", source, "-o", tmp_path / "out", *options) == 2
        assert message in one_line(capsys)
        assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    assert_nothing_is_left(tmp_path, "out")


def test_overwrite_replaces_what_llamita_made(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, "-o", out, "--preset", "arm", "--json") == 0
    assert run("quantize", source, "-o", out, "--preset", "llama3.2", "--overwrite", "--json") == 0
    scheme = PackedModel(out).scheme
    assert scheme is not None
    assert scheme.name == "llama3.2"
    assert_nothing_is_left(tmp_path, "out")


def test_a_quantized_source_is_refused(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("quantize", source, "-o", tmp_path / "out", "--json") == 0
    capsys.readouterr()
    for options in (("-o", tmp_path / "again"), ("--dry-run",)):
        assert run("quantize", tmp_path / "out", *options) == 2
        assert "float model" in one_line(capsys)
    assert_nothing_is_left(tmp_path, "out")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
)
@pytest.mark.parametrize("preset", ["arm", "llama3.2"])
def test_weights_that_are_not_finite(tmp_path: Path, capsys: Any, preset: str, tensor: str, value: float) -> None:
    make_checkpoint(tmp_path / "src", dtype="F32")
    info = TensorFile(tmp_path / "src" / "model.safetensors").tensors[tensor]
    with (tmp_path / "src" / "model.safetensors").open("r+b") as file:
        file.seek(info.start + 4 * 5)
        file.write(np.float32(value).tobytes())
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out", "--preset", preset) == 2
    line = one_line(capsys)
    assert tensor in line
    assert "NaN or infinity" in line
    assert_nothing_is_left(tmp_path, "src")


def test_weights_beyond_all_reason(tmp_path: Path, capsys: Any) -> None:
    make_checkpoint(tmp_path / "src", dtype="F32")
    info = TensorFile(tmp_path / "src" / "model.safetensors").tensors["model.layers.0.mlp.up_proj.weight"]
    with (tmp_path / "src" / "model.safetensors").open("r+b") as file:
        file.seek(info.start)
        file.write(np.float32(3e38).tobytes())
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out") == 2
    assert "up_proj.weight: expected weights whose squares" in one_line(capsys)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "model-00001-of-00002.safetensors").unlink(),
        lambda d: os.truncate(d / "model-00002-of-00002.safetensors", 5000),
        lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 4096),
        lambda d: (d / "config.json").unlink(),
        lambda d: (d / "config.json").write_text("{"),
        lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"llama"', '"gpt2"')),
        lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"silu"', '"gelu"')),
        lambda d: (d / "model.safetensors.index.json").write_text("[]"),
        lambda d: (d / "LICENSE").symlink_to("/etc/passwd"),
    ],
)
def test_damaged_sources(tmp_path: Path, capsys: Any, damage: Any) -> None:
    damage(make_checkpoint(tmp_path / "src", shards=2))
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out") == 2
    one_line(capsys)
    assert_nothing_is_left(tmp_path, "src")


# ---- what travels with the weights, and what the source is called ---------------------------------


def test_a_directory_of_licences_is_no_hindrance(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "src")
    (path / "LICENSES").mkdir()
    (path / "license.txt").touch()
    assert run("quantize", path, "-o", tmp_path / "out", "--json") == 0
    assert (tmp_path / "out" / "license.txt").exists()
    assert not (tmp_path / "out" / "LICENSES").exists()


def test_a_licence_that_cannot_be_copied_is_told_before_rounding(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamita.quantize.pipeline.write_weights", None)  # not reached
    path = make_checkpoint(tmp_path / "src")
    os.mkfifo(path / "LICENSE")
    assert run("quantize", path, "-o", tmp_path / "out") == 2
    assert "expected a regular file" in one_line(capsys)
    assert_nothing_is_left(tmp_path, "src")


@pytest.mark.parametrize("name", ["own/model", "./own/model/", "own/../own/model", "own/link", "own/embedded"])
def test_a_directory_is_recorded_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Else own/model, looked for from elsewhere, would be a stranger's model on the hub."""
    make_checkpoint(tmp_path / "own" / "model")
    for link in ("link", "embedded"):
        (tmp_path / "own" / link).symlink_to("model")
    monkeypatch.chdir(tmp_path)
    assert run("quantize", name, "-o", "out", "--json") == 0
    recorded = json.loads(Path("out/llamita.json").read_text())["source"]["name"]
    assert recorded == str(tmp_path / "own" / Path(name).name)
    card = Path("out/README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert f"{Path(name).name}`" in card
    assert "Licence and responsible use" in card


@pytest.mark.parametrize("name", ["owner/model", "embedded"])
def test_other_names_are_recorded_as_they_are(source: Path, tmp_path: Path, name: str) -> None:
    quantize(Checkpoint(source), name, tmp_path / "out", make_scheme("llama3.2"))
    assert json.loads((tmp_path / "out" / "llamita.json").read_text())["source"]["name"] == name


def test_a_path_that_is_not_utf8_is_refused_before_rounding(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamita.quantize.pipeline.write_weights", None)  # not reached
    path = make_checkpoint(tmp_path / "u").rename(tmp_path / os.fsdecode(b"u\xff"))
    assert run("quantize", path, "-o", tmp_path / "out") == 2
    assert "expected a path in UTF-8" in one_line(capsys)
    assert_nothing_is_left(tmp_path, path.name)
