"""Two processes that quantize together make what one makes, up to the order of sums."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import assert_nothing_is_left, run
from tiny import make_checkpoint

from llamita.errors import InputError
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight
from llamita.system import processes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OPTIONS = ("--samples", "5", "--length", "48", "--group-size", "32")
_FLIPPED = 0.3  # of what differs with another calibration text; half of the samples alone differ by more
METHODS = {"qronos": (), "spinquant+gptq": ("--set", "spinquant.steps=3", "--set", "spinquant.batch=2")}


def started_together(count: int, *arguments: object) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every process, started with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    command = [sys.executable, "-m", "llamita", *map(str, arguments)]
    started = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_what_one_makes(tmp_path: Path, method: str) -> None:
    pytest.importorskip("torch", reason="needs Torch: pip install '.[torch]'")
    source = make_checkpoint(tmp_path / "src")
    options = (*OPTIONS, "--method", method, *METHODS[method], "--json")
    assert run("quantize", source, "-o", tmp_path / "one", *options) == 0
    started = started_together(2, "quantize", source, "-o", tmp_path / "two", *options)
    assert [code for code, _, _ in started] == [0, 0], started
    assert json.loads(started[0][1])["out"] == str(tmp_path / "two")  # the first process prints
    assert started[1][1] == ""
    assert "torchao" not in started[0][2]  # whose warnings are about kernels that are not used
    assert_nothing_is_left(tmp_path, "src", "one", "two")
    one, two = PackedModel(tmp_path / "one"), PackedModel(tmp_path / "two")
    assert one.metadata.calibration == two.metadata.calibration  # the same text, token for token
    assert one.metadata.calibration is not None
    assert one.metadata.calibration["samples"] == 5
    # Sums in another order flip codes near a tie. The layers of the first step read the same inputs in both; behind
    # them a flipped code changes all that follows.
    assert run("quantize", source, "-o", tmp_path / "other", *options, "--seed", 1) == 0
    other = PackedModel(tmp_path / "other")
    for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        codes, scales = differences(two, one, linear)
        most_codes, most_scales = differences(other, one, linear)
        assert codes < _FLIPPED * most_codes, linear
        assert scales <= _FLIPPED * most_scales, linear
    errors = [model.metadata.error.layers for model in (two, one)]
    for name, error in errors[1].items():
        assert errors[0][name] == pytest.approx(error, rel=0.05), name


def differences(model: PackedModel, other: PackedModel, linear: str) -> tuple[float, float]:
    """The shares of words of eight codes and of scales that differ in a layer of the first block."""
    found, expected = (one.weight(f"model.layers.0.{linear}") for one in (model, other))
    assert isinstance(found, Int4Weight)
    assert isinstance(expected, Int4Weight)
    return (found.packed != expected.packed).mean(), (found.scales != expected.scales).mean()


def test_shares_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert (processes.world(), processes.rank(), processes.share(5)) == (1, 0, range(5))
    assert processes.fair_threads(None) is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts += processes.share(7)
        assert 2 <= len(processes.share(7)) <= 3
    assert parts == list(range(7))
    monkeypatch.delenv("LLAMITA_THREADS", raising=False)
    monkeypatch.setattr(processes._native, "usable_cpus", lambda: 8)
    assert processes.fair_threads(None) == 2
    assert processes.fair_threads(5) == 5
    monkeypatch.setenv("LLAMITA_THREADS", "4")
    assert processes.fair_threads(None) is None
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK: expected a whole number of at least 0, got 'first'"):
        processes.rank()


def test_every_process_needs_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    pytest.importorskip("torch", reason="gptq needs Torch: pip install '.[torch]'")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    source = make_checkpoint(tmp_path / "src")
    options = ("--method", "gptq", "--samples", "2", "--length", "8")
    assert run("quantize", source, "-o", tmp_path / "out", *options) == 2
    assert "--samples: expected at least 3, got 2" in capsys.readouterr().err
