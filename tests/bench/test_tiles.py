"""The limits of machines with AMX, and the benchmark of AMX; on other machines by its stand-in of plain arrays."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packed_models import pack
from places import ROOT

from llamita import _native
from llamita.bench.plan import measure_machine
from llamita.bench.tiles import VNNI, vnni_rate
from llamita.errors import RunError

has_stand_in = pytest.mark.skipif("amx-portable" not in _native.available_isas(), reason="needs AVX-512 VNNI")
SCRIPT = ROOT / "benchmarks" / "amx.py"


def benchmark(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_only_tiles_have_a_limit_without_them(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "int8_rate", {"": 500.0, VNNI: 100.0}.__getitem__)
    assert vnni_rate() == (100e9 if isa.startswith("amx") else None)


@has_stand_in
def test_a_plan_on_tiles_promises_no_more_than_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "isa", lambda: "amx-portable")
    monkeypatch.setattr(_native, "int8_rate", lambda isa="": 100.0 if isa == VNNI else 500.0)
    assert measure_machine().int8_rate == 100e9


def test_lost_tiles_end_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "isa", lambda: "amx")
    monkeypatch.setattr(_native, "check_products", lambda *_: (400, 3))
    with pytest.raises(RunError, match=r"amx: expected the same products .* got 3 of 400 wrong; try LLAMITA_ISA=avx5"):
        vnni_rate()


@has_stand_in
def test_the_benchmark_of_amx_runs_by_its_stand_in(tmp_path: Path) -> None:
    history = tmp_path / "amx.jsonl"
    ran = benchmark(pack(tmp_path), "--portable", "--rounds", 1, "--seconds", 0.01, "--history", history)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
    assert [entry["what"] for entry in found] == ["limit", "tiles", *["linear"] * 4, "prefill"]
    assert len(ran.stdout.splitlines()) == len(found)
    assert found[1]["products"] >= found[1]["threads"] > found[1]["wrong"] == 0
    assert all(entry["same_bits"] and entry["ratio"] > 0 for entry in found[2:])
    assert all(entry["date"] and entry["cpu"] for entry in found)


def test_the_benchmark_of_amx_says_in_one_line_what_is_lacking(tmp_path: Path) -> None:
    if "amx" not in _native.available_isas():
        ran = benchmark()
        assert ran.returncode == 1
        assert ran.stderr.startswith("amx: not offered here: ")
    elif "amx-portable" in _native.available_isas():
        assert benchmark(tmp_path / "none", "--portable").stderr.count("\n") == 1
