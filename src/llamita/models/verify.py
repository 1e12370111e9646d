"""Check a packed model against llamita.json: find every flipped bit, missing, extra or truncated file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita.errors import InputError, LlamitaError
from llamita.models.metadata import METADATA, is_file_table, self_hash_holds
from llamita.models.names import linear_names, table_names, vector_names
from llamita.models.packed import PackedModel
from llamita.system.files import exists_in, parse_json, read_bytes, safe_path, sha256_file
from llamita.system.progress import Progress
from llamita.system.staging import EXPORTED_MARK

# Names that the hub and its client add to a model directory.
_FOREIGN = (".gitattributes", ".gitignore", ".cache", ".git")


@dataclass(frozen=True)
class Report:
    """List the problems, one line each; none if the directory is as it was written."""

    files: int
    bytes: int
    problems: list[str]


def verify(path: Path, progress: Progress = None) -> Report:
    """Compare every file of the directory with its recorded size and hash, then open a packed model.

    Raises:
        InputError: the directory has no llamita.json.
    """
    mark = METADATA if exists_in(path, METADATA) else EXPORTED_MARK
    if not exists_in(path, mark):
        is_float = exists_in(path, "config.json")
        found = "a float checkpoint, which records no hashes" if is_float else "a directory without"
        raise InputError(str(path), f"a directory with {METADATA} or {EXPORTED_MARK}", found)
    try:
        data = read_bytes(path, mark)
        files = parse_json(data, mark).get("files")
    except LlamitaError as error:
        return Report(1, 0, [str(error)])
    if not is_file_table(files):
        return Report(1, len(data), [f"{mark}: files: expected names with size and sha256"])
    is_sealed = mark != METADATA or self_hash_holds(data)
    problems = [] if is_sealed else [f"{METADATA}: content differs from what was written"]
    total = sum(record["size"] for record in files.values())
    done = 0
    for name, record in files.items():
        if progress:
            progress(name, done, total)
        problems += _check_file(path, name, record)
        done += record["size"]
    problems += [f"{name}: unexpected: not among the files that were written" for name in _extra(path, files)]
    problems += _check_model(path) if mark == METADATA and not problems else []
    return Report(1 + len(files), len(data) + total, problems)


def _check_file(path: Path, name: str, record: dict[str, Any]) -> list[str]:
    if not exists_in(path, name):
        return [f"{name}: missing"]
    try:
        size = safe_path(path, name).stat().st_size
        if size != record["size"]:
            return [f"{name}: expected {record['size']} bytes, got {size}"]
        if sha256_file(path / name) != record["sha256"]:
            return [f"{name}: content differs from what was written (SHA-256)"]
    except LlamitaError as error:
        return [str(error)]
    return []


def _extra(path: Path, files: dict[str, Any]) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(path))
    return [name for name in names if name not in (*files, METADATA, EXPORTED_MARK) and name not in _FOREIGN]


def _check_model(path: Path) -> list[str]:
    """Open the model and read it tensor by tensor: this finds a directory that was written wrong."""
    try:
        model = PackedModel(path)
        try:
            for name in [*table_names(model.config), *linear_names(model.config)]:
                model.weight(name)
            for name in vector_names(model.config):
                model.vector(name)
        finally:
            model.close()
    except LlamitaError as error:
        return [str(error)]
    return []
