"""What a method is expected to take, and which method a preset stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import one_line, run
from places import HELD_OUT
from tiny import make_checkpoint

from llamita.bench.plan import describe_shape
from llamita.imports.open import resolve
from llamita.methods.chain import parse_chain
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.quantize.cost import expected_memory, expected_work

pytest.importorskip("torch", reason="calibrated methods are on the Torch side")
TEXT = HELD_OUT.read_text("utf-8")


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT[:4000], "utf-8")
    return path


# ---- time and memory ------------------------------------------------------------------------------


def test_time_and_memory_are_announced_and_memory_is_told(tmp_path: Path, text: Path, capsys: Any) -> None:
    make_checkpoint(tmp_path / "src")
    options = ("--calibration", text, "--samples", "4", "--length", "64", "--threads", "1")
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out", "--method", "gptq", *options) == 0
    captured = capsys.readouterr()
    assert "of memory to expect" in captured.err
    assert "memory" in captured.out
    assert run("quantize", tmp_path / "src", "--dry-run", "--method", "gptq", "--json", *options) == 0
    values = json.loads(capsys.readouterr().out)
    assert run("quantize", tmp_path / "src", "--dry-run", "--json", *options) == 0
    plain = json.loads(capsys.readouterr().out)
    assert values["memory_bytes_estimate"] > plain["memory_bytes_estimate"]
    assert values["seconds_estimate"] > 0


def test_expected_memory_grows_with_the_text_up_to_the_limit() -> None:
    config = Checkpoint(resolve("embedded")).config
    chains = {name: parse_chain(name) for name in ("gptq", "qronos")}
    setup = Setup(memory=100 * 2**20)
    short, longer = (expected_memory(config, chains["gptq"], setup, n, 512) for n in (16, 32))
    assert longer - short == 2 * 4 * 16 * 512 * config.hidden_size
    assert expected_memory(config, chains["gptq"], setup, 4096, 512) < short  # in files
    both = expected_memory(config, chains["qronos"], setup, 16, 512)
    assert both > short + 2 * 4 * 16 * 512 * config.hidden_size
    work = [expected_work(config, chain, setup, 16, 512) for chain in chains.values()]
    assert work[0] < work[1] < 4 * work[0]


# ---- what a preset stands for ---------------------------------------------------------------------


def test_the_preset_llamita_calibrates_unless_told_otherwise(tmp_path: Path, text: Path) -> None:
    """It is a chain with its own settings; --method or --set replace either, --no-runtime-rotation leaves R4 out."""
    make_checkpoint(tmp_path / "src", num_hidden_layers=1)
    options = ("--preset", "llamita", "--calibration", text, "--samples", "2", "--length", "16", "--json")
    faster = ("--set", "tune.steps=4")

    def record(name: str, *more: str) -> dict[str, Any]:
        assert run("quantize", tmp_path / "src", "-o", tmp_path / name, *options, *more) == 0
        return json.loads((tmp_path / name / "llamita.json").read_text("utf-8"))

    found = record("preset", *faster)
    assert found["method"] == "equalize+spinquant+qronos+tune"
    assert found["settings"] == {"spinquant.rotations": "R4", "tune.rate": 0, "tune.steps": 4}
    assert [one["name"] for one in found["rotations"]] == ["R4"]
    found = record("plain", *faster, "--no-runtime-rotation")
    assert (found["method"], found["settings"]) == ("equalize+qronos+tune", {"tune.rate": 0, "tune.steps": 4})
    assert not found.get("rotations")
    assert record("changed", *faster, "--set", "tune.rate=1")["settings"]["tune.rate"] == 1
    found = record("named", "--method", "gptq")
    assert (found["method"], found["settings"]) == ("gptq", {})


def test_what_is_learned_and_tuned_is_expected_to_take_time_and_memory() -> None:
    config = describe_shape("1b")[1].config

    def needs(method: str, **settings: float) -> tuple[float, float]:
        chain, setup = (parse_chain(method), Setup(settings={k.replace("_", "."): v for k, v in settings.items()}))
        return expected_work(config, chain, setup, 64, 512), expected_memory(config, chain, setup, 64, 512)

    work, memory = needs("qronos")
    assert work < needs("qronos+tune", tune_rate=0)[0] < needs("qronos+tune")[0]
    assert needs("tune")[1] > 8 * 4 * 60e6  # of a block: places, bounds, gradients, moments
    assert needs("spinquant+qronos", spinquant_steps=0) == (work, memory)
    short, longer, longest = (needs("spinquant+qronos", spinquant_steps=steps)[0] for steps in (10, 20, 30))
    assert longest - longer == pytest.approx(longer - short)
    assert short - work > longer - short  # what was learned is compared with the beginning
    assert needs("spinquant")[1] > 4 * 1.2e9  # the whole model in float32


# ---- what is refused, before any work -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "gptq", "--set", "gptq.dampin=1"), "gptq.dampin: expected one of damping, sweeps"),
        (("--method", "qronos", "--set", "gptq.sweeps=1.5"), "gptq.sweeps: expected a whole number, got 1.5"),
        (("--method", "tune", "--set", "tune.rate=true"), "tune.rate: expected a number from 0 to 50"),
        (("--method", "gptq", "--set", "qronos.ridge=1"), "expected a setting of gptq, got one of qronos"),
        (
            ("--preset", "llamita", "--no-online", "--set", "spinquant.steps=0"),
            "spinquant.steps=0: expected a setting of equalize",
        ),
        (
            ("--method", "rtn", "--calibration", "self"),
            "--calibration: expected a method that looks at activations, got rtn; try gptq",
        ),
        (("--no-online",), "expected a method with spinquant, got rtn; try without --no-runtime-rotation"),
        (
            ("--method", "spinquant", "--set", "spinquant.rotations=R4", "--no-online"),
            "spinquant.rotations: expected R1 or R2 with --no-runtime-rotation, got R4 alone",
        ),
        (("--method", "gptq", "--max-size", "100000"), "--max-size: expected at least"),
        (("--method", "gptq", "--max-size", "3.6"), "expected a size such as 700MB or 1.2GB, got '3.6'"),
    ],
)
def test_mistakes_are_told_before_any_text_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.delattr("llamita.quantize.own_text.Writer")
    assert run("quantize", make_checkpoint(tmp_path / "src"), "-o", tmp_path / "out", *options) == 2
    assert message in one_line(capsys)


def test_tuning_takes_one_process_and_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delattr("llamita.quantize.own_text.Writer")
    source = make_checkpoint(tmp_path / "src")
    assert run("quantize", source, "-o", tmp_path / "out", "--preset", "llamita") == 2
    assert "expected a single process for tune, got 2; try --method equalize+spinquant+qronos --set " in one_line(
        capsys
    )


def test_the_way_out_of_several_processes_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What the message suggests is taken, up to where the processes would meet."""
    source = make_checkpoint(tmp_path / "src")
    options = ("--method", "spinquant+tune", "--no-runtime-rotation", "--set", "spinquant.steps=0")
    with monkeypatch.context() as patch:
        for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}.items():
            patch.setenv(name, value)
        assert run("quantize", source, "-o", tmp_path / "out", *options) == 2
    suggested = one_line(capsys).partition("; try ")[2].split()
    assert "--no-runtime-rotation" in suggested
    assert run("quantize", source, "-o", tmp_path / "out", *suggested) == 0


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_size_without_a_rotation_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, dry_run: tuple[str, ...]
) -> None:
    monkeypatch.delattr("llamita.quantize.own_text.Writer")
    source = make_checkpoint(tmp_path / "src", intermediate_size=1888, num_hidden_layers=1)
    assert run("quantize", source, "-o", tmp_path / "out", "--preset", "llamita", *dry_run) == 2
    assert "R4: expected a size with a known Hadamard matrix, got 1888; try --no-runtime-rotation" in one_line(capsys)


