"""Keep converted models: another tool's model is converted once, and found again by its files and their times."""

import hashlib
import json
import os
import time
from glob import escape
from pathlib import Path

from llamita import __version__
from llamita.errors import InputError
from llamita.imports.convert import convert
from llamita.imports.detect import files_of, gguf_of, has_adapters
from llamita.models.packed_writer import find_companions
from llamita.system.files import place_of
from llamita.system.progress import Note, Progress
from llamita.system.staging import remove_whole, staged

_KEY = 16  # hexadecimal digits
_LONGEST_NAME = 80  # characters of the source's name
_SPARED = 24 * 3600.0  # seconds that an outdated conversion is kept


def converted(source: Path, progress: Progress = None, note: Note = None) -> Path:
    """Return the directory of a converted model, and convert the model first if that was not done before.

    The directory is in LLAMITA_CACHE, by default in the user's cache. Once the source has changed, what was made of it
    before is removed after a day.

    Raises:
        InputError: the model has adapters, which one directory cannot hold, or see `convert.convert`.
        RunError: see `convert.convert`.
    """
    if has_adapters(source):
        hint = f"try llamita import {source} -o OUT, then OUT with --adapter OUT-adapter"
        raise InputError(f"{source}", "a model without adapters", "one with adapters", hint)
    files = {path.name: path for path in files_of(source)}
    if source.is_dir():  # tokenizer, templates and the like travel with the weights
        files |= {name: source / name for name in find_companions(source)}
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(files.items())]
    spelled = os.path.abspath(source) if gguf_of(source) else ""  # the directory names the file by it
    begin = f"{place_of(source).name[:_LONGEST_NAME]}-{_hash(str(source.resolve()))}-"
    place = conversions() / f"{begin}{_hash(json.dumps([__version__, stats, spelled]))}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged(place) as directory:
            convert(source, directory, progress, may_link=True)
        if note:
            note(f"{source}: converted; the result is kept in {place}")
    except InputError:
        if not place.exists():  # otherwise another process was faster
            raise
    _remove_old(place, begin)
    return place


def _remove_old(place: Path, begin: str) -> None:
    """Remove what was made of the same source before it changed, unless another process may still be opening it."""
    for old in place.parent.glob(f"{escape(begin)}*"):
        if old != place and time.time() - old.stat().st_mtime > _SPARED:
            remove_whole(old)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY]


def conversions() -> Path:
    """Return the directory of converted models."""
    own = os.environ.get("LLAMITA_CACHE")
    cache = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamita"
    return cache / "imports"
