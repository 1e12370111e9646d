"""Choose the files of a model of the hub from the list of all that its repository has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath

from llamita.errors import InputError
from llamita.formats.gguf_parts import part_names
from llamita.imports.names import KIND, HubName
from llamita.models.checkpoint import INDEX
from llamita.system.files import is_companion
from llamita.text.printable import megabytes, printable

Files = Mapping[str, int]  # path in the repository to bytes

BIN_INDEX = "pytorch_model.bin.index.json"
_FIRST = {"config.json", "llamita.json", "README.md"}
_WEIGHTS = (("model*.safetensors", INDEX), ("pytorch_model*.bin", BIN_INDEX))  # in the order of preference
_NO_MODELS = ("mmproj", "imatrix")  # what other GGUF files hold
_LABEL = re.compile(rf"(?<![A-Za-z0-9])({KIND})(?![A-Za-z0-9_])", re.IGNORECASE)
_MOST_LISTED = 40
_USUAL = "Q4_K_M"


@dataclass(frozen=True)
class Choice:
    """The files of a model.

    Attributes:
        files: weights, and what travels with them.
        gguf: the first file of a model in GGUF, None for other formats.
    """

    files: list[str]
    gguf: str | None = None


def choose(name: HubName, files: Files) -> Choice:
    """Return the files that a name stands for: those named, else safetensors, pytorch_model.bin, the only GGUF.

    Raises:
        InputError: no model fits the name, or several do.
    """
    if name.file is not None:
        if name.file not in files:
            models = _models(files)
            got = _listed([model[0] for model in models], models, files) or "no GGUF"
            raise InputError(name.whole, "a file of the hub's model", got)
        return _gguf(part_names(name.file))
    if name.kind is None:
        near = {file for file in files if file in _FIRST or ("/" not in file and is_companion(file))}
        for pattern, index in _WEIGHTS:
            weights = {file for file in files if fnmatchcase(file, pattern) and "/" not in file}
            if weights:
                whole = {part for file in weights for part in part_names(file)}
                return Choice(sorted(near | whole | ({index} & files.keys())))
    models = _models(files)
    found = [model for model in models if name.kind is None or _names_kind(model[0], name.kind)]
    if len(found) == 1:
        return _gguf(found[0])
    raise _unclear(name, files, models, found)


def _gguf(parts: list[str]) -> Choice:
    return Choice(parts, parts[0])


def _models(files: Files) -> list[list[str]]:
    """Return the files of each model in GGUF; all parts of one count as one."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        name = PurePath(file).name.lower()
        if name.endswith(".gguf") and not any(other in name for other in _NO_MODELS):
            parts = part_names(file)
            found.setdefault(parts[0], parts)
    return list(found.values())


def _names_kind(file: str, kind: str) -> bool:
    """Return whether a file's name has this between separators: Q4_K is not in Q4_K_M, nor Q4_XS in IQ4_XS."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(kind)}(?![A-Za-z0-9_])"
    return re.search(pattern, PurePath(file).name, re.IGNORECASE) is not None


def _unclear(name: HubName, files: Files, models: list[list[str]], found: list[list[str]]) -> InputError:
    """Return the error for no model or several, with what there is to choose from."""
    if not models:
        return InputError(name.base, "model*.safetensors, pytorch_model*.bin or a .gguf", "none of these")
    labels = [model[0] for model in found] if name.kind and found else _labels(models)
    usual = _USUAL if _USUAL in labels else labels[-1]
    expected = "one GGUF" if name.kind is None else "one such GGUF"
    hint = f"write {name.base}{'/' if usual.endswith('.gguf') else ':'}{printable(usual)}"
    return InputError(name.whole, expected, _listed(labels, found or models, files), hint)


def _labels(models: list[list[str]]) -> list[str]:
    """Return what to write for each model: the type of its blocks, or its file where that is not one model's alone."""
    found = [_LABEL.findall(PurePath(model[0]).name) for model in models]
    kinds = [names[-1].upper() if names else None for names in found]
    return [
        kind if kind and sum(_names_kind(other[0], kind) for other in models) == 1 else model[0]
        for kind, model in zip(kinds, models, strict=True)
    ]


def sized(files: Files) -> str:
    """Return files with their sizes, in words: those in GGUF alone where there are any."""
    names = sorted(file for file in files if file.endswith(".gguf")) or sorted(files)
    return _listed(names, [[name] for name in names], files)


def _listed(labels: list[str], models: list[list[str]], files: Files) -> str:
    """Return models with their sizes, in words."""
    sizes = [sum(files.get(part, 0) for part in model) for model in models]
    listed = [f"{printable(label)} ({megabytes(size)})" for label, size in zip(labels, sizes, strict=True)]
    more = [f"{len(listed) - _MOST_LISTED} more"] if len(listed) > _MOST_LISTED else []
    return ", ".join(listed[:_MOST_LISTED] + more)
