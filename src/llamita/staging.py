"""A directory that exists is whole: written beside its place, flushed to the disk, then renamed.

A run that is killed leaves `.NAME.partial-*` behind; the next run to the same place removes it. A lock on
the directory, which ends with its process, tells a dead run from one that still writes.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamita.errors import InputError, RunError

MARK = "llamita.json"  # only a directory that holds it may be overwritten


def check_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raise InputError if `out` cannot be made: it exists, or its parent does not, or it holds the source."""
    if not out.name or out.name == "..":
        raise InputError(f"--out: expected the name of a new directory, got {str(out)!r}")
    if not out.parent.is_dir():
        raise InputError(
            f"--out: expected an existing directory to write into, got {out.parent}; try mkdir -p"
        )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"--out: {out} exists; try --overwrite or another name")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file()):
        raise InputError(f"--out: --overwrite replaces only what llamita made, and {out} holds no {MARK}")
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out: {out} holds the source {source}; try another name")


def check_space(out: Path, needed: int) -> None:
    """Raise RunError if the disk of `out` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(f"{out}: expected {needed / 1e6:,.0f} MB free on its disk, got {free / 1e6:,.0f} MB; "
                       "try another disk")  # fmt: skip


@contextmanager
def staged(out: Path, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A temporary directory beside `out`, which becomes `out` if the block ends well and vanishes if not.

    What earlier runs to `out` left is put in order first.

    Raises:
        InputError: see `check_target`.
        RunError: no permission, a full disk, or another failure of the file system; nothing is left.
    """
    lock, partial = -1, None
    try:
        _recover(out)
        check_target(out, overwrite, source)
        lock, partial = _make_partial(out)
        yield partial
        _flush_directory(partial)
        _move_into_place(partial, out)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
        raise RunError(f"{out}: cannot be written: {why}; nothing was left behind") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _make_partial(out: Path) -> tuple[int, Path]:
    """A new locked directory; another run may take it for a leftover before it is locked: then once more."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        with suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: leftovers are not removed there
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.is_dir():
                partial.chmod(0o777 & ~_umask())  # mkdtemp's is private; a model is as readable as any file
                return lock, partial
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _recover(out: Path) -> None:
    """Remove what killed runs left; bring back an `out` that one had moved aside."""
    for leftover in sorted(out.parent.glob(f".{_escape(out.name)}.replaced-*")):
        if os.path.lexists(out):
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(out)
    for leftover in out.parent.glob(f".{_escape(out.name)}.partial-*"):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its run is alive
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _move_into_place(partial: Path, out: Path) -> None:
    if os.path.lexists(out):
        aside = Path(f"{out.parent / f'.{out.name}'}.replaced-{os.getpid()}")
        out.rename(aside)
        partial.rename(out)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        partial.rename(out)
    _flush_directory(out.parent)


def _flush_directory(directory: Path) -> None:
    """Names, like data, reach the disk only when flushed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
