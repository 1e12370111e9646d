"""`llamita bench` as a user meets it: the table, JSON, the picture, one-line errors."""

import errno
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command import assert_nothing_is_left, one_line, run
from packed_models import pack
from tiny import CONFIGS, make_checkpoint

import llamita
from llamita import _native
from llamita.bench import run as bench_run
from llamita.bench import shapes
from llamita.bench.worker import _State
from llamita.commands import bench as command

QUICK = ("--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2")
METRICS = {"prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds", "load_seconds",
           "size_bytes", "memory_bytes"}  # fmt: skip
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(autouse=True)
def _quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "PROBE_BYTES", 2**22)
    measured = bench_run._probe

    def probe(*arguments: Any) -> dict[str, Any]:
        found = measured(*arguments)  # the limits here are far above: a busy machine must not decide a test
        return {**found, "int8_rate": 100 * found["int8_rate"], "bandwidth": 100 * found["bandwidth"]}

    monkeypatch.setattr(bench_run, "_probe", probe)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path)


def results(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run("bench", *QUICK, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_directory_beside_its_source(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    found = results(capsys, packed, "--baseline", packed.parent / "src", "--batch", "2", "--threads", "1")
    assert found["settings"] == {"prompt_tokens": 16, "new_tokens": 4, "batch": 2, "repeats": 2}
    assert found["machine"]["threads"] == 1
    assert found["machine"]["cpu"]
    assert len(found["limits"]["probes"]) == 2 * 2 + 1  # before each of both, in each repeat; and after
    assert found["limits"]["int8_rate"] == max(p["int8_rate"] for p in found["limits"]["probes"])
    ours, theirs = found["model"], found["baseline"]
    for model in (ours, theirs):
        assert model.keys() >= METRICS | {"batch_tokens_per_second", "of_limit", "spread", "work"}
        assert all(model[name] > 0 for name in METRICS)
        for name, (low, high) in model["spread"].items():
            assert low <= model[name] <= high
    assert (ours["name"], theirs["name"]) == ("out", "src")
    assert ours["size_bytes"] == (packed / "model.safetensors").stat().st_size
    assert ours["scheme"]["name"] == "llama3.2"
    assert theirs["scheme"] is None
    assert found["ratios"]["size_bytes"] == ours["size_bytes"] / theirs["size_bytes"]
    assert found["ratios"].keys() == METRICS


class InProcess:
    """A worker without a process, for a shape that another process would not know."""

    def __init__(self, _name: str) -> None:
        self._state = _State()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        return json.loads(json.dumps(getattr(self._state, do)(**arguments)))

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        pass


def test_a_shape_beside_bf16_needs_no_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {**CONFIGS["llama32"], "vocab_size": 512}
    monkeypatch.setitem(shapes.SHAPES, "llama-3.2-1b", small)
    monkeypatch.setattr(bench_run, "Worker", InProcess)
    found = results(capsys, "--shape", "1b", "--preset", "arm", "--group-size", "64", "--baseline", "bf16")
    assert found["model"]["name"] == "llama-3.2-1b custom"
    assert found["model"]["scheme"]["group_size"] == 64
    assert found["baseline"]["name"] == "llama-3.2-1b BF16"
    assert found["model"]["is_random"]
    assert found["baseline"]["is_random"]
    assert found["ratios"]["size_bytes"] < 1
    assert found["model"]["load_seconds"] > 0
    assert found["baseline"]["load_seconds"] is None  # a real one is mapped, not made
    assert "load_seconds" not in found["ratios"]


def test_a_float_model_is_rounded_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert results(capsys, "embedded")["model"]["scheme"]["name"] == "llama3.2"
    found = results(
        capsys, "embedded", "--preset", "none", "--kv-cache", "f16", "--context", "64", "--float-math", "bf16"
    )
    assert found["model"]["scheme"] is None
    assert found["model"]["kv_dtype"] == "f16"
    assert found["model"]["float_math"] == llamita.load("embedded", float_math="bf16").float_math
    assert found["model"]["context"] == 64
    assert found["baseline"] is None
    assert found["ratios"] is None


def test_bf16_in_the_shape_of_a_directory(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    found = results(capsys, packed, "--baseline", "bf16")
    assert found["baseline"]["is_random"]
    assert not found["model"]["is_random"]
    assert found["baseline"]["work"]["linear"] == found["model"]["work"]["linear"]


def test_a_single_new_token_of_several_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    found = results(capsys, "embedded", "--new-tokens", "1", "--batch", "2")
    assert found["settings"]["new_tokens"] == 1
    assert found["model"]["batch_tokens_per_second"] > 0


def test_usable_cpus_are_those_that_threads_start_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "usable_cpus", lambda: 77)
    assert results(capsys, "embedded")["machine"]["usable_cpus"] == 77


def test_the_table_has_metas_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "embedded", *QUICK, "--baseline", "embedded", "--batch", "2") == 0
    out = capsys.readouterr().out
    rows = ["decode tok/s", "time to first token", "prefill tok/s", "model size", "memory", "load time",
            "decode tok/s, 2 sequences"]  # fmt: skip
    places = [out.index(f"  {row} ") for row in rows]
    assert places == sorted(places)
    assert "embedded llama3.2: prefill, attention counted" in out
    assert "no memory limit for decode: the " in out
    assert "memory of embedded llama3.2:" in out
    assert "avx" in out or "scalar" in out or "neon" in out
    assert "llamita 0." in out


@pytest.mark.parametrize(
    ("key", "ratio", "shown"),
    [
        ("decode_tokens_per_second", 2.5, "2.50x"),
        ("first_token_seconds", 0.25, "-75.0\xa0%"),
        ("memory_bytes", 1.5, "+50.0\xa0%"),
    ],
)
def test_rates_are_factors_and_the_rest_is_what_was_saved(key: str, ratio: float, shown: str) -> None:
    assert command._ratio(key, ratio) == shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "got neither"),
        (("embedded", "--shape", "1b"), "got both"),
        (("--shape", "70b"), "--shape: expected one of llama-3.2-1b"),
        (("embedded", "--preset", "q4"), "--scheme: expected one of arm, llama3.2, llamita, none, got 'q4'"),
        (("embedded", "--threads", "0"), "error: --threads: expected 1 to 1024, got 0"),
        (("embedded", "--preset", "none", "--group-size", "32"), "--group-size"),
        (("embedded", "--preset", "none", "--fit-groups"), "--fit-groups: expected a scheme that rounds, got none"),
        (("embedded", "--group-size", "48"), "--group-size: expected one of"),
        (("/no/such/place",), "expected a model directory"),
        (("embedded", "--baseline", "/no/such/place"), "expected a model directory"),
        (("embedded", "--prompt-tokens", "5000"), "expected at most 2048 tokens, the context, got 5128"),
        (("embedded", "--kv-cache", "f8"), "error: --kv-cache: expected one of"),
        (("embedded", "--float-math", "f8"), "error: --float-math: expected one of"),
        (("embedded", "--context", "4096"), "error: --context: expected 1 to 2048"),
        (("embedded", "--repeats", "0"), "repeats"),
        (("embedded", "--plot", "picture.jpg"), "--plot: expected a name that ends in .png"),
        (("embedded", "--plot", "/no/such/place/a.png"), "--plot: expected an existing directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    assert run("bench", *arguments) == 2
    assert text in one_line(capsys)


def test_groups_that_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "tinyllama")  # 352 inputs of down_proj: no multiple of 64
    assert run("bench", model, "--group-size", "64", *QUICK) == 2
    assert "try --group-size 32, or --fit-groups" in one_line(capsys)
    scheme = results(capsys, model, "--group-size", "64", "--fit-groups")["model"]["scheme"]
    assert scheme["group_size"] == 64
    assert set(scheme["layers"].values()) == {"w4g32"}


def test_a_quantized_model_takes_no_preset(capsys: pytest.CaptureFixture[str], packed: Path) -> None:
    results(capsys, packed, "--preset", "none", "--repeats", "1")
    for options in (("--preset", "arm"), ("--fit-groups",)):
        assert run("bench", packed, *options) == 2
        assert "expected a float model" in one_line(capsys)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_weak_probe_loses_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def probe(*_arguments: object) -> dict[str, Any]:
        return {"int8_rate": 1e6, "vnni_rate": None, "bandwidth": 1e6, "probe_bytes": 2**22}

    monkeypatch.setattr(bench_run, "_probe", probe)
    assert run("bench", "embedded", *QUICK, "--threads", "1", *["--json"][:as_json]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "embedded llama3.2: prefill: expected at most the measured limit" in line
    assert "the probe was too weak; try more --repeats" in line
    if as_json:
        found = json.loads(captured.out)
        assert found["limits"]["too_weak"]
        assert found["model"]["of_limit"]["prefill"]["fraction"] is None
        assert found["model"]["decode_tokens_per_second"] > 0
    else:
        assert "decode tok/s" in captured.out
        assert captured.out.count("too weak") == 2  # with and without attention
        assert "no memory limit for decode: the " in captured.out


@pytest.mark.parametrize(
    ("free", "arguments", "code", "text"),
    [
        (18.0, (), 1, "expected 21.0 GB free for the weights, got 18.0 GB; try a smaller shape, or without"),
        (99.0, ("--context", "64"), 2, "llama-3.1-8b llama3.2: expected at most 64 tokens, the context, got"),
    ],
)
def test_the_needs_of_all_are_looked_at_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free: float,
    arguments: tuple[str, ...], code: int, text: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench_run, "Worker", InProcess)
    monkeypatch.setattr(bench_run, "free_memory", lambda: int(free * 1e9))
    monkeypatch.setattr(bench_run, "_load", None)
    assert run("bench", "--shape", "8b", "--baseline", "bf16", *arguments) == code
    assert text in one_line(capsys)


def test_without_matplotlib_a_picture_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "llamita.bench.roofline", raising=False)
    monkeypatch.setattr(command, "run_bench", None)
    assert run("bench", "embedded", "--plot", tmp_path / "a.png") == 1
    assert "try pip install 'llamita[plot]'" in one_line(capsys)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nobody can write in Linux's /proc")
