"""Read and write files of a model directory, which may come from a stranger: safe paths, strict JSON, hashes."""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

from llamita.errors import InputError, RunError, shown

FileTable = dict[str, dict[str, Any]]  # name to {"size": bytes, "sha256": hexadecimal}
LARGEST_JSON = 32 * 2**20  # bytes; the index and the headers of the largest Llama take about one MB
_BLOCK = 4 * 2**20  # bytes read at a time for a hash
# Files that travel with the weights, from the hub and into the models that we write: tokenizer, chat template, and
# whatever the model's licence asks to pass on. fnmatch patterns in lower case; names match in any case.
COMPANIONS = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template*.jinja", "chat_template*.json",
    "license*", "licence*", "notice*", "use_policy*", "acceptable_use*", "copying*", "attribution*",
    "copyright*", "source_readme.md",
)  # fmt: skip


def flush_path(path: Path) -> None:
    """Flush to the disk a file that was written through a mapping, or the names of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safe_path(directory: Path, name: object) -> Path:
    """Return the path of a regular file directly in `directory`.

    A symlink may lead to the directory itself, or from a hub cache's snapshot to its blobs. Any other could make us
    copy or read a file that its owner did not mean to give.

    Raises:
        InputError: the name is not plain, or the file is missing, not regular, or a link that leads elsewhere.
        RunError: the file may not be read.
    """
    if not is_plain_name(name):
        raise InputError(f"{directory.name}", "the name of a file in this directory", shown(name))
    path = directory / name
    try:
        real, root = path.resolve(strict=True), directory.resolve(strict=True)
        is_file = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError:
        raise InputError(str(path), "a file", "none", "try downloading it again") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of symlinks
        raise unreadable(path, error) from None
    if real.parent != root and not _is_hub_blob(real, root):
        raise InputError(str(path), "a file of this directory", f"a link to {real}", "try copying it here")
    if not is_file:
        raise InputError(str(path), "a regular file")
    return path


def _is_hub_blob(real: Path, root: Path) -> bool:
    """Return whether a hub cache's CACHE/models--NAME/snapshots/REVISION may link to a file: in either's blobs."""
    if root.parent.name != "snapshots" or not root.parent.parent.name.startswith("models--"):
        return False
    model = root.parent.parent
    return real.is_relative_to(model / "blobs") or real.is_relative_to(model.parent / "blobs")


def place_of(path: Path) -> Path:
    """Return an absolute path without symlinks, but for a file's own: the hub's cache links names to hashes."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def exists_in(directory: Path, name: str) -> bool:
    """Return whether the directory lists this name, readable or not."""
    return os.path.lexists(directory / name)


def is_plain_name(name: object) -> TypeGuard[str]:
    """Return whether this can only be the name of a file in the directory itself."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and "/" not in name


def is_companion(name: str) -> bool:
    """Return whether a file of this name travels with the weights."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in COMPANIONS)


def unreadable(path: Path, error: Exception) -> RunError:
    """Return the error for a path that the system does not let us read."""
    return RunError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def map_file(path: Path, least: int, kind: str) -> mmap.mmap:
    """Map a file into memory for reading.

    Args:
        least: the fewest bytes that a file of its kind has.
        kind: such as "a GGUF file", for the message.

    Raises:
        InputError: the file is shorter.
        RunError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < least:
                raise InputError(path.name, kind, f"{size} bytes")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from None


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return a JSON object from a file of the directory; see `parse_json`."""
    return parse_json(read_bytes(directory, name), name)


def read_bytes(directory: Path, name: str, limit: int = LARGEST_JSON) -> bytes:
    """Return the bytes of a small file of the directory."""
    path = safe_path(directory, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(data) > limit:
        raise InputError(name, f"at most {limit} bytes")
    return data


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return a JSON object; refuse duplicate keys, NaN, infinity and broken UTF-8 with an InputError at `where`."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(where, "JSON", "one nested too deeply") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if b"\n" in data else ""
        raise InputError(where, f"valid JSON: {error.msg} at {at}column {error.colno}") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise InputError(where, f"valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(where, "a JSON object", type(value).__name__)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} appears twice")
        key.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
        values[key] = value
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def read_text(path: Path, limit: int) -> str:
    """Return the text of a user's file in UTF-8.

    Args:
        limit: the most bytes that it may have.

    Raises:
        InputError: the file is missing, larger, or not UTF-8.
        RunError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(str(path), f"at most {limit:,} bytes", f"{size:,}", "try a part of it")
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), "UTF-8", f"a stray byte at {error.start}") from None


def json_lines(text: str, where: str) -> Iterator[tuple[str, bytes]]:
    """Yield each line of a text of JSON lines that is not empty, after its place; `parse_json` takes both."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{where}: line {number}", line.encode()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; return its size and SHA-256."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Write a JSON object, one key a line, through to the disk; return the file's size and SHA-256."""
    return write_bytes(path, json_bytes(value))


def json_bytes(value: dict[str, Any]) -> bytes:
    """Return the text of a JSON object, one key a line, in UTF-8; NaN and infinity raise ValueError."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def file_table(directory: Path) -> FileTable:
    """Return size and SHA-256 of every file of a directory."""
    return {
        path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(directory.iterdir())
    }
