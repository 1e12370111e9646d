"""What a method is expected to take, and which method a preset stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import run
from tiny import make_checkpoint

from llamita.checkpoint import Checkpoint, resolve
from llamita.methods.chain import parse_chain
from llamita.methods.setup import Setup
from llamita.needs import expected_memory, expected_work
from llamita.plan import describe_shape

pytest.importorskip("torch", reason="calibrated methods are on the Torch side")
TEXT = (Path(__file__).parents[1] / "src" / "llamita" / "embedded" / "heldout.txt").read_text("utf-8")


# ---- time and memory ------------------------------------------------------------------------------


def test_time_and_memory_are_announced_and_memory_is_told(tmp_path: Path, capsys: Any) -> None:
    make_checkpoint(tmp_path / "src")
    (tmp_path / "text").write_text(TEXT[:4000])
    text = ("--calibration", tmp_path / "text", "--samples", "4", "--length", "64", "--threads", "1")
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out", "--method", "gptq", *text) == 0
    captured = capsys.readouterr()
    assert "of memory to expect" in captured.err
    assert "memory" in captured.out
    assert run("quantize", tmp_path / "src", "--dry-run", "--method", "gptq", "--json", *text) == 0
    values = json.loads(capsys.readouterr().out)
    assert run("quantize", tmp_path / "src", "--dry-run", "--json", *text) == 0
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


def test_the_preset_llamita_calibrates_unless_told_otherwise(tmp_path: Path) -> None:
    """It is `qronos+tune` with its own settings, and --method or --set replace either."""
    make_checkpoint(tmp_path / "src", num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:4000], "utf-8")
    options = ("--preset", "llamita", "--calibration", text, "--samples", "2", "--length", "16", "--json")
    faster = ("--set", "tune.steps=4")

    def record(name: str, *more: str) -> dict[str, Any]:
        assert run("quantize", tmp_path / "src", "-o", tmp_path / name, *options, *more) == 0
        return json.loads((tmp_path / name / "llamita.json").read_text("utf-8"))

    found = record("preset", *faster)
    assert found["method"] == "qronos+tune"
    assert found["settings"] == {"tune.rate": 0, "tune.steps": 4}
    assert record("changed", *faster, "--set", "tune.rate=1")["settings"]["tune.rate"] == 1
    found = record("named", "--method", "rtn")
    assert (found["method"], found["settings"]) == ("rtn", {})


def test_what_is_learned_and_tuned_is_expected_to_take_time_and_memory() -> None:
    config = describe_shape("1b")[1].config

    def needs(method: str, **settings: float) -> tuple[float, float]:
        chain, setup = (
            parse_chain(method),
            Setup(settings={k.replace("_", "."): v for k, v in settings.items()}),
        )
        return expected_work(config, chain, setup, 64, 512), expected_memory(config, chain, setup, 64, 512)

    work, memory = needs("qronos")
    assert work < needs("qronos+tune", tune_rate=0)[0] < needs("qronos+tune")[0]
    assert needs("tune")[1] > 8 * 4 * 60e6  # of a block: places, bounds, gradients, moments
    assert needs("spinquant+qronos", spinquant_steps=0) == (work, memory)
    longer = [needs("spinquant+qronos", spinquant_steps=steps)[0] - work for steps in (10, 20)]
    assert longer[1] == pytest.approx(2 * longer[0])
    assert needs("spinquant")[1] > 4 * 1.2e9  # the whole model in float32