def test_a_directory_that_cannot_be_written_is_said_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "run_bench", None)
    assert run("bench", "embedded", "--plot", "/proc/a.png") == 2
    assert "--plot: expected a directory that can be written, got /proc:" in one_line(capsys)
    (tmp_path / "a.png").mkdir()
    assert run("bench", "embedded", "--plot", tmp_path / "a.png") == 2
    assert "--plot: expected a file, got the directory" in one_line(capsys)
    assert_nothing_is_left(tmp_path, "a.png")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_picture_that_fails_loses_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def draw(_result: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(command, "_plotter", lambda _path: draw)
    assert run("bench", "embedded", *QUICK, "--plot", "a.png", *["--json"][:as_json]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].endswith("a.png: No space left on device")
    if as_json:
        assert json.loads(captured.out)["model"]["decode_tokens_per_second"] > 0
    else:
        assert "decode tok/s" in captured.out


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib: pip install '.[plot]'")
@pytest.mark.parametrize("more", [(), ("--baseline", "bf16", "--batch", "2")])
def test_the_picture_is_a_png(capsys: pytest.CaptureFixture[str], tmp_path: Path, more: tuple[str, ...]) -> None:
    results(capsys, "embedded", "--plot", tmp_path / "a.png", *more)
    assert_nothing_is_left(tmp_path, "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width > height > 500
