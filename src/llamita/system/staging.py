"""A directory that exists is whole: written beside its place, flushed to the disk, then renamed.

A run that is killed leaves `.NAME.partial-*` behind; the next run to the same place removes it. A lock on
the directory, which ends with its process, tells a dead run from one that still writes. Another lock, on the
directory around, lets one run at a time put names in order.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamita.errors import InputError, RunError
from llamita.system.files import flush_path

MARK = "llamita.json"  # only a directory that holds it may be overwritten, or
TRAINED_MARK = "llamita_training.json"  # that holds one of these, as what `finetune` leaves does,
MERGED_MARK = "llamita_merge.json"  # a float model that `merge` leaves,
IMPORTED_MARK = "llamita_import.json"  # and `import`,
EXPORTED_MARK = "llamita_export.json"  # and what `export` does
_PATIENCE = 30.0  # seconds; another run holds the lock while it renames and removes, no longer


def check_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raise InputError if `out` cannot be made: it exists, or its parent does not, or it holds the source."""
    if not out.name or out.name == "..":
        raise InputError("--out", "the name of a new directory", f"{str(out)!r}")
    if not out.parent.is_dir():
        raise InputError("--out", "an existing directory to write into", f"{out.parent}", "try mkdir -p")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"--out: {out} exists; try --overwrite or another name")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not _is_ours(out)):
        raise InputError(f"--out: --overwrite replaces only what llamita made, and {out} holds no {MARK}")
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out: {out} holds the source {source}; try another name")


def _is_ours(directory: Path) -> bool:
    return any((directory / mark).is_file() for mark in (MARK, TRAINED_MARK, MERGED_MARK, IMPORTED_MARK, EXPORTED_MARK))


def check_space(out: Path, needed: int) -> None:
    """Raise RunError if the disk of `out` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            f"{out}",
            f"{needed / 1000000.0:,.0f} MB free on its disk",
            f"{free / 1000000.0:,.0f} MB",
            "try another disk",
        )


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
        check_target(out, overwrite, source)
        with _alone(out.parent):
            _recover(out)
            check_target(out, overwrite, source)  # what came back is in the way, too
            lock, partial = _make_partial(out)
        yield partial
        flush_path(partial)
        with _alone(out.parent):
            check_target(out, overwrite, source)  # another may have made it meanwhile
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


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """No other run renames or removes in `parent` during this block, where the file system has locks.

    The lock is on the directory itself: a file for it would be left behind by a run that is killed.
    """
    descriptor, began = os.open(parent, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > _PATIENCE:
                    raise RunError(
                        f"{parent}", "to be alone here", "another program's lock", "try again later"
                    ) from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _make_partial(out: Path) -> tuple[int, Path]:
    """A new locked directory; another run may take it for a leftover before it is locked: then once more."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        with suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: leftovers are not removed there
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.is_dir():
                partial.chmod(0o777 & ~umask())  # mkdtemp's is private; a model is as readable as any file
                return lock, partial
            os.close(lock)


def umask() -> int:
    """What new files' rights lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_files(directory: Path) -> None:
    """What other libraries wrote here reaches the disk, with the rights that any new file has."""
    mask = umask()
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)  # safetensors makes files for their owner alone
        flush_path(path)


def _recover(out: Path) -> None:
    """Remove what killed runs left; bring back an `out` that one had moved aside."""
    for leftover in _leftovers(out, r"replaced-[0-9]+"):
        if not _is_ours(leftover):  # a user's own
            continue
        if os.path.lexists(out):
            _remove(leftover, out)
        else:
            leftover.rename(out)
    for leftover in _leftovers(out, r"partial-[0-9]+-[a-z0-9_]{8}"):  # the end is mkdtemp's
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its run is alive
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _leftovers(out: Path, kind: str) -> list[Path]:
    """Directories beside `out` with a name that only this module gives."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.{kind}")
    found = (path for path in out.parent.iterdir() if pattern.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _move_into_place(partial: Path, out: Path) -> None:
    if os.path.lexists(out):
        aside = out.parent / f".{out.name}.replaced-{os.getpid()}"
        out.rename(aside)
        partial.rename(out)
        _remove(aside, out)
    else:
        partial.rename(out)
    flush_path(out.parent)


def remove_whole(directory: Path) -> None:
    """Remove a directory so that nobody takes what is left, if this is killed, for a whole one."""
    _remove(directory, directory)


def _remove(aside: Path, out: Path) -> None:
    """Remove a directory; killed halfway, the rest is found as partial and never taken for a whole model."""
    with suppress(OSError):  # then the next run removes it
        doomed = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        aside.rename(doomed)  # replaces the empty one
        shutil.rmtree(doomed, ignore_errors=True)
