"""Keep the finished parts of a long run in `.NAME.work`, next to the directory NAME that it makes.

A run that is killed leaves them. The next run with the same settings resumes from them; one with others starts anew,
or is refused. A lock, which ends with its process, keeps two runs apart.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from llamita.errors import InputError, LlamitaError, RunError
from llamita.system import collectives, processes
from llamita.system.files import read_json, unreadable

_SETTINGS, _PARTIAL = "settings.json", ".partial"
T = TypeVar("T")


@contextmanager
def kept_work(out: Path, settings: dict[str, Any], *, may_discard: bool = True) -> Iterator[Path]:
    """Provide the work directory of `out`; remove it when the block succeeds, or if nothing in it is finished.

    Args:
        settings: everything that decides the result, as JSON values.
        may_discard: remove parts that were finished with other settings.

    Raises:
        InputError: something else has this name, or parts are there from other settings.
        RunError: another run is at work there, or the directory cannot be made.
    """
    work = _work_of(out)
    try:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise RunError(f"{work}: cannot be made: {error.strerror}", hint="try another --out") from None
    try:
        _take(lock, work)
        if any(work.iterdir()) and not any(path.name.startswith(_SETTINGS) for path in work.iterdir()):
            raise InputError(str(work), "what llamita left there", "other files", "try another --out")
        if not (may_discard or _is_of(work, settings)) and _finished(work):
            raise InputError(
                str(work),
                "what a run with these settings and data left",
                "another run's",
                "try its settings again, another --out, or --overwrite, which starts anew",
            )
        _prepare(work, settings)
        try:
            yield work
        except BaseException:
            if not _finished(work):
                _remove(work)
            raise
        _remove(work)
    finally:
        os.close(lock)


@contextmanager
def shared_work(out: Path, settings: dict[str, Any], *, may_discard: bool = True) -> Iterator[Path]:
    """Provide the same to several processes on one file system: the first one manages it, the others wait for that.

    All must have finished reading when the first leaves.
    """
    if processes.rank() == 0:
        with kept_work(out, settings, may_discard=may_discard) as work:
            collectives.wait()
            yield work
    else:
        collectives.wait()
        yield _work_of(out)


def _remove(work: Path) -> None:
    """Remove a work directory, the settings last: without them, the rest after a kill would look like a stranger's."""
    for path in work.iterdir():
        if path.name != _SETTINGS:
            with suppress(OSError):
                _remove_one(path)
    shutil.rmtree(work, ignore_errors=True)


def _remove_one(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def discard_kept_work(out: Path, key: str) -> None:
    """Remove what an unfinished run left for `out`, if its settings have this key and no run is at work there.

    Other directories of this name stay: a stranger's, another command's, one that cannot be locked.
    """
    work = _work_of(out)
    try:
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # most often there is none
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if key in read_json(work, _SETTINGS):
            _remove(work)
    except (OSError, LlamitaError):
        pass
    finally:
        os.close(lock)


def has_kept_work(out: Path) -> bool:
    """Return whether an earlier run for `out` has left finished parts."""
    work = _work_of(out)
    return work.is_dir() and _finished(work)


def _finished(work: Path) -> bool:
    return any(path.name != _SETTINGS and path.suffix != _PARTIAL for path in work.iterdir())


def _work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.work"


def _take(lock: int, work: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(str(work), "no other run there", "one", "try another --out") from None
    except OSError:  # a file system without locks
        pass


def _is_of(work: Path, settings: dict[str, Any]) -> bool:
    """Return whether a work directory was made with these settings."""
    try:
        return (work / _SETTINGS).read_text("utf-8") == _as_text(settings)
    except (OSError, UnicodeDecodeError):
        return False


def _as_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, indent=1)


def _prepare(work: Path, settings: dict[str, Any]) -> None:
    """Keep the files of a run with these settings; remove all others, and half-written ones in any case."""
    if _is_of(work, settings):
        for partial in work.glob(f"*{_PARTIAL}"):
            partial.unlink()
        return
    for path in work.iterdir():
        _remove_one(path)
    write_whole(work / _SETTINGS, lambda file: file.write(_as_text(settings).encode()))


def read_kept(path: Path, read: Callable[[Path], T]) -> T | None:
    """Return what `read` returns for a kept file; if its content is damaged, remove the file and return None.

    Raises:
        RunError: the file cannot be read, which says nothing about its content.
    """
    try:
        return read(path)
    except OSError as error:
        raise RunError(unreadable(path, error).where, hint="try again") from None
    except Exception:  # NumPy's readers fail in a dozen ways
        path.unlink(missing_ok=True)
        return None


def kept_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Return these arrays of a kept .npz file, or None; read all of it, so that its checksums are checked."""

    def read(path: Path) -> dict[str, np.ndarray]:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return {name: arrays[name] for name in names}

    return read_kept(path, read)


def partial_of(path: Path) -> Path:
    """Return a file's name until it is whole."""
    return path.with_name(path.name + _PARTIAL)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that appears whole or not at all; `write` fills it."""
    partial = partial_of(path)
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
