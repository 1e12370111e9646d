"""`llamita quantize` where it cannot go on: no permission, a full disk, killed at any moment."""

import contextlib
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import assert_nothing_is_left, one_line, run
from tiny import make_checkpoint

from llamita.errors import InputError, RunError
from llamita.models.verify import verify
from llamita.system.staging import staged


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", "llama32", shards=2)


# ---- the surroundings fail: one line, exit code 1 ------------------------------------------------


def test_places_that_cannot_be_written(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    for out, code in ((tmp_path / "file" / "out", 2), (tmp_path / "no" / "such" / "out", 2), (Path("/proc/out"), 1)):
        assert run("quantize", source, "-o", out) == code
        assert str(out.parent) in one_line(capsys)
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert run("quantize", source, "-o", tmp_path / "locked" / "out") == 1
        assert "Permission" in one_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_source_that_may_not_be_read(tmp_path: Path, capsys: Any) -> None:
    make_checkpoint(tmp_path / "src")
    (tmp_path / "src" / "model.safetensors").chmod(0)
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out") == 1
    assert "Permission" in one_line(capsys)


def test_too_little_space_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert run("quantize", source, "-o", tmp_path / "out") == 1
    assert "free on its disk" in one_line(capsys)
    assert_nothing_is_left(tmp_path)


def start(source: Path, out: Path, **popen: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llamita.cli", "quantize", str(source), "-o", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


@pytest.mark.parametrize("limit", [0, 3000, 150_000])
def test_a_limit_on_file_size_leaves_nothing(source: Path, tmp_path: Path, limit: int) -> None:
    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(source, tmp_path / "out", preexec_fn=starve)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1, errors
    assert "cannot be written" in errors
    assert_nothing_is_left(tmp_path)


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "128k") as disk:
        assert run("quantize", source, "-o", disk / "out") == 1
        assert "free on its disk" in one_line(capsys)
        monkeypatch.setattr(
            "llamita.quantize.pipeline.check_space", lambda *_: None
        )  # another process fills it meanwhile
        assert run("quantize", source, "-o", disk / "out") == 1
        assert "the disk is full" in one_line(capsys)
        assert_nothing_is_left(disk)


# ---- killed runs ---------------------------------------------------------------------------------


def wait_for_partial(directory: Path, process: subprocess.Popen[str]) -> bool:
    """Until the run has begun to write; False if it has ended already."""
    while process.poll() is None:
        if any(path.name.startswith(".out.partial-") for path in directory.iterdir()):
            return True
        time.sleep(0.002)
    return False


def test_kill_at_any_moment_leaves_no_half_model(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
    }
    source = make_checkpoint(tmp_path / "src", num_key_value_heads=8, **shape)
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "out"
    rng, partial_seen = random.Random(0), 0
    for _ in range(6):
        process = start(source, out, start_new_session=True)
        if wait_for_partial(tmp_path / "work", process):
            time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        names = {path.name for path in (tmp_path / "work").iterdir()}
        partial_seen += any(name.startswith(".out.partial-") for name in names)
        assert len([name for name in names if name != "out"]) <= 1  # the run before cleaned up
        if out.exists():  # it was done before it was killed
            assert verify(out).problems == []
            shutil.rmtree(out)
    assert partial_seen
    assert run("quantize", source, "-o", out, "--json") == 0
    assert verify(out).problems == []
    assert_nothing_is_left(tmp_path / "work", "out")


def test_a_run_that_is_alive_keeps_its_directory(source: Path, tmp_path: Path) -> None:
    with staged(tmp_path / "out") as partial:
        (partial / "x").touch()
        assert run("quantize", source, "-o", tmp_path / "out", "--json") == 0
        assert (partial / "x").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_model_moved_aside_by_a_killed_overwrite_comes_back(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, "-o", out, "--json") == 0
    out.rename(tmp_path / ".out.replaced-123")
    capsys.readouterr()
    assert run("quantize", source, "-o", out) == 2  # it is there again: as it was before that run
    assert "exists" in one_line(capsys)
    assert verify(out).problems == []
    assert_nothing_is_left(tmp_path, "out")


@pytest.mark.parametrize("there", [False, True])
def test_what_a_user_named_alike_is_left_alone(source: Path, tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    own = [".out.replaced-mine", ".out.replaced-1x", ".out.replaced-7", ".out.partial-mine", ".out.partial-1"]
    for name in own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
    (tmp_path / own[0] / "llamita.json").touch()
    if there:
        assert run("quantize", source, "-o", out, "--json") == 0
    assert run("quantize", source, "-o", out, "--overwrite", "--json") == 0
    assert verify(out).problems == []
    assert_nothing_is_left(tmp_path, "out", *own)
    assert all((tmp_path / name / "thesis.txt").exists() for name in own)


def test_leftovers_wait_until_the_target_is_checked(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.replaced-1").mkdir()
    (tmp_path / ".out.replaced-1" / "llamita.json").touch()
    assert run("quantize", source, "-o", tmp_path / "out") == 2
    assert "exists" in one_line(capsys)
    assert_nothing_is_left(tmp_path, "out", ".out.replaced-1")


def test_what_appeared_during_a_run_is_not_replaced(tmp_path: Path) -> None:
    def run_beside() -> None:
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").touch()

    with pytest.raises(InputError, match="exists"):
        run_beside()
    assert_nothing_is_left(tmp_path, "out")
    assert_nothing_is_left(tmp_path / "out", "thesis.txt")


def test_one_run_at_a_time_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.system.staging._PATIENCE", 0.1)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another program's lock"), staged(tmp_path / "out"):
        pass
    os.close(descriptor)
    with staged(tmp_path / "out"):
        pass
    assert_nothing_is_left(tmp_path, "out")


def test_an_interrupted_run_cleans_up(
    source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamita.quantize.pipeline.write_config", interrupt)
    assert run("quantize", source, "-o", tmp_path / "out") == 130
    assert "interrupted" in one_line(capsys)
    assert_nothing_is_left(tmp_path)
