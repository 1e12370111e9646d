"""What a bench's figures mean: exact expectations of the counts, medians, fractions and ratios."""

import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from packed_models import pack
from tiny import CONFIGS, make_checkpoint

from llamita.bench.report import (
    RATIOS,
    Limits,
    Runs,
    Settings,
    best_of,
    figures,
    fractions,
    mark_weak,
    ratios,
    roofline_points,
)
from llamita.bench.shapes import find_shape
from llamita.bench.speed import decode, measure_speed, prefill
from llamita.bench.work import Work, cache_bytes_per_token, count_work
from llamita.bench.worker import ModelSpec, Worker, serve
from llamita.errors import InputError, RunError
from llamita.loading import load
from llamita.models.config import ModelConfig
from llamita.numerics.scheme import make_scheme
from llamita.system import machine

WORK = Work(linear=1000, head=300, attention=4, weight_bytes=800, cache_bytes=10)
SETTINGS = Settings(prompt_tokens=10, new_tokens=4, batch=2)
RUNS = Runs(load=[3.0, 1.0, 2.0], prefill=[2.0, 1.0, 4.0], first_token=[2.5, 1.5, 4.5],
            decode=[1.0, 2.0, 4.0], batch=[4.0, 2.0, 8.0])  # fmt: skip
LIMITS = Limits(int8_rate=10300.0, bandwidth=3700.0, cache_bytes=1)


def config_1b() -> ModelConfig:
    return ModelConfig.from_hf(find_shape("1b")[1])


def test_the_work_of_llama_1b() -> None:
    """973 and 263 million multiply-adds a token, as published shapes give them."""
    work = count_work(config_1b(), make_scheme("llama3.2"), "f16")
    block = 2048 * (2048 + 512 + 512 + 2048 + 3 * 8192)
    assert work.linear == 16 * block == 973_078_528
    assert work.head == 128256 * 2048
    assert work.attention == 2 * 16 * 2048
    assert work.cache_bytes == 2 * 2 * 16 * 8 * 64
    # int4 codes and a bf16 scale for every 32; int8 codes and a bf16 scale for every row of the head
    assert work.weight_bytes == work.linear // 2 + work.linear // 32 * 2 + work.head + 128256 * 2
    arm = count_work(config_1b(), make_scheme("arm"), "f16")
    assert arm.weight_bytes == work.linear // 2 + work.linear // 128 * 4 + 2 * work.head
    assert count_work(config_1b(), None, "f32").weight_bytes == 2 * (work.linear + work.head)
    assert count_work(config_1b(), None, "f32", lambda _: "F32").weight_bytes == 4 * (work.linear + work.head)


def test_an_untied_embedding_is_no_work() -> None:
    tied = count_work(config_1b(), make_scheme("llama3.2"), "f16")
    assert count_work(replace(config_1b(), tied=False), make_scheme("llama3.2"), "f16") == tied


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_the_cache_of_a_token_is_that_of_the_engine(kv_dtype: str) -> None:
    config = ModelConfig.from_hf(CONFIGS["llama32"])
    llm = load("embedded", kv_dtype=kv_dtype)
    per_token = cache_bytes_per_token(llm.config, kv_dtype)
    assert llm.new_sequence(1024).nbytes == 1024 * per_token
    assert cache_bytes_per_token(config, kv_dtype) == 2 * 2 * 2 * 32 * (2 if kv_dtype == "f16" else 4)


def test_sums_over_a_prompt_and_the_tokens_after_it() -> None:
    assert WORK.prompt(10) == 10 * 1000 + 300
    assert WORK.prompt_attention(3) == 4 * (1 + 2 + 3)
    # tokens 11, 12, 13, 14 attend to as many
    assert WORK.decode_bytes(10, 4) == 800 + 10 * (11 + 12 + 13 + 14) / 4
    assert WORK.decode_bytes(10, 4, batch=3) == 800 + 3 * 10 * 12.5
    assert WORK.decode_multiply_adds(3) == 3 * 1300


def test_figures_are_medians_with_their_spread() -> None:
    found = figures(RUNS, SETTINGS)
    assert found == {
        "prefill_tokens_per_second": 10 / 2.0,
        "decode_tokens_per_second": 4 / 2.0,
        "batch_tokens_per_second": 2 * 4 / 4.0,
        "first_token_seconds": 2.5,
        "load_seconds": 2.0,
        "spread": {
            "prefill_tokens_per_second": [2.5, 10.0],
            "decode_tokens_per_second": [1.0, 4.0],
            "batch_tokens_per_second": [1.0, 4.0],
            "first_token_seconds": [1.5, 4.5],
            "load_seconds": [1.0, 3.0],
        },
    }
    assert "batch_tokens_per_second" not in figures(replace(RUNS, batch=[]), SETTINGS)
    assert figures(replace(RUNS, load=[]), SETTINGS)["load_seconds"] is None