def test_a_process_that_is_alone_tells_its_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Whatever torchrun's variables say; of several on a machine the first tells them."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for world, rank, local, tells in (("", "1", "1", True), ("2", "x", "0", True), ("2", "1", "1", False)):
        for name, value in {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": local}.items():
            monkeypatch.setenv(name, value)
        assert run("quantize", "nowhere", "-o", "out") == 2
        assert bool(capsys.readouterr().err) == tells


def test_an_input_that_cannot_be_factored_is_a_line(tmp_path: Path, text: Path, capsys: Any) -> None:
    options = ("--method", "gptq", "--set", "gptq.damping=0", "--samples", "1", "--length", "8")
    source = make_checkpoint(tmp_path / "src")
    assert run("quantize", source, "-o", tmp_path / "out", *options, "--calibration", text) == 2
    assert "gptq.damping" in capsys.readouterr().err


# ---- what a chain makes of the shape --------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--no-online",), ("--set", "spinquant.rotations=R2,R4")])
def test_a_dry_run_knows_what_rotations_add(tmp_path: Path, capsys: Any, options: tuple[str, ...]) -> None:
    source = make_checkpoint(tmp_path / "src")
    chosen = ("--method", "spinquant", "--set", "spinquant.steps=0", *options, "--json")
    assert run("quantize", source, *chosen, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert run("quantize", source, *chosen, "-o", tmp_path / "out") == 0
    made = json.loads(capsys.readouterr().out)
    assert planned["file_bytes"] == made["file_bytes"]
    assert planned["method"] == "spinquant"


def test_the_size_before_is_that_of_the_source(tmp_path: Path, capsys: Any) -> None:
    """Also where --no-runtime-rotation gives a tied head its own table."""
    source = make_checkpoint(tmp_path / "src")
    rotated = ("--method", "spinquant", "--set", "spinquant.steps=0", "--no-online", "--json")
    assert run("quantize", source, "-o", tmp_path / "plain", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert run("quantize", source, *rotated, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert run("quantize", source, *rotated, "-o", tmp_path / "out") == 0
    made = json.loads(capsys.readouterr().out)
    assert planned["source_bytes"] == made["source_bytes"] == plain["source_bytes"]
    assert made["ratio"] > plain["ratio"]


def test_the_card_of_a_calibrated_model_says_what_its_errors_mean(tmp_path: Path, text: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    few = ("--calibration", text, "--samples", "2", "--length", "16")
    assert run("quantize", source, "-o", tmp_path / "measured", "--method", "gptq", *few) == 0
    assert run("quantize", source, "-o", tmp_path / "nearest") == 0
    measured, nearest = ((tmp_path / n / "README.md").read_text("utf-8") for n in ("measured", "nearest"))
    assert "measured energy |" in measured
    assert "can be larger although the model is better" in measured
    assert "measured energy" not in nearest
    assert "can be larger although" not in nearest
    tuned = {name: parse_chain(name).scales("weighted") for name in ("qronos+tune", "tune")}
    assert all("tuned by descent" in text for text in tuned.values())
    assert "measured" in tuned["qronos+tune"]
    assert "expected" in tuned["tune"]
    assert "torchao" in parse_chain("gptq").scales("torchao")


@pytest.mark.parametrize("options", [(), ("--no-online",)])
def test_a_size_heeds_what_rotations_add(tmp_path: Path, text: Path, capsys: Any, options: tuple[str, ...]) -> None:
    source = make_checkpoint(tmp_path / "src")
    chosen = ("--method", "spinquant", "--set", "spinquant.steps=0", *options, "--json", "-o", tmp_path / "out")
    few = ("--calibration", text, "--samples", "2", "--length", "16")
    assert run("quantize", source, "-o", tmp_path / "out", *chosen, *few, "--max-size", "345KB") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["file_bytes"] <= 345_000
    assert made["selection"]["file_bytes"] == made["file_bytes"]
    assert made["selection"]["finished"]["value"] > 0


def test_r4_alone_is_not_learned(tmp_path: Path, capsys: Any) -> None:
    source = make_checkpoint(tmp_path / "src")
    options = ("--method", "spinquant", "--set", "spinquant.rotations=R4")
    assert run("quantize", source, "-o", tmp_path / "out", *options) == 0
    assert json.loads((tmp_path / "out" / "llamita.json").read_text())["calibration"] is None


@pytest.mark.parametrize("method", ["qronos+tune", "gptq"])
def test_blocks_may_stay_float_whole_or_in_part(tmp_path: Path, text: Path, method: str) -> None:
    source = make_checkpoint(tmp_path / "src")
    few = ("--calibration", text, "--samples", "2", "--length", "16")
    kept = ("--keep-float", "model.layers.0.*", "--keep-float", "*.v_proj", "--keep-float", "*.down_proj")
    faster = ("--set", "tune.steps=2") if "tune" in method else ()
    options = ("--method", method, *faster, *few, *kept)
    assert run("quantize", source, "-o", tmp_path / "out", *options) == 0
