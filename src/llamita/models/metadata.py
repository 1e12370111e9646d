"""Read and write llamita.json, which says how a packed model was made and holds the SHA-256 of every other file.

Its second line is the hash of all its other bytes. `docs/reference/packed-model.md` explains every key.
"""

import hashlib
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from llamita.errors import InputError, shown
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import FileTable, is_plain_name, json_bytes, parse_json, read_bytes, safe_path, write_bytes
from llamita.system.staging import MARK

METADATA = MARK  # the file's name
FORMAT = 2  # 2: the scheme has overrides for some layers; all else is written as 1
_SELF_LINE = re.compile(rb'\{\n  "self_sha256": "([0-9a-f]{64})",\n')
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPES = {"llamita": str, "method": str, "settings": dict, "float_layers": dict}


@dataclass(frozen=True)
class SourceRecord:
    """Name the model that a packed model was made from, and the SHA-256 of its files by name."""

    name: str
    files: dict[str, str]


@dataclass(frozen=True)
class ErrorRecord:
    """Hold the error of the weights, relative as Σ(w - ŵ)² / Σw²; None if the float model was not available."""

    relative: float | None
    mean_squared: float | None
    layers: dict[str, float]  # relative, by module


@dataclass(frozen=True)
class Metadata:
    """Hold the values of llamita.json, in the order of the file."""

    llamita: str  # the version that wrote the model
    scheme: QuantScheme
    method: str  # a chain such as "rtn" or "spinquant+gptq+tune"
    settings: dict[str, Any]  # settings of the methods, and values that they report
    seed: int | None  # None if nothing is random
    rotations: Rotations
    calibration: dict[str, Any] | None
    source: SourceRecord
    float_layers: dict[str, str]  # layers left in float, with the reason
    error: ErrorRecord
    files: FileTable  # every other file

    @property
    def format(self) -> int:
        """Return the least format number that allows this scheme, so that older versions read what they can."""
        return 2 if self.scheme.layers else 1

    @classmethod
    def read(cls, path: Path) -> "Metadata":
        """Read the llamita.json of a directory; check its hash and values, and the sizes of its weight files.

        Raises:
            InputError: it is missing, damaged or of another version, or a weight file has another size.
            RunError: it cannot be read.
        """
        try:
            return cls._read(path)
        except InputError as error:
            if error.where.startswith(str(path)):
                raise
            where = path if error.where.startswith(METADATA) else f"{path}: {METADATA}"
            raise error.within(str(where)) from None

    @classmethod
    def _read(cls, path: Path) -> "Metadata":
        data = read_bytes(path, METADATA)
        values = parse_json(data, METADATA)
        version = values.pop("format", None)
        if type(version) is not int or version < 1:
            raise InputError(f"{METADATA}: format", f"{FORMAT}", shown(version, 40))
        if version > FORMAT:
            raise InputError(f"{METADATA}: format", f"at most {FORMAT}", f"{version}", "try a newer llamita")
        if not self_hash_holds(data):
            raise InputError(f"{path}: {METADATA}: differs from the one that was written", hint="try `llamita verify`")
        del values["self_sha256"]
        metadata = cls(**_checked(values))
        if version < metadata.format:
            raise InputError(f"{METADATA}: format", f"{metadata.format} with layers in the scheme")
        for name, record in metadata.files.items():
            if name.endswith(".safetensors"):
                size = safe_path(path, name).stat().st_size
                if size != record["size"]:
                    raise InputError(f"{path / name}", f"{record['size']} bytes", f"{size}", "try copying it again")
        return metadata

    def write(self, directory: Path) -> None:
        """Write llamita.json to a directory that has none."""
        write_bytes(directory / METADATA, sealed(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON takes them, without the hash."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "format": self.format,
            **values,
            "scheme": self.scheme.to_dict(),
            "rotations": self.rotations.to_list(),
            "source": asdict(self.source),
            "error": asdict(self.error),
        }


def sealed(values: dict[str, Any]) -> bytes:
    """Return a JSON file of these values after a line with the hash of all other bytes of the file."""
    rest = json_bytes(values).removeprefix(b"{\n")
    digest = hashlib.sha256(b"{\n" + rest).hexdigest()
    return b'{\n  "self_sha256": "' + digest.encode() + b'",\n' + rest


def self_hash_holds(data: bytes) -> bool:
    """Return whether the hash in a sealed file's second line still fits its other bytes."""
    line = _SELF_LINE.match(data)
    return line is not None and line[1].decode() == hashlib.sha256(b"{\n" + data[line.end() :]).hexdigest()


def is_file_table(files: Any) -> TypeGuard[FileTable]:
    """Return whether a value of llamita.json is a table of file names with their size and SHA-256."""
    return isinstance(files, dict) and all(
        is_plain_name(name)
        and isinstance(record, dict)
        and type(record.get("size")) is int
        and record["size"] >= 0
        and isinstance(record.get("sha256"), str)
        for name, record in files.items()
    )


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Metadata` from the values of a file; types that commands rely on are checked."""
    keys = {field.name for field in fields(Metadata)}
    if set(values) != keys:
        raise InputError(METADATA, f"the keys {sorted(keys)}", shown(sorted(values), 400))
    for key, kind in _TYPES.items():
        if not isinstance(values[key], kind):
            raise InputError(f"{METADATA}: {key}", "a text" if kind is str else "an object", shown(values[key]))
    if not is_file_table(values["files"]):
        raise InputError(f"{METADATA}: files", "names with size and sha256")
    return values | {
        "scheme": QuantScheme.from_dict(values["scheme"]),
        "rotations": Rotations.from_list(values["rotations"]),
        "source": _source(values["source"]),
        "error": _error(values["error"]),
    }


def _source(value: Any) -> SourceRecord:
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not isinstance(value.get("name"), str):
        raise InputError(f"{METADATA}: source", "a name, and files with their SHA-256", shown(value))
    for name, sha256 in files.items():  # the files are looked up later: a name must not lead elsewhere
        if not is_plain_name(name) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise InputError(f"{METADATA}: source: files", "plain names with a SHA-256", shown({name: sha256}))
    return SourceRecord(value["name"], files)


def _error(value: Any) -> ErrorRecord:
    layers = value.get("layers") if isinstance(value, dict) else None
    if isinstance(layers, dict) and all(isinstance(error, float | int) for error in layers.values()):
        relative = value.get("relative", "absent")  # None is a value, too
        if isinstance(relative, float | int | None):
            return ErrorRecord(relative, value.get("mean_squared"), layers)
    raise InputError(f"{METADATA}: error", "relative and layers as numbers", shown(value))
