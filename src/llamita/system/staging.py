"""Make directories appear whole or not at all: write them next to their place, flush them, then rename them.

A run that is killed leaves `.NAME.partial-*` behind; the next run to the same place removes it. A lock on that
directory, which ends with its process, tells a dead run from one that still writes. Another lock, on the parent
directory, lets one run at a time rename.
"""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llamita.errors import InputError, RunError
from llamita.system.files import flush_path

# Files that mark a directory as made by llamita; `--overwrite` refuses all others.
MARK = "llamita.json"  # by `quantize`
TRAINED_MARK = "llamita_training.json"  # by `finetune`
MERGED_MARK = "llamita_merge.json"  # by `merge`
IMPORTED_MARK = "llamita_import.json"  # by `import`, a float model
EXPORTED_MARK = "llamita_export.json"  # by `export`
_PATIENCE = 30.0  # seconds; another run holds the lock only while it renames and removes


def check_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raise InputError if `out` cannot be made: it exists, its parent does not exist, or it holds the source."""
    if not out.name or out.name == "..":
        found = "'.' or ''" if out == Path() else f"{str(out)!r}"  # pathlib makes one of the other
        raise InputError("--out", "the name of a new directory", found)
    if not out.parent.is_dir():
        raise InputError("--out", "an existing directory to write into", f"{out.parent}", "try mkdir -p")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"--out: {out} exists", hint="try --overwrite or another name")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not _is_ours(out)):
        raise InputError(f"--out: --overwrite replaces only what llamita made, and {out} holds no {MARK}")
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out: {out} holds the source {source}", hint="try another name")


def _is_ours(directory: Path) -> bool:
    return any((directory / mark).is_file() for mark in (MARK, TRAINED_MARK, MERGED_MARK, IMPORTED_MARK, EXPORTED_MARK))


def check_space(out: Path, needed: int) -> None:
    """Raise RunError if the disk of `out` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            str(out), f"{needed / 1e6:,.0f} MB free on its disk", f"{free / 1e6:,.0f} MB", "try another disk"
        )


@contextmanager
def staged(out: Path, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Provide a temporary directory next to `out`; rename it to `out` if the block succeeds, else remove it.

    Leftovers of earlier runs to `out` are removed or restored first.

    Raises:
        InputError: see `check_target`.
        RunError: no permission, a full disk, or another failure of the file system; nothing is left.
    """
    lock, partial = -1, None
    try:
        check_target(out, overwrite, source)
        with _alone(out.parent):
            _recover(out)
            check_target(out, overwrite, source)  # a restored `out` is in the way, too
            lock, partial = _make_partial(out)
        yield partial
        flush_path(partial)
        with _alone(out.parent):
            check_target(out, overwrite, source)  # another may have made it meanwhile
            _move_into_place(partial, out)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Keep other runs from renaming or removing in `parent` during the block, if the file system has locks.

    The lock is on the directory itself: a run that is killed would leave a lock file behind.
    """
    descriptor, began = os.open(parent, os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > _PATIENCE:
                    raise RunError(str(parent), "no lock", "another program's lock", "try again later") from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _make_partial(out: Path) -> tuple[int, Path]:
    """Return the lock and path of a new directory; try again if another run removes it before it is locked."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        with suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: leftovers stay there
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.is_dir():
                partial.chmod(0o777 & ~umask())  # mkdtemp's is private; a model is as readable as any file
                return lock, partial
            os.close(lock)


def umask() -> int:
    """Return the rights that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_files(directory: Path) -> None:
    """Flush the files that other libraries wrote here, and give them the rights of any new file."""
    mask = umask()
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
        flush_path(path)


def _recover(out: Path) -> None:
    """Remove leftovers of killed runs; restore an `out` that one had moved aside."""
    for leftover in _leftovers(out, r"replaced-[0-9]+"):
        if not _is_ours(leftover):  # it is the user's
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
    """Return directories next to `out` with a name that only this module gives."""
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
    """Remove a directory; if this is killed halfway, nobody takes the rest for a whole one."""
    _remove(directory, directory)


def _remove(aside: Path, out: Path) -> None:
    """Rename a directory to a partial one, then remove it: if this is killed halfway, the next run finds the rest."""
    with suppress(OSError):  # if this fails, the next run removes it
        doomed = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        aside.rename(doomed)  # replaces the empty one
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def private_file(path: Path) -> Iterator[BinaryIO]:
    """Provide a new file next to `path` that its owner alone may read; put it in place if the block succeeds.

    What a killed run left is removed first: its lock ended with it.

    Raises:
        RunError: the file cannot be written; nothing is left, and a file at `path` is unchanged.
    """
    aside = path.parent / f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*-????????"):
            with suppress(OSError), leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        try:
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                with suppress(OSError):  # a file system without locks: leftovers stay there
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                os.fsync(file.fileno())
                aside.replace(path)
            flush_path(path.parent)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> RunError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else error.strerror or str(error)
    return RunError(f"{path}: cannot be written: {why}; nothing was left behind")
