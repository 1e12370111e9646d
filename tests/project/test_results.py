"""The comparison with other engines: its record, its page, its processes. No peer is needed here."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

import llamita
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
import peers
import protocol
import records
import render_results
import tensors
import workers
from contenders import CASES, CONTENDERS, MODELS

RECORDS = sorted(render_results.HISTORY.glob("*.json"))
WORK = {
    "int8": True,
    "linear_macs_per_token": 1000,
    "head_macs": 300,
    "attention_macs_per_pair": 2,
    "bytes_per_token": 500,
    "cache_bytes_per_position": 4,
}


def timing(round_: int, name: str, prefill: float, decode: float, **changes: Any) -> dict[str, Any]:
    run = {"round": round_, "case": "512", "contender": name, "prefill_seconds": prefill}
    return {**run, "decode_seconds": decode, "int8_rate": 2.0, "read_bandwidth": 4.0, **changes}


def record_of(timings: list[dict[str, Any]]) -> dict[str, Any]:
    entry = {"label": "ours", "weights": "4-bit", "size_bytes": 1, "version": "1", "settings": {}, "work": WORK}
    contenders = {name: {**entry, "label": name} for name in {t["contender"] for t in timings}}
    machine = {"cpu": "a CPU", "threads": 2, "isa": "scalar"}
    return {
        "format": records.FORMAT,
        "started": "2020-01-02T03:04Z",
        "machine": machine,
        "contenders": contenders,
        "notes": ["Measured in a dream."],
        "tuning": {},
        "failures": {},
        "timings": timings,
    }


def test_the_page_is_what_the_history_says() -> None:
    assert render_results.PAGE.read_text("utf-8") == render_results.render(render_results.read_records())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_summary_of_a_record_is_that_of_its_timings(path: Path) -> None:
    record = json.loads(path.read_text("utf-8"))
    assert record["summary"] == records.summarize(record)
    assert record["format"] == records.FORMAT
    for run in record["timings"]:
        assert run["case"] in CASES
        assert run["contender"] in record["contenders"]


def test_summary_takes_medians_and_holds_ours_against_the_limits_of_the_moment() -> None:
    runs = [timing(i, "llamita-g128", seconds, 1.0) for i, seconds in enumerate((1.0, 4.0, 2.0))]
    row = records.summarize(record_of(runs))["cases"]["512"]["llamita-g128"]
    assert row["prefill_tokens_per_second"] == {"median": 256, "min": 128, "max": 512}
    assert row["runs"] == 3
    macs = 512 * 1000 + 2 * 512 * 513 / 2 + 300
    assert row["prefill_of_limit"]["median"] == pytest.approx(macs / 2.0 / 2e9, rel=1e-4)
    assert row["decode_of_limit"]["median"] == pytest.approx(64 * 500 / 4e9, rel=1e-4)
    with_cache = 64 * (500 + 4 * (512 + 32.5)) / 4e9
    assert row["decode_with_cache_of_limit"]["median"] == pytest.approx(with_cache, rel=1e-4)


def test_times_of_few_layers_are_extrapolated_along_a_line() -> None:
    """0.5 s and 0.1 s per layer: 2 layers take 0.7 s, 16 take 2.1 s. A round without both is left out."""
    runs = [timing(1, "executorch-2", 0.7, 0.7), timing(1, "executorch-4", 0.9, 0.9)]
    runs.append(timing(2, "executorch-2", 0.7, 0.7))
    rows = records.summarize(record_of(runs))["cases"]["512"]
    assert set(rows) == {records.EXTRAPOLATED}
    assert rows[records.EXTRAPOLATED]["first_token_seconds"]["median"] == pytest.approx(2.1)
    assert "extrapolated" in render_results.render([record_of(runs)])


def test_written_records_read_back_and_render(tmp_path: Path) -> None:
    record = record_of([timing(1, "llamita-g128", 1.0, 2.0), timing(1, "llamacpp-q4_0", 3.0, 5.0)])
    record["failures"]["openvino-int4"] = "it ended"
    path = tmp_path / "record.json"
    records.write(path, record)
    assert json.loads(path.read_text("utf-8")) == {**record, "summary": records.summarize(record)}
    page = render_results.render([record])
    assert "3.00 x, 2.50 x" in page
    assert "OpenVINO int4, groups of 128 did not run: it ended" in page
    assert "Measured in a dream." in page
    records.write(path, record_of([]))
    assert json.loads(path.read_text("utf-8"))["timings"] == []


def test_two_records_of_a_day_have_headings_of_their_own() -> None:
    runs = [timing(1, "llamita-g128", 1.0, 2.0)]
    later = {**record_of(runs), "started": "2020-01-02T05:06Z"}
    headings = [x for x in render_results.render([record_of(runs), later]).splitlines() if x.startswith("## ")]
    assert headings == [f"## a CPU, 2 threads, scalar, 2020-01-02 {time} UTC" for time in ("05:06", "03:04")]


def test_the_page_claims_no_more_than_the_record_holds() -> None:
    """Runs by row, whose settings were tried, who is absent and why."""
    timings = [timing(i, "llamacpp-q4_0", 1.0, 2.0) for i in (1, 2, 3)] + [timing(1, "llamita-g128", 1.0, 2.0)]
    timings.append({**timing(1, "llamacpp-bf16", 1.0, 1.0), "case": "8192"})
    record = record_of(timings)
    record["failures"] = {"openvino-int4": "it ended", "llamacpp-q4_0": "memory"}
    page = render_results.render([record])
    assert "| llamacpp-q4_0 | 0 | 3 |" in page
    assert "| llamita-g128 | 0 | 1 |" in page
    assert "Default settings, no others tried: llama.cpp Q4_0; llama.cpp BF16." in page
    first, second = (part.partition("\n\n|")[0].splitlines() for part in page.split("Not in this table:\n\n")[1:])
    assert "- llama.cpp Q4_K_S (left out of this run)" in first
    assert "- OpenVINO int4, groups of 128 (failed, see below)" in first
    assert not [line for line in first if line.startswith("- llama.cpp Q4_0 ")]
    assert "- transformers FP32 (not run with this prompt)" in second
    assert "llama.cpp Q4_0 failed in a later run: memory" in page
    assert "fastest settings" not in page
    record["tuning"] = {"llamacpp-bf16": {"best": "flash", "prefill_and_decode_seconds": {"flash": [[1, 2]]}}}
    page = render_results.render([record])
    assert "llama.cpp BF16, settings tried (prompt and tokens together): flash 3.00 s." in page
    assert "no others tried: llama.cpp Q4_0." in page


class FakeWorker:
    """Answers at once; notes in `asked` who was asked for what, and fails where it is told to."""

    def __init__(self, name: str, asked: list[tuple[str, str]], fails_at: int = 0) -> None:
        self.name, self.asked, self.fails_at = name, asked, fails_at
        self.about = {"version": "1", "settings": {"isa": "scalar"}}

    def ask(self, do: str, seed: int = 0, **_request: Any) -> dict[str, Any]:
        self.asked.append((self.name, f"{do} {seed}"))
        if do == "limits":  # each probe tells which it was
            count = self.asked.count((self.name, "limits 0"))
            return {"int8_rate": float(count), "read_bandwidth": float(count)}
        if seed and seed == self.fails_at:
            raise workers.PeerError("it ended")
        return {"prefill_seconds": 1.0, "decode_seconds": 1.0, "peak_memory_bytes": 1, "tokens": [[0]]}

    def close(self) -> None:
        pass


def test_a_run_is_held_against_limits_of_just_before_and_just_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of every group and after a failure the limits of some minutes ago do not count."""
    asked: list[tuple[str, str]] = []
    fails_at = {"llamacpp-q4_0": 2}
    monkeypatch.setattr(workers, "start_limits", lambda *_: FakeWorker("limits", asked))
    monkeypatch.setattr(workers, "start", lambda _, name, *__: FakeWorker(name, asked, fails_at.get(name, 0)))
    monkeypatch.setattr(workers, "model_bytes", lambda *_: 1)
    names = ["llamita-g128", "llamacpp-q4_0", "openvino-int4", "transformers-fp32"]
    monkeypatch.setattr(peers, "parse", lambda: argparse.Namespace(
        workdir=tmp_path, history=tmp_path, threads=1, note="", resume=False, cases=["512"], only=names,
        prepare=False, tune=False, check=False, rounds=2))  # fmt: skip
    peers.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert list(record["failures"]) == ["llamacpp-q4_0"]
    assert len(record["timings"]) == 7
    for at, (name, what) in enumerate(asked):
        if name != "limits" and what in ("run 1", "run 2"):
            assert asked[at - 1][0] == "limits", f"{name}, {what}: after {asked[at - 1]}"
    runs = [("llamita-g128", 1.5), ("llamacpp-q4_0", 2.5), ("openvino-int4", 3.5), ("llamita-g128", 4.5),
            ("openvino-int4", 6.5), ("transformers-fp32", 8.5), ("transformers-fp32", 9.5)]  # fmt: skip
    assert [(run["contender"], run["int8_rate"]) for run in record["timings"]] == runs


