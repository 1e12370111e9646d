"""Open a model by the name that a user gives it: "embedded", a directory, another tool's file, or a hub name."""

import os
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from llamita.errors import InputError, RunError, shown
from llamita.imports.cache import conversions, converted
from llamita.imports.detect import LINK, detect_format
from llamita.imports.names import is_hub_name, misspelt
from llamita.models.checkpoint import Checkpoint
from llamita.models.metadata import METADATA
from llamita.models.packed import PackedModel
from llamita.models.weights import ModelSource
from llamita.system.files import exists_in
from llamita.system.progress import Note, Progress

_EXPECTED = "a model directory, a .gguf, 'embedded' or a hub name like owner/model or owner/model:Q4_K_M"


def open_source(name: str | Path, progress: Progress = None, note: Note = None) -> ModelSource:
    """Open a packed model or a float checkpoint, by path, hub name or "embedded".

    Raises:
        InputError, RunError: see `resolve`, `PackedModel` and `Checkpoint`.
    """
    path = resolve(name, progress, note)
    return PackedModel(path) if exists_in(path, METADATA) else open_float(path)


def open_float(path: Path) -> Checkpoint:
    """Open a directory that `resolve` returned as a float model."""
    if not exists_in(path, LINK) or path.parent != conversions():  # only there, the link is ours
        return Checkpoint(path)
    return import_module("llamita.imports.gguf_source").GgufCheckpoint(path)


def resolve(name: str | Path, progress: Progress = None, note: Note = None) -> Path:
    """Return the directory of a model; a hub name is downloaded, another tool's format converted once.

    Args:
        progress: of a conversion.
        note: gets one line that says where a new conversion is kept.

    Raises:
        InputError: the name is neither a directory nor possible on the hub, or another tool's model is damaged.
        RunError: the hub's model is gated, missing or out of reach.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError("model", "a path or a name", shown(name))
    if str(name) == "embedded":
        directory = Path(__file__).parents[1] / "embedded"
        if not exists_in(directory, "config.json"):
            raise RunError("embedded: this installation has no embedded model", hint="try installing llamita again")
        return directory
    path = Path(name)
    if os.path.exists(name):  # not Path.exists, which raises for a name that is too long
        if not os.path.isdir(name) and detect_format(path) is None:
            raise InputError(f"{name}", "a model directory", "a file")
    elif not is_hub_name(name):
        near = get_close_matches(str(name), ["embedded"])
        hint = f"did you mean {near[0]!r}?" if near else None
        where, got = (f"{name}", "no such file or directory") if str(name) else ("model", "''")
        raise misspelt(name) or InputError(where, _EXPECTED, got, hint)
    path = fetch(name)
    if detect_format(path) is not None:
        return converted(path, progress, note)
    if exists_in(path, "model.pte") and not exists_in(path, "config.json"):
        got, hint = "an ExecuTorch program, which cannot be read back", "try the model that it was exported from"
        raise InputError(f"{name}", "a model", got, hint)
    return path


def fetch(name: str | Path) -> Path:
    """Return the files of a model as they are: those of a hub name are downloaded, others have to be on this disk.

    Raises:
        InputError, RunError: see `resolve`.
    """
    return import_module("llamita.imports.hub").download(name) if is_hub_name(name) else Path(name)
