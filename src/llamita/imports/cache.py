"""Where a model of another form is kept in ours: converted once, found again by its files and their times."""

import hashlib
import json
import os
from pathlib import Path

from llamita.errors import InputError
from llamita.imports.forms import convert, files_of
from llamita.staging import staged

_KEY = 16  # hexadecimal digits


def converted(source: Path) -> Path:
    """The directory of a model in Hugging Face's form, made from one in another form if need be.

    It lies in LLAMITA_CACHE, else in the user's cache.

    Raises:
        InputError, RunError: see `forms.convert`.
    """
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(source)]
    key = hashlib.sha256(json.dumps([str(source.resolve()), stats]).encode()).hexdigest()[:_KEY]
    place = _cache() / "imports" / f"{source.resolve().name}-{key}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staged(place) as directory:
                convert(source, directory)
        except InputError:
            if not place.exists():  # else another process was faster
                raise
    return place


def _cache() -> Path:
    own = os.environ.get("LLAMITA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamita"