def test_where_amx_runs_both_limits_are_recorded_and_shown() -> None:
    record = record_of([timing(i, "llamita-g128", 1.0, 1.0, vnni_rate=0.5) for i in range(2)])
    assert records.summarize(record)["limits"]["vnni_rate"]["median"] == 0.5
    assert "Limits: 2.0 (2.0 to 2.0) GMAC/s in int8 (0.5 (0.5 to 0.5) without AMX), 4.0" in render_results.render(
        [record]
    )
    page = render_results.render([record_of([timing(1, "llamita-g128", 1.0, 1.0)])])
    assert "without AMX" not in page
    assert "kernel for it was not measured" in page
    assert "not measured" not in render_results.render([record])


@pytest.mark.parametrize("has_clang", [False, True])
def test_clang_compiles_llama_cpp_for_amx(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_clang: bool
) -> None:
    monkeypatch.setattr(workers.shutil, "which", lambda name: f"/bin/{name}" if has_clang else None)
    chosen = workers.build_settings("llamacpp", amx=True)["CMAKE_ARGS"]
    assert ("-DCMAKE_CXX_COMPILER=clang++" in chosen) is has_clang
    assert ("no clang" in capsys.readouterr().err) is not has_clang
    assert "clang" not in workers.build_settings("llamacpp", amx=False)["CMAKE_ARGS"]
    assert workers.build_settings("openvino", amx=True) == {}