def test_fractions_of_the_limits() -> None:
    nearby = [LIMITS, replace(LIMITS, int8_rate=20600.0), replace(LIMITS, int8_rate=5150.0)]
    rows = fractions(WORK, RUNS, SETTINGS, nearby, LIMITS, is_quantized=True)
    assert list(rows) == ["prefill", "prefill_with_attention", "decode", "batch"]
    assert rows["prefill"] == {"work": 10300, "unit": "multiply-adds", "rate": 5150.0, "limit": 10300.0,
                               "fraction": 0.5, "fraction_nearby": 0.5}  # fmt: skip
    assert rows["prefill_with_attention"]["work"] == 10300 + 4 * 55
    assert rows["decode"]["work"] == 925.0
    assert rows["decode"]["rate"] == 925.0 / (2.0 / 4)
    assert rows["decode"]["fraction"] == 0.5
    assert rows["batch"]["rate"] == 1050.0
    uneven = [replace(LIMITS, int8_rate=10300.0 / 4), LIMITS, LIMITS]
    rows = fractions(WORK, RUNS, SETTINGS, uneven, LIMITS, is_quantized=True)
    assert rows["prefill"]["fraction"] == 0.5
    assert rows["prefill"]["fraction_nearby"] == 1.0  # of 2.0, 1.0 and 0.25


def test_limits_that_say_nothing_are_left_out() -> None:
    rows = fractions(WORK, RUNS, SETTINGS, [LIMITS] * 3, LIMITS, is_quantized=False)
    assert rows["prefill"]["fraction"] is None
    assert rows["decode"]["fraction"] == 0.5
    cached = replace(LIMITS, cache_bytes=925 // 4 + 1)  # decode's bytes fit, those of two sequences do not
    rows = fractions(WORK, RUNS, SETTINGS, [cached] * 3, cached, is_quantized=True)
    assert (rows["decode"]["fraction"], rows["decode"]["fraction_nearby"]) == (None, None)
    assert rows["batch"]["fraction"] is not None


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (replace(LIMITS, int8_rate=5149.0), r"prefill: .*0.0 G multiply-adds/s"),
        (replace(LIMITS, bandwidth=1849.0), r"decode: .*0.0 G bytes/s"),
    ],
)
def test_a_result_above_its_limit_shows_a_weak_probe(limits: Limits, text: str) -> None:
    rows = fractions(WORK, RUNS, SETTINGS, [limits] * 3, limits, is_quantized=True)
    (remark,) = mark_weak("tiny", rows)
    assert re.fullmatch(f"tiny: {text}.*probe was too weak", remark)
    weak = {"prefill", "prefill_with_attention"} if remark.startswith("tiny: prefill") else {"decode", "batch"}
    marked = {what for what, row in rows.items() if row["fraction"] is None}
    assert marked <= weak
    assert remark.split(": ")[1] in marked
    for row in rows.values():
        assert row["limit"]
        assert (row["fraction"] is None) == (row["fraction_nearby"] is None)
        assert row["fraction"] is None or row["fraction"] <= 1


def test_a_result_at_its_limit_is_none_too_many() -> None:
    limits = Limits(5150.0, 1850.0, 1)
    rows = fractions(WORK, RUNS, SETTINGS, [limits] * 3, limits, is_quantized=True)
    assert mark_weak("tiny", rows) == []
    assert rows["decode"]["fraction"] == 1


def test_the_best_of_limits_is_the_best_of_each() -> None:
    assert best_of([Limits(1.0, 4.0, 3), Limits(2.0, 3.0, 3)]) == Limits(2.0, 4.0, 3)


def test_ratios_are_ours_over_theirs() -> None:
    ours, theirs = dict.fromkeys(RATIOS, 3.0), dict.fromkeys(RATIOS, 2.0)
    assert ratios(ours, theirs) == dict.fromkeys(RATIOS, 1.5)
    assert "load_seconds" not in ratios(ours, {**theirs, "load_seconds": None})


def test_points_lie_under_the_roof_where_fractions_say() -> None:
    rows = fractions(WORK, RUNS, SETTINGS, [LIMITS] * 3, LIMITS, is_quantized=True)
    points = roofline_points(WORK, rows, SETTINGS, chunk=4)
    assert points["prefill"] == (10300 / (3 * 800), 5150.0)  # 10 tokens are 3 chunks
    x, y = points["decode"]
    assert x == 1300 / 925
    assert y == pytest.approx(0.5 * LIMITS.bandwidth * x)
    assert points["batch"][0] == 2600 / 1050


def test_decoding_rewinds_and_repeats_the_same_work() -> None:
    llm = load("embedded", scheme="llama3.2")
    sequence = llm.new_sequence(24)
    seconds, first = prefill(llm, sequence, 16)
    assert 0 < seconds <= first
    assert sequence.length == 16
    assert decode(llm, [sequence], 8) > 0
    assert sequence.length == 16
    assert decode(llm, [sequence], 8) > 0  # would not fit were it not rewound
    speed = measure_speed(llm, 8, 4, repeats=1)
    assert speed.prefill > 0
    assert speed.decode > 0


