"""What a stopped run has kept: used where it is whole, made anew where it is damaged."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import run
from tiny import make_checkpoint

from llamita.errors import RunError
from llamita.system.kept_work import discard_kept_work, kept_work, read_kept, write_whole

calibrated = pytest.importorskip("llamita.methods.blockwise", reason="on the Torch side")
FEW = ("--method", "qronos", "--samples", "4", "--length", "16", "--threads", "1")
LEARNED = ("--method", "spinquant", "--set", "spinquant.steps=3", "--samples", "2", "--length", "16")


def stopped(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, options: tuple[str, ...]) -> None:
    """A run that is interrupted in its second block, or once rotations are learned."""
    round_block = calibrated._round_block

    def stop_second(run: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return round_block(run, index, *rest)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "_round_block", stop_second)
        patch.setattr("llamita.quantize.pipeline.write_weights", stop)
        assert run("quantize", source, "-o", out, *options) == 130


def cut(path: Path) -> None:
    """Lose the second half, as a full or failing disk may."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    """Keep the size alone."""
    path.write_bytes(bytes(path.stat().st_size))


def lose_a_page(path: Path) -> None:
    """Zeros where numbers were: nothing about the file looks wrong."""
    data = path.read_bytes()
    middle = len(data) * 3 // 4
    path.write_bytes(data[: middle - 64] + bytes(64) + data[middle:])


@pytest.mark.parametrize("damage", [cut, scramble, lose_a_page, None])
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (FEW, ".out.work/block-0000.npz"),
        (FEW, ".out.work/float-*.npy"),
        (FEW, ".out.text.work/rows-000000.npz"),
        (LEARNED, ".out.work/rotations.npz"),
    ],
)
def test_damaged_work_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: tuple[str, ...], pattern: str,
    damage: Callable[[Path], None] | None,
) -> None:  # fmt: skip
    source = make_checkpoint(tmp_path / "src")
    assert run("quantize", source, "-o", tmp_path / "whole", *options) == 0
    stopped(monkeypatch, source, tmp_path / "out", options)
    assert "the same command resumes here" in capsys.readouterr().err
    (kept,) = tmp_path.glob(pattern)
    if damage is not None:
        damage(kept)
    assert run("quantize", source, "-o", tmp_path / "out", *options) == 0
    assert "kept what it had finished" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".out*"))


def test_another_command_leaves_no_kept_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "src")
    stopped(monkeypatch, source, tmp_path / "out", FEW)
    assert sorted(path.name for path in tmp_path.glob(".out*")) == [".out.text.work", ".out.work"]
    assert run("quantize", source, "-o", tmp_path / "out") == 0
    assert not list(tmp_path.glob(".out*"))


def test_only_ones_own_kept_work_is_discarded(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.work"

    def leave(settings: str) -> None:
        work.mkdir(exist_ok=True)
        (work / "settings.json").write_text(settings)
        (work / "first.npz").write_bytes(b"1")

    discard_kept_work(out, "scheme")  # there is none
    for settings in ('{"base": {}}', "[]", "{", ""):
        leave(settings)
        discard_kept_work(out, "scheme")
        assert (work / "first.npz").exists()
    (work / "settings.json").unlink()  # a stranger's
    discard_kept_work(out, "scheme")
    assert (work / "first.npz").exists()
    leave('{"scheme": {}}')
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    discard_kept_work(out, "scheme")
    assert (work / "first.npz").exists()
    os.close(lock)
    work.rename(tmp_path / "elsewhere")
    work.symlink_to(tmp_path / "elsewhere")
    discard_kept_work(out, "scheme")
    assert (tmp_path / "elsewhere" / "first.npz").exists()
    work.unlink()
    (tmp_path / "elsewhere").rename(work)
    discard_kept_work(out, "scheme")
    assert not work.exists()


@pytest.mark.parametrize("stop_at", ["_own_text", "load_calibration"])
def test_an_interruption_says_whether_anything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stop_at: str
) -> None:
    source = make_checkpoint(tmp_path / "src")

    def stop(*arguments: Any) -> None:
        if stop_at == "_own_text":
            (arguments[-1] / "rows-000000.npz").write_bytes(b"1")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"llamita.quantize.calibration.{stop_at}", stop)
    assert run("quantize", source, "-o", tmp_path / "out", *FEW) == 130
    said = "; the same command resumes here" if stop_at == "_own_text" else " before anything was kept"
    assert capsys.readouterr().err.splitlines() == [f"stopped{said}", "error: interrupted"]


def test_a_kept_file_is_read_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_whole(path, lambda file: file.write(b"12"))
    assert read_kept(path, lambda path: int(path.read_bytes())) == 12
    path.write_bytes(b"1x")
    assert read_kept(path, lambda path: int(path.read_bytes())) is None
    assert not path.exists()


def test_what_cannot_be_read_is_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"12")

    def fail(path: Path) -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(RunError, match="Cannot allocate memory"):
        read_kept(path, fail)
    assert path.exists()


def test_a_kill_while_the_work_is_removed_leaves_what_can_be_told_from_a_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    def run_once() -> None:
        with kept_work(out, {"a": 1}) as work:
            (work / "first.npz").write_bytes(b"1")

    monkeypatch.setattr("llamita.system.kept_work._remove_one", killed)
    with pytest.raises(KeyboardInterrupt):
        run_once()
    monkeypatch.undo()
    with kept_work(out, {"a": 1}) as work:
        assert (work / "first.npz").exists()
    assert not work.exists()