def test_every_package_of_the_peers_is_pinned_exactly() -> None:
    environments = {contender.environment for contender in CONTENDERS.values()} - {""}
    for name in environments:
        lines = (workers.HERE / f"{name}.txt").read_text("utf-8").splitlines()
        for line in (line for line in lines if not line.startswith("#")):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{name}: {line}"
    assert environments == {path.stem for path in workers.HERE.glob("*.txt")}


def test_the_table_of_contenders_holds_together() -> None:
    for contender in CONTENDERS.values():
        assert contender.model in MODELS
        assert (workers.HERE / contender.worker).exists()
        assert set(contender.cases) <= set(CASES)
    for recipe in MODELS.values():
        assert not recipe.source or recipe.source in MODELS


def test_our_worker_answers_with_greedy_tokens_and_is_stopped_between_requests(tmp_path: Path) -> None:
    options = {"model": "embedded", "threads": 1}
    worker = workers.Worker(sys.executable, "work_llamita.py", options, tmp_path / "log")
    try:
        request = {"prompt": 9, "new": 4, "sequences": 2, "seed": 3, "vocabulary": 500}
        answer = worker.ask(do="run", **request)
        llm = llamita.load(resolve("embedded"), threads=1)
        for sequence, tokens in enumerate(answer["tokens"]):
            prompt = protocol.prompt_ids(request, sequence)
            expected = llm.generate(prompt, max_tokens=5, greedy=True).token_ids
            assert tokens[: len(expected)] == expected
            assert len(tokens) == 5
        assert answer["prefill_seconds"] > 0 < answer["decode_seconds"]
        logits = worker.ask(do="logits", prompt=9, vocabulary=500)["logits"]
        ids = protocol.prompt_ids({"prompt": 9, "vocabulary": 500})
        assert np.array_equal(np.float32(logits), llm.logits(ids)[-1])
        assert worker.about["work"]["linear_macs_per_token"] == sum(
            part.weights.rows * part.weights.columns
            for block in llm.model.weights.blocks
            for linear in (block.qkv, block.attention_out, block.gate_up, block.down)
            for part in linear.parts
        )
        assert worker.about["work"]["int8"] is False
        state = Path(f"/proc/{worker.process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
        assert state == "T"
        with pytest.raises(workers.PeerError, match="expected run or logits"):
            worker.ask(do="dance")
    finally:
        worker.close()


def test_a_worker_that_cannot_load_is_reported(tmp_path: Path) -> None:
    with pytest.raises(workers.PeerError, match="ended with status 1"):
        workers.Worker(sys.executable, "work_llamita.py", {"model": "/no", "threads": 1}, tmp_path / "log")


def test_heads_are_interleaved_from_halves_to_pairs() -> None:
    """Two heads of four rows: rows 0, 1 | 2, 3 of a head become 0, 2, 1, 3."""
    rows = np.arange(8)[:, None]
    assert tensors.interleave_heads(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_small_reader_reads_what_the_engine_reads() -> None:
    source = Checkpoint(resolve("embedded"))
    for name, bits in tensors.bf16_tensors(source.path):
        if bits.ndim == 2:
            assert np.array_equal(bits, source.weight(name.removesuffix(".weight"))), name