def ask(*requests: dict[str, object]) -> list[dict[str, Any]]:
    """Answers of a worker in this process."""
    answers = io.StringIO()
    serve([json.dumps(request) for request in requests], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def load_request(spec: ModelSpec, **options: object) -> dict[str, object]:
    return {"do": "load", "spec": asdict(spec), "threads": None, "context": None, "kv_dtype": None, **options}


def test_a_worker_loads_and_runs_what_it_is_asked_for(tmp_path: Path) -> None:
    out = pack(tmp_path)
    packed = load_request(ModelSpec(str(out), None))
    rounded = load_request(ModelSpec(str(tmp_path / "src"), None, make_scheme("llama3.2")))
    alike = load_request(ModelSpec(str(out), None, make_scheme("llama3.2"), random=True))
    run = [{"do": "prefill", "tokens": 16, "capacity": 24}, {"do": "decode", "tokens": 8},
           {"do": "decode", "tokens": 8, "batch": 3}, {"do": "memory"}]  # fmt: skip
    found = [ask(request, *run) for request in (packed, rounded, alike)]
    for facts, *answers, memory in found:
        assert facts["work"] == found[0][0]["work"]
        assert facts["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
        assert facts["kv_dtype"] == "f16"
        assert all(answer["seconds"] > 0 for answer in answers)
        assert memory["cache_bytes"] == 3 * 24 * facts["work"]["cache_bytes"]
        assert memory["weights_bytes"] == found[0][-1]["weights_bytes"]
        assert memory["memory_bytes"] > memory["weights_bytes"]


def test_a_float_model_counts_the_weights_that_it_uses_in_place(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src", dtype="F32")
    (facts, memory) = ask(load_request(ModelSpec(str(source), None)), {"do": "memory"})
    assert facts["scheme"] is None
    expected = 4 * (facts["work"]["linear"] + facts["work"]["head"])
    assert facts["work"]["weight_bytes"] == memory["weights_bytes"] == expected


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (load_request(ModelSpec("/no/such/model", None)), 2, "expected a model directory"),
        (load_request(ModelSpec("embedded", None), kv_dtype="f8"), 2, "kv_dtype: expected one of"),
        (load_request(ModelSpec("embedded", None), context=10**6), 2, "context: expected 1 to"),
        ({"do": "limits", "threads": 5000, "probe_bytes": 2**22}, 2, "threads: expected 1 to 1024"),
    ],
)
def test_a_worker_answers_with_errors(request_: dict[str, object], code: int, text: str) -> None:
    (answer,) = ask(request_)
    assert answer["exit_code"] == code
    assert text in str(answer["error"])


def test_what_a_model_will_need_is_known_before_it_is_made(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "src")
    specs = [ModelSpec(None, "8b", make_scheme("llama3.2")), ModelSpec(None, "8b"), ModelSpec(str(source), None)]
    requests = [{**load_request(spec), "do": "needs"} for spec in specs]
    for request in requests:
        del request["threads"]
    packed, floats, mapped = ask(*requests)
    assert (packed["context"], round(packed["memory_bytes"] / 1e9, 1)) == (131072, 5.0)
    assert round(floats["memory_bytes"] / 1e9, 1) == 16.1
    assert mapped["memory_bytes"] == 0
    (answer,) = ask({**requests[0], "context": 10**6})
    assert "context: expected 1 to 131072 tokens" in str(answer["error"])


def test_a_worker_is_a_process_that_raises_and_ends() -> None:
    with Worker("w") as worker:
        limits = worker.ask("limits", threads=1, probe_bytes=2**24)
        assert limits["int8_rate"] > 1e6
        assert limits["bandwidth"] > 1e6
        with pytest.raises(InputError, match="threads: expected"):
            worker.ask("limits", threads=5000, probe_bytes=2**24)
        pid = worker._process.pid
        worker._process.kill()
        with pytest.raises(RunError, match="w: expected its process to answer, it ended with signal 9"):
            worker.ask("memory")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_does_not_outlive_its_parent() -> None:
    program = (
        "import os\nfrom llamita.bench.worker import Worker\nworker = Worker('w')\n"
        "worker.ask('limits', threads=1, probe_bytes=2**22)\nprint(worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=120)
    pid = int(result.stdout)
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def test_the_memory_watch_sees_what_is_gone_again() -> None:
    """In a process of its own: memory that earlier tests left may go meanwhile, and would hide it."""
    program = """
import numpy as np
from llamita.system import machine
watch, before = machine.MemoryWatch(), machine.anonymous_bytes()
with watch:
    block = np.ones(2**26, np.uint8)  # more than the allocator ever keeps
    watch.look()
    del block
assert watch.peak - before > 0.9 * 2**26, (watch.peak, before)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_machine_has_a_name_and_a_cache() -> None:
    assert machine.cpu_name()
    assert machine.last_level_cache() >= 2**17
    assert 0 < machine.free_memory() <= machine.usable_memory()
