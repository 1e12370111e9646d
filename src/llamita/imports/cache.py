"""Where a model of another form is kept in ours: converted once, found again by its files and their times."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from llamita import console
from llamita.errors import InputError
from llamita.imports.forms import convert, files_of
from llamita.staging import staged

_KEY = 16  # hexadecimal digits


def converted(source: Path) -> Path:
    """The directory of a model in our form, made from one in another form if need be.

    It lies in LLAMITA_CACHE, else in the user's cache. What was made of the same source before it changed is
    removed.

    Raises:
        InputError: it has adaptors, which one directory cannot hold, or see `forms.convert`.
        RunError: see `forms.convert`.
    """
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(source)]
    begin = f"{source.resolve().name}-{_hash(str(source.resolve()))}-"
    place = _cache() / "imports" / f"{begin}{_hash(json.dumps(stats))}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged(place) as directory, console.progress() as progress:
            imported = convert(source, directory, progress)
            if imported.adaptor is not None:
                raise InputError(
                    f"{source}: expected a model without adaptors, got one that has them; try "
                    f"llamita import {source} -o OUT, then OUT with --adaptor OUT-adaptor"
                )
        console.note(f"{source}: converted, and kept in {place}")
    except InputError:
        if not place.exists():  # else another process was faster
            raise
    for old in place.parent.glob(f"{begin}*"):
        if old != place:
            shutil.rmtree(old, ignore_errors=True)
    return place


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY]


def _cache() -> Path:
    own = os.environ.get("LLAMITA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamita"
